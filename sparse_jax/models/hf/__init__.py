"""Models and Hugging Face's files."""

"""Tasks: examples from files, metrics, and batches of tokens."""

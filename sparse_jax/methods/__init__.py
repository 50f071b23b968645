"""Methods: what is trained, and what is added to the layers."""

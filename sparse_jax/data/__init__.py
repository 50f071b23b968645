"""Data: files, tokens, batches and metrics."""

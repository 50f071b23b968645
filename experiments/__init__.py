"""Claims about sparse_jax, each with the command that checks it."""

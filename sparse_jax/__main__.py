"""`python -m sparse_jax` is the command `sparse-jax`."""

from sparse_jax.cli.main import run

if __name__ == "__main__":
    run()

"""Commands: wrong input ends them with one line."""

import sys
from collections.abc import Callable

from sparse_jax.errors import InputError, printable

__all__ = ["run_command"]


def run_command(main: Callable[[], None]) -> None:
    """Runs a command; wrong input is one line on standard error and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None

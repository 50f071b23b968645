"""The error that means: the input is wrong, not the program."""

import reprlib
import textwrap
from collections.abc import Iterable

__all__ = ["InputError", "brief", "first_line", "listed", "printable", "reason_of"]


class InputError(ValueError):
    """Input that breaks a rule, with the rule and the remedy in the message.

    The message reads `` `argument` must be <rule>, got <value>. <Remedy.>`` The
    command line prints it on one line and exits with code 2, as it does an `OSError`
    about a place that was typed; any other exception is a bug and keeps its traceback.

    Example:
      >>> raise InputError("`density` must be in (0, 1], got 2.0.")
      Traceback (most recent call last):
      sparse_jax.errors.InputError: `density` must be in (0, 1], got 2.0.
    """


# Values come from files: they may be of any size, and hold codes that a terminal obeys.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def brief(value: object) -> str:
    r"""Returns a value for a message: its `repr`, cut short.

    Example:
      >>> print(brief("\x1b[31mred"), brief(None), brief(list(range(200))))
      '\x1b[31mred' None [0, 1, 2, 3, 4, 5, ...]
    """
    return _SHORT.repr(value)


def listed(names: Iterable[str], most: int = 10) -> str:
    r"""Returns names for a message, by `repr` if they cannot be printed or are long.

    Example:
      >>> print(listed(["text", "\x1b[31mlabel"]), listed("abcd", most=3))
      text, '\x1b[31mlabel' a, b, c and 1 more
    """
    names = list(names)
    is_plain = lambda name: name.isprintable() and 0 < len(name) <= _SHORT.maxstring
    shown = [name if is_plain(name) else brief(name) for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown) + more


def printable(text: str) -> str:
    r"""Returns a text whose control characters are spelled out, on lines as before.

    Example:
      >>> print(printable("a\x1b[2Jb"))
      a\x1b[2Jb
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def reason_of(error: BaseException) -> str:
    r"""Returns the message of an error of a library as one short line without a stop.

    Example:
      >>> print(reason_of(OSError("No such\n  file.")), reason_of(KeyError()))
      No such file KeyError
    """
    # An error of the system names its file too, which the message around it has.
    reason = error.strerror if isinstance(error, OSError) else None
    text = textwrap.shorten(printable(reason or str(error)), 200).rstrip(".")
    return text or type(error).__name__


def first_line(error: BaseException) -> str:
    r"""Returns the first line of the message of an error, without a stop.

    Example:
      >>> print(first_line(ValueError("No such topology.\nStack trace: ...")))
      No such topology
    """
    return str(error).strip().partition("\n")[0].rstrip(".")

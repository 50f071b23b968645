"""Signals that ask a run to stop."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import numpy as np

from sparse_jax.sharding.processes import of_all_processes

__all__ = ["StopSignals", "stop_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


class StopSignals:
    """Remembers that a run was asked to stop, until the run is ready for it.

    A second signal, and one that comes where nothing is left to save, stops at once.
    """

    def __init__(self):
        self._received, self._is_at_once = 0, False

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Takes a signal, as a handler of `signal.signal`."""
        del frame
        if self._received or self._is_at_once:
            _stop(number)
        self._received = number
        name = signal.Signals(number).name
        _log.warning(
            "%s: saving after this update; send it again to stop at once", name
        )

    def requested(self) -> int:
        """Returns the signal that any of the processes received, or 0."""
        # All of them save the same step: signals reach hosts at different times.
        return int(of_all_processes(np.asarray(self._received, np.int32)).max())

    def stop_if_requested(self) -> None:
        """Leaves the run if it was asked to stop; all it has is saved by now.

        Raises:
          KeyboardInterrupt: after SIGINT.
          SystemExit: with the exit code 143 after SIGTERM.
        """
        if number := self.requested():
            _stop(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets signals stop what changes nothing, such as an evaluation."""
        self.stop_if_requested()
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Yields the signals SIGINT and SIGTERM, which do not end the program meanwhile.

    Only the main thread may take signals: in any other one they act as before.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.receive) for number in _SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int) -> NoReturn:
    """Raises what a signal stands for."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)

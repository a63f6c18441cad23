"""SIGTERM and Ctrl-C: save and leave with a status that schedulers restart on."""

import contextlib
import signal
import types
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """Whether a signal asked the run to stop.

    Attributes:
      deferred: True while there is state to save: a signal is then noted and the loop stops at the next step's end.
        False: it ends the process at once, since nothing would be lost.
    """

    def __init__(self, exit_code: int):
        self.deferred = False
        self._exit_code, self._requested = exit_code, False

    def handle(self, signal_number: int, _: types.FrameType | None) -> None:
        """The signal handler."""
        if not self.deferred:
            raise SystemExit(self._exit_code)
        self._requested = True
        if signal_number == signal.SIGINT:  # a second Ctrl-C interrupts at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; every process must call this at the same step."""
        if jax.process_count() == 1:
            return self._requested
        return bool(np.any(multihost_utils.process_allgather(np.array(self._requested))))


@contextlib.contextmanager
def stop_requests(exit_code: int) -> Iterator[StopRequest]:
    """Turns SIGTERM and Ctrl-C into a `StopRequest` while the block runs."""
    request = StopRequest(exit_code)
    previous = {number: signal.signal(number, request.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

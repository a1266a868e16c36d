"""Stops a training after its current step when a signal asks for it."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Batch systems send SIGUSR1 or SIGUSR2 shortly before a job's time limit."""


class _StopAtOnce(BaseException):
    """Leaves Lightning's Trainer, which would end the process without a message on KeyboardInterrupt."""


class StopSignal:
    """A context in which a stop signal only sets `requested`. A second Ctrl-C raises KeyboardInterrupt(`remedy`).

    Outside the main thread the context has no effect, because Python allows signal handlers only in the main thread.
    """

    def __init__(self, remedy: str = "") -> None:
        """`remedy` is a sentence that tells the user how to resume. It is shown after the second Ctrl-C."""
        self.requested = False
        self._remedy = remedy
        self._handlers: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._set_requested) for number in STOP_SIGNALS}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, _StopAtOnce):
            raise KeyboardInterrupt(self._remedy) from None

    def _set_requested(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise _StopAtOnce
        if number == signal.SIGINT:  # not by `print`, which the signal may have interrupted
            os.write(2, b"\nlorasweep: stops after the current step; a second Ctrl-C stops at once\n")
        self.requested = True

"""Says what this process does now: `doing` names a piece of work, and an `Activity` counts how much of it is done.

The command line shows it while nothing else is printed (`console.show_heartbeat`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lorasweep.wording import format_seconds

MIN_PREDICTED_S = 2.0
"""The time left is estimated after this time in seconds, because the first step warms up."""


@dataclass(kw_only=True, eq=False)
class Activity:
    """A piece of work, and how much of it is done."""

    what: str
    """The name of the work, such as `scoring validation`."""
    unit: str = "step"
    total: int = 0
    """Number of steps or examples; 0 if it is not known."""
    first: int = 0
    """Number of steps or examples that were done before this run was resumed."""
    done: int = 0
    """Number of steps or examples that are done, including `first`."""
    began_s: float = field(default_factory=time.monotonic)

    def advance(self, number: int = 1) -> None:
        self.done += number

    def describe(self) -> str:
        """Returns `scoring test, example 24 of 200, about 1 min 28 s left`."""
        seconds, parts = time.monotonic() - self.began_s, [self.what] if self.what else []
        parts += [f"{self.unit} {self.done:,} of {self.total:,}"] if self.total else []
        if self.total and self.done > self.first and seconds >= MIN_PREDICTED_S:
            left_s = seconds * (self.total - self.done) / (self.done - self.first)
            parts.append(f"about {format_seconds(left_s)} left")
        return ", ".join(parts)


_STACK: list[Activity] = []
"""The activities of this process, each inside the one before."""


@contextmanager
def doing(what: str, *, unit: str = "step", total: int = 0, first: int = 0) -> Iterator[Activity]:
    """Names what this process does inside the block."""
    activity = Activity(what=what, unit=unit, total=total, first=first, done=first)
    _STACK.append(activity)
    try:
        yield activity
    finally:
        end_inner(activity)
        if activity in _STACK:
            _STACK.remove(activity)


def end_inner(activity: Activity) -> None:
    """Ends the activities that began inside this one, such as an iteration that was left early."""
    if activity in _STACK:
        del _STACK[_STACK.index(activity) + 1 :]


def describe_activity() -> str:
    """Returns what this process does now, the outermost activity first; empty if nothing is named."""
    activities = _STACK[:]  # a copy, because another thread may change the list
    outer = [activity.what for activity in activities[:-1]]
    return "; ".join(filter(None, [*outer, activities[-1].describe()])) if activities else ""


@contextmanager
def repeat_every(seconds: float, call: Callable[[], None], *, also_at_end: bool = False) -> Iterator[None]:
    """Calls a function in a thread every `seconds` while the block runs, and with `also_at_end` once after it."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            call()
        if also_at_end:
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

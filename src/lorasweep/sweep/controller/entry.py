"""One trial of an arm as the controller sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasweep.record import TrialState

LIVE: tuple[TrialState, ...] = ("running", "paused")


@dataclass(kw_only=True, eq=False)
class Entry:
    """One trial of an arm as the controller sees it."""

    number: int
    params: Mapping[str, Any]
    order: int
    """How many trials the controller had handed out before it last handed out this one."""
    passed: frozenset[int] = frozenset()
    """Rungs that it may go on beyond."""
    promoted: frozenset[int] = frozenset()
    """Those of `passed` at which it was paused before."""
    values: Mapping[int, float] = field(default_factory=dict)
    """Value of each evaluation by step, as the metric has it."""
    losses: Mapping[int, float] = field(default_factory=dict)
    """Validation loss at each rung, where rungs compare by it."""
    state: TrialState = "running"
    is_held: bool = False
    """Whether a worker trains it now."""
    worker: str = ""
    """Name of the worker that it was last handed out to; empty for the worker of the controller's process."""
    request: int = 0
    """Number of the worker's request that was answered with it."""

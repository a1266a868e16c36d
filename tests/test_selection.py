"""Which trial of an arm wins."""

from __future__ import annotations

import math

import pytest
from tests.test_record import make_sweep

from lorasweep.record import TrialRow
from lorasweep.selection import find_winner


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1), ("maximize", 3)])
def test_the_best_complete_trial_wins(direction, best):
    ended = [("complete", v) for v in (2.0, 1.0, 1.0, 3.0, 3.0, math.inf, -math.inf, None)]
    ended += [("pruned", 0.0), ("pruned", 9.0), ("failed", None)]
    rows = [
        TrialRow(arm="lora", number=n, state=state, params={}, value=value, run="r")
        for n, (state, value) in enumerate(ended)
    ]
    record = make_sweep(direction=direction)
    assert find_winner(rows[::-1], record=record).number == best  # the earliest of equals
    assert find_winner(rows[5:], record=record) is None

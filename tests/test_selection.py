"""Which trials are on the Pareto front, run again in the select stage, and win."""

from __future__ import annotations

import math

import pytest
from tests.test_record import make_sweep

from lorasweep.record import RerunRow, TrialRow
from lorasweep.selection import find_pareto_front, find_winner, list_candidates


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1), ("maximize", 3)])
def test_without_a_select_stage_the_best_trial_wins(direction, best):
    ended = [("complete", v) for v in (2.0, 1.0, 1.0, 3.0, 3.0, math.inf, -math.inf, None)]
    ended += [("pruned", 0.0), ("pruned", 9.0), ("failed", None)]
    rows = [
        TrialRow(arm="lora", number=n, state=state, params={}, value=value, run="r")
        for n, (state, value) in enumerate(ended)
    ]
    record = make_sweep(direction=direction)
    assert find_winner("lora", rows[::-1], record=record).number == best  # the earliest of equals
    assert find_winner("lora", rows[5:], record=record) is None


def test_candidates_have_different_settings_whatever_their_seeds():
    values = [(1, 0, 3.0), (1, 9, 1.0), (2, 0, 2.0), (4, 0, 1.5), (8, 0, 9.0)]
    rows = [
        TrialRow(arm="a", number=n, state="complete", params={"rank": rank, "seed": seed}, value=value, run="r")
        for n, (rank, seed, value) in enumerate(values)
    ]
    assert [row.number for row in list_candidates(rows, record=make_sweep(candidates=3))] == [1, 3, 2]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({0: [2.0, 4.0], 1: [2.5, 2.5], 2: [9.0, 9.0]}, 1),
        ({0: [2.0, 2.0], 1: [2.0, 2.0], 2: [2.0, 2.0]}, 0),  # of equals the best of the search
        ({0: [1.0, None], 1: [3.0, 3.0], 2: [1.0, math.nan]}, 1),  # a failed run comes after all
        ({0: [None, None], 1: [None, None], 2: [None, None]}, 0),
        ({0: [2.0, 2.0], 1: [1.0]}, 0),  # the stage is not over
    ],
)
def test_the_winner_has_the_best_mean_over_the_select_seeds(scores, best):
    trials = [TrialRow(arm="a", number=n, state="complete", params={"x": n}, value=n, run="r") for n in range(5)]
    select = [
        RerunRow(
            arm="a",
            trial=number,
            stage="select",
            seed=seed,
            state="failed" if value is None else "complete",
            run="r",
            value=value,
        )
        for number, values in scores.items()
        for seed, value in enumerate(values)
    ]
    record = make_sweep(candidates=3, select_seeds=[0, 1], select=select)
    assert find_winner("a", trials, record=record).number == best


def test_the_front_has_what_nothing_beats():
    points = [(2.0, 1.0), (1.0, 3.0), (1.0, 2.0), (3.0, 1.0), (2.0, 1.0), (1.5, 2.5)]
    assert find_pareto_front(enumerate(points), costs=lambda item: item[1]) == [(2, (1.0, 2.0)), (0, (2.0, 1.0))]

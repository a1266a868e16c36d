"""A rule says how many of the best trials at a rung may go on."""

from __future__ import annotations

import pytest

from lorasweep.sweep.controller.stopping_rules import Halving, StoppingRule


def ranked(*values, losses=None):
    losses = losses or [0.0] * len(values)
    return sorted((value, loss, number) for number, (value, loss) in enumerate(zip(values, losses, strict=True)))


def test_without_a_rule_all_go_on():
    assert StoppingRule().count_kept(ranked(3.0, 1.0, 2.0), all_arrived=False) == 3


@pytest.mark.parametrize(
    ("count", "all_arrived", "expected"),
    [(1, False, 0), (2, False, 0), (3, False, 1), (8, False, 2), (8, True, 3), (1, True, 1), (9, True, 3)],
)
def test_halving_lets_one_in_three_go_on_and_rounds_up_once_all_have_arrived(count, all_arrived, expected):
    rule = Halving(rungs=(20,), reduction_factor=3)
    assert rule.count_kept(ranked(*range(count)), all_arrived=all_arrived) == expected


@pytest.mark.parametrize(("count", "expected"), [(2, 2), (8, 4), (16, 4), (24, 6)])
def test_so_many_survive_at_least_once_all_have_arrived(count, expected):
    rule = Halving(rungs=(20,), reduction_factor=4, min_survivors=4)
    assert rule.count_kept(ranked(*range(count)), all_arrived=True) == expected
    assert rule.count_kept(ranked(*range(count)), all_arrived=False) == count // 4

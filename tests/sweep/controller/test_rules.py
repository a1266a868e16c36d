"""A rule is a function of values and trial numbers: order of arrival changes nothing."""

from __future__ import annotations

import itertools

import pytest

from lorasweep.sweep.controller.rules import Halving, MedianOfPeers, NoStopping

VALUES = {0: 1.5, 1: 1.2, 2: 1.9, 3: 1.2, 4: 1.1, 5: 1.7, 6: 1.3, 7: 1.6}
RULES = [
    NoStopping(),
    Halving(rungs=(20,), reduction_factor=3),
    Halving(rungs=(20,), reduction_factor=2),
    MedianOfPeers(rungs=(20,), min_trials=4),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("all_arrived", [True, False])
def test_the_order_in_which_values_arrive_changes_nothing(rule, all_arrived):
    whole = rule.better_part(20, VALUES, all_arrived=all_arrived)
    for order in itertools.islice(itertools.permutations(VALUES), 0, 40320, 997):
        assert rule.better_part(20, {n: VALUES[n] for n in order}, all_arrived=all_arrived) == whole


@pytest.mark.parametrize(
    ("count", "all_arrived", "expected"),
    [(1, False, 0), (2, False, 0), (3, False, 1), (8, False, 2), (8, True, 3), (1, True, 1), (9, True, 3)],
)
def test_halving_lets_one_in_three_go_on_and_rounds_up_once_all_have_arrived(count, all_arrived, expected):
    rule = Halving(rungs=(20,), reduction_factor=3)
    values = {number: float(number) for number in range(count)}
    assert rule.better_part(20, values, all_arrived=all_arrived) == frozenset(range(expected))


@pytest.mark.parametrize(("count", "expected"), [(2, 2), (8, 4), (16, 4), (24, 6)])
def test_so_many_survive_at_least_once_all_have_arrived(count, expected):
    rule = Halving(rungs=(20,), reduction_factor=4, min_survivors=4)
    values = {number: float(number) for number in range(count)}
    assert rule.better_part(20, values, all_arrived=True) == frozenset(range(expected))
    assert rule.better_part(20, values, all_arrived=False) == frozenset(range(count // 4))


def test_of_equal_values_the_earlier_trial_is_better():
    rule = Halving(rungs=(20,), reduction_factor=2)
    assert rule.better_part(20, {3: 1.0, 1: 1.0, 2: 1.0, 0: 2.0}, all_arrived=False) == {1, 2}


def test_a_trial_that_was_outside_comes_into_the_better_part_when_worse_ones_arrive():
    rule = Halving(rungs=(20,), reduction_factor=3)
    before = {0: 1.0, 1: 1.1, 2: 1.3}
    assert rule.better_part(20, before, all_arrived=False) == {0}
    assert rule.better_part(20, before | {3: 2.0, 4: 2.1, 5: 2.2}, all_arrived=False) == {0, 1}


def test_the_median_is_that_of_all_peers_and_waits_for_enough_of_them():
    rule = MedianOfPeers(rungs=(20,), min_trials=4)
    assert rule.better_part(20, {0: 1.0, 1: 2.0, 2: 3.0}, all_arrived=False) == frozenset()
    assert rule.better_part(20, {0: 1.0, 1: 2.0, 2: 3.0}, all_arrived=True) == {0, 1}
    assert rule.better_part(20, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, all_arrived=False) == {0, 1}

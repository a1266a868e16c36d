"""Decisions from the sorted tables are those of a comparison of all trials."""

from __future__ import annotations

import random

import pytest

from lorasweep.sweep.controller.rung_tables import RungTables
from lorasweep.sweep.controller.stopping_rules import Halving, RungOrder
from lorasweep.sweep.controller.trial import Trial

RUNGS = (2, 4, 6)


def find_better_parts(rule, trials, *, order, all_begun):
    """The trials that may train beyond each rung, best first: the definition, which reads every trial."""
    better = {}
    for rung in rule.rungs:  # ascending: whether a trial can still arrive depends on the lower rungs
        arrived = [trial for trial in trials if rung in trial.values and trial.state not in ("failed", "infeasible")]
        ranked = sorted(order.get_row(trial, rung) for trial in arrived)
        all_arrived = all_begun and not any(can_arrive(trial, rung, better) for trial in trials)
        better[rung] = [number for *_, number in ranked[: rule.count_kept(ranked, all_arrived=all_arrived)]]
    return better


def can_arrive(trial, rung, better):
    """Whether a trial trains towards a rung, or waits in the better part of a lower one."""
    if not trial.is_live or rung in trial.values:
        return False
    waits_at = next((lower for lower in better if lower in trial.values and lower not in trial.passed), None)
    return waits_at is None or trial.number in better[waits_at]


def change_one(trials, drawn):
    """Changes a trial as the controller may: begin, report, pass a rung, pause, resume or end."""
    trial = drawn.choice(list(trials.values()))
    if not trial.is_live or drawn.random() < 0.1:
        trial = Trial(number=len(trials), params={}, order=len(trials))
        trials[trial.number] = trial
        return trial, {}
    reached = max(trial.values, default=0)
    kind = drawn.choice(["report", "report", "pass", "pause", "end"])
    if kind == "report":
        value, loss = (drawn.choice([0.5, 1.0, drawn.random(), float("nan")]) for _ in range(2))
        losses = drawn.choice([{**trial.losses, reached + 1: loss}, trial.losses])
        return trial, {"values": {**trial.values, reached + 1: value}, "losses": losses}
    if kind == "pass" and reached in RUNGS:
        return trial, {"passed": trial.passed | {reached}, "state": "running"}
    if kind == "pause" and reached in RUNGS:
        return trial, {"state": "paused"}
    if kind == "end":
        return trial, {"state": drawn.choice(["complete", "failed", "infeasible", "pruned"])}
    return trial, {}


@pytest.mark.parametrize(
    "order",
    [RungOrder(sign=1), RungOrder(sign=-1, constant_answer=0.5), RungOrder(sign=1, by_loss=True)],
    ids=["minimize", "constant answer", "by loss"],
)
@pytest.mark.parametrize(
    "rule",
    [Halving(rungs=RUNGS, reduction_factor=2, min_survivors=2), Halving(rungs=RUNGS, reduction_factor=3)],
    ids=["half", "third"],
)
def test_tables_decide_as_a_comparison_of_all_trials(rule, order):
    for seed in range(15):
        drawn = random.Random(seed)
        trials = {0: Trial(number=0, params={}, order=0)}
        tables = RungTables(rule, trials, order=order)
        tables.update_rows(set(), tables.list_rows(trials[0]))
        for turn in range(120):
            known = set(trials)
            trial, changes = change_one(trials, drawn)
            before = tables.list_rows(trial) if trial.number in known else set()
            for name, value in changes.items():
                setattr(trial, name, value)
            tables.update_rows(before, tables.list_rows(trial))
            all_begun = turn > 80
            better = find_better_parts(rule, trials.values(), order=order, all_begun=all_begun)
            for rung in RUNGS:
                reached = [each for each in trials.values() if rung in each.values]
                found = {each.number for each in reached if tables.may_train_beyond(each, rung, all_begun=all_begun)}
                assert found == set(better[rung])
            promoted = next(
                (
                    (number, rung)
                    for rung in reversed(RUNGS)
                    for number in better[rung]
                    if trials[number].state == "paused" and rung not in trials[number].passed
                ),
                None,
            )
            found = tables.next_promoted(all_begun=all_begun)
            assert promoted == (None if found is None else (found[0].number, found[1]))


def rank(order, trials):
    """The numbers of the trials, best first."""
    return [number for *_, number in sorted(order.get_row(trial, 2) for trial in trials)]


def reported(number, value, loss):
    losses = {} if loss is None else {2: loss}
    return Trial(number=number, params={}, order=number, values={2: value}, losses=losses)


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_equal_values_are_ordered_by_loss_whatever_the_numbers_are(numbers):
    best, second, third, last = numbers
    trials = [
        reported(best, 0.9, 5.0),
        reported(second, 0.8, 0.1),
        reported(third, 0.8, 0.2),
        reported(last, 0.8, float("nan")),
    ]
    assert rank(RungOrder(sign=-1), trials) == [best, second, third, last]


def test_the_number_only_breaks_exact_ties_of_value_and_loss():
    trials = [reported(2, 0.8, 0.1), reported(1, 0.8, 0.1), reported(3, 0.8, None), reported(0, 0.8, None)]
    assert rank(RungOrder(sign=-1), trials) == [1, 2, 0, 3]


@pytest.mark.parametrize("sign", [1, -1])
def test_trials_no_better_than_the_constant_answer_are_ordered_by_loss(sign):
    order = RungOrder(sign=sign, constant_answer=sign * 0.5)
    trials = [
        reported(0, sign * 0.50, 0.7),
        reported(1, sign * 0.60, 0.6),  # worse than the constant answer
        reported(2, sign * 0.49, 9.0),  # better
        reported(3, sign * 0.55, None),
        reported(4, float("nan"), 0.1),
    ]
    assert rank(order, trials) == [2, 1, 0, 3, 4]

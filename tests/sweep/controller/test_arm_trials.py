"""Which trials may train beyond a rung, and how a rung orders trials."""

import math
import random

import optuna
import pytest
from optuna.distributions import FloatDistribution
from tests.sweep.controller.conftest import make_arm, make_trial

from lorasweep.config.sweep import SobolSampler
from lorasweep.record import Trial
from lorasweep.sweep.controller.arm_trials import ArmTrials, Halving, RungOrder, StoppingRule

RUNGS = (2, 4, 6)
SPACE = {"optim.lr": FloatDistribution(0, 1)}


def build_arm_trials(rule, order, *, planned):
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), study_name="lora")
    return open_arm_trials(study, rule, order, planned=planned)


def open_arm_trials(study, rule, order, *, planned):
    return ArmTrials(
        make_arm(SPACE, SobolSampler(name="qmc")),
        study=study,
        storage=study._storage,
        space=SPACE,
        build_trial=lambda number, params: Trial(arm="lora", number=number, params=dict(params), run=""),
        planned=planned,
        order=order,
        rule=rule,
    )


def list_better(rule, trials, *, order, all_begun):
    """The trials that may train beyond each rung, best first: the definition, which compares all trials each time."""
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


@pytest.mark.parametrize(
    "order",
    [RungOrder(direction="minimize"), RungOrder(direction="maximize", constant_answer=0.5)],
    ids=["minimize", "constant answer"],
)
@pytest.mark.parametrize(
    "rule",
    [Halving(rungs=RUNGS, reduction_factor=2, min_survivors=2), Halving(rungs=RUNGS, reduction_factor=3)],
    ids=["half", "third"],
)
@pytest.mark.parametrize("seed", range(5))
def test_decisions_are_those_of_a_comparison_of_all_trials(rule, order, seed):
    drawn = random.Random(seed)
    trials = build_arm_trials(rule, order, planned=12)

    def compare():
        better = list_better(rule, trials.trials.values(), order=order, all_begun=trials.num_left <= 0)
        waiting = [
            (number, rung)
            for rung in reversed(RUNGS)
            for number in better[rung]
            if trials.trials[number].state == "paused" and rung not in trials.trials[number].passed
        ]
        promoted = trials.next_promoted()
        assert (promoted and (promoted[0].number, promoted[1])) == next(iter(waiting), None)
        return better

    for turn in range(150):
        compare()
        running = trials.list_in_state("running")
        if trials.may_begin() and (not running or drawn.random() < 0.3):
            trials.begin({"optim.lr": 0.5}, order=turn)
        elif (promoted := trials.next_promoted()) and drawn.random() < 0.5:
            trials.promote(*promoted, order=turn)
        elif running:
            trial = drawn.choice(running)
            step = trial.step + 1
            if drawn.random() < 0.05:
                trials.end(trial, drawn.choice(["failed", "infeasible"]))
                continue
            value, loss = (drawn.choice([0.5, 1.0, drawn.random(), math.nan]) for _ in range(2))
            trials.store(trial, step, value, loss=drawn.choice([loss, None]))
            expected = step not in RUNGS or trial.number in compare()[step]
            assert trials.decide(trial, step) == expected
            if not expected:
                trials.pause(trial, step=step)
            elif step == 8:
                trials.end(trial, "complete", value=0.5)
    assert {trial.state for trial in trials.trials.values()} >= {"complete", "paused"}
    again = open_arm_trials(trials.study, rule, order, planned=12)
    assert repr(list(again.trials.values())) == repr(list(trials.trials.values()))
    assert (again.next_promoted() is None) == (trials.next_promoted() is None)


def rank(order, trials):
    """The numbers of the trials, best first."""
    return [number for *_, number in sorted(order.get_row(trial, 2) for trial in trials)]


def reported(number, value, loss):
    trial = make_trial({}, values={2: value}, losses={} if loss is None else {2: loss})
    trial.number = number
    return trial


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_equal_values_are_ordered_by_loss_whatever_the_numbers_are(numbers):
    best, second, third, last = numbers
    trials = [
        reported(best, 0.9, 5.0),
        reported(second, 0.8, 0.1),
        reported(third, 0.8, 0.2),
        reported(last, 0.8, math.nan),
    ]
    assert rank(RungOrder(direction="maximize"), trials) == [best, second, third, last]


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_trials_no_better_than_the_constant_answer_are_ordered_by_loss(direction, sign):
    order = RungOrder(direction=direction, constant_answer=sign * 0.5)
    trials = [
        reported(0, sign * 0.50, 0.7),
        reported(1, sign * 0.60, 0.6),  # worse than the constant answer
        reported(2, sign * 0.49, 9.0),  # better
        reported(3, sign * 0.55, None),
        reported(4, math.nan, 0.1),
    ]
    assert rank(order, trials) == [2, 1, 0, 3, 4]


def rows(count):
    return [(float(number), 0.0, number) for number in range(count)]


@pytest.mark.parametrize(
    ("rule", "count", "before", "after"),
    [
        (StoppingRule(), 3, 3, 3),
        *((Halving(rungs=(20,), reduction_factor=3), *counts) for counts in [(1, 0, 1), (3, 1, 1), (8, 2, 3)]),
        *(
            (Halving(rungs=(20,), reduction_factor=4, min_survivors=4), *counts)
            for counts in [(2, 0, 2), (8, 2, 4), (24, 6, 6)]
        ),
    ],
)
def test_a_rule_keeps_more_once_all_trials_have_arrived(rule, count, before, after):
    assert rule.count_kept(rows(count), all_arrived=False) == before
    assert rule.count_kept(rows(count), all_arrived=True) == after

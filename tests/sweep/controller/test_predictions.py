"""One search for every rank: values share trials evenly, and the best setting of each is found, tried or not."""

import math
import random
import statistics
from collections import Counter

import numpy as np
import pytest
from tests.sweep.controller.conftest import ask_for_proposal, make_arm, make_trial, number_trials

from lorasweep.config.data import ScoreMetric
from lorasweep.config.sweep import NamedSampler
from lorasweep.sweep.controller.predictions import fit_surrogate, predict_best
from lorasweep.sweep.definition.ranges import Range

RANKS = [1, 4, 16, 64]
GP = NamedSampler(name="gp")
BEST_U = 4e-3
LR = Range(low=1e-4, high=1e-2, log=True)
SPACE = {"method.rank": Range(choices=RANKS), "optim.lr": LR}
WITH_ALPHA = SPACE | {
    "method.alpha": Range(choices=[0.5, 1, 2]),
    "method.scaling": Range(choices=["alpha"]),
}
BASE = 2.4
"""The score of the frozen base, at which trials are stopped."""


def get_alpha(params):
    return params["method.alpha"] * params["method.rank"] if "method.alpha" in params else 16


def cost(params):
    """A loss that follows the rate law: quadratic in log u, and a little lower at higher ranks."""
    u = params["optim.lr"] * math.sqrt(get_alpha(params))
    return 2 + 0.1 * math.log(u / BEST_U) ** 2 - 0.01 * math.log2(params["method.rank"])


def find_best_rate(params):
    return min(max(BEST_U / math.sqrt(get_alpha(params)), LR.low), LR.high)


def build_arm(space=SPACE, *, trials=12, seed=0):
    return make_arm(space, GP, trials=trials, seed=seed, confirm_each="method.rank")


def make(params, *, value=None, base=math.inf):
    value = cost(params) if value is None else value
    if value >= base:
        return make_trial(params, state="stopped", values={75: value})
    return make_trial(params, search_score=value)


def search(arm, *, num, base=math.inf):
    """An arm of which each trial ends before the next begins, and is stopped if it is no better than the base."""
    history = []
    for number in range(num):
        history.append(make(ask_for_proposal(arm, history, number=number), base=base))
    return number_trials(history)


def predict(arm, trials, rank, *, direction="minimize"):
    return predict_best(arm, trials, get_subject(arm, rank), metric=ScoreMetric(name="unbounded", direction=direction))


def get_subject(arm, value):
    return next(subject for subject in arm.subjects if subject.value == value)


@pytest.mark.parametrize("space", [SPACE, WITH_ALPHA], ids=["one α", "several α/r"])
def test_the_best_rate_of_every_rank_is_found_from_twelve_trials_of_which_some_are_stopped(space):
    errors, states = [], set()
    for seed in range(5):
        arm = build_arm(space, seed=seed)
        trials = search(arm, num=12, base=BASE)
        states |= {trial.state for trial in trials}
        for rank in RANKS:
            found = predict(arm, trials, rank)
            assert found.params["method.rank"] == rank
            errors.append(abs(math.log(found.params["optim.lr"] / find_best_rate(found.params))))
    assert states == {"complete", "stopped"}
    assert statistics.median(errors) < math.log(1.15)
    assert max(errors) < math.log(1.4)  # which costs 2 % of what a rate at the end of the range costs


def test_higher_scores_may_be_better():
    arm = build_arm()
    trials = search(arm, num=12)
    mirrored = number_trials([make(trial.params, value=-trial.search_score) for trial in trials])
    for rank in RANKS:
        found, other = predict(arm, trials, rank), predict(arm, mirrored, rank, direction="maximize")
        assert other.params == found.params
        assert other.score == pytest.approx(-found.score)
        assert other.regret == pytest.approx(found.regret)


def test_equal_predictions_keep_a_tried_trial():
    arm = build_arm()
    trials = number_trials([make(trial.params, value=1.0) for trial in search(arm, num=8)])
    for rank in RANKS:
        found = predict(arm, trials, rank)
        assert found.trial == min(trial.number for trial in trials if trial.params["method.rank"] == rank)


def test_a_predicted_accuracy_is_at_most_1():
    arm, metric = build_arm(), ScoreMetric(name="accuracy", direction="maximize")
    trials = number_trials([make(trial.params, value=1.01) for trial in search(arm, num=8)])
    assert predict_best(arm, trials, get_subject(arm, RANKS[0]), metric=metric).score == 1.0


def test_an_accuracy_at_its_ceiling_leaves_no_hope_of_much_more():
    """Three quarters of the trials have the highest accuracy that wrong labels allow, the coldest ones less."""
    arm, step = build_arm(), 1 / 90
    drawn = sorted((trial.params for trial in search(arm, num=16)), key=lambda params: params["optim.lr"])
    scores = [0.47, 0.58, 0.58 + step, 0.7, *[0.8] * 12]
    trials = number_trials([make(params, value=value) for params, value in zip(drawn, scores, strict=True)])
    assert all(predict(arm, trials, rank, direction="maximize").regret < 2 * step for rank in RANKS)
    # where the best score is reached once, as much as before may be missing
    unlike = number_trials([make(params, value=0.4 + 0.025 * n) for n, params in enumerate(drawn)])
    assert any(predict(arm, unlike, rank, direction="maximize").regret > 2 * step for rank in RANKS)


def test_the_regret_is_never_negative_and_shrinks_with_more_trials():
    arm = build_arm(trials=32)
    trials = search(arm, num=32)
    regrets = [sum(predict(arm, trials[:num], rank).regret for rank in RANKS) for num in (4, 8, 32)]
    assert regrets[0] > regrets[1] > regrets[2] >= 0


def test_a_prediction_is_tried_or_near_a_trial_and_depends_on_no_order():
    arm = build_arm()
    trials = search(arm, num=12, base=BASE)
    shuffled = trials[:]
    random.Random(0).shuffle(shuffled)
    for rank in RANKS:
        first, second = predict(arm, trials, rank), predict(arm, shuffled, rank)
        assert second.params == first.params
        assert second.score == pytest.approx(first.score)  # sums in another order
        if first.trial is not None:
            assert trials[first.trial].params == first.params


def test_a_value_without_a_result_has_no_prediction():
    arm = build_arm()
    trials = [
        make_trial(trial.params, state="infeasible") if trial.params["method.rank"] == 64 else trial
        for trial in search(arm, num=12)
    ]
    assert predict(arm, number_trials(trials), 64) is None
    assert predict(arm, number_trials(trials), 16) is not None
    for state in ("running", "failed", "stopped"):
        trial = make_trial({"method.rank": 4, "optim.lr": 1e-3}, state=state)
        assert predict(arm, number_trials([trial]), 4) is None


def test_trials_that_begin_together_differ():
    arm = build_arm(trials=24)
    history = search(arm, num=8)
    for _ in range(8):
        params = ask_for_proposal(arm, history, number=len(history))
        history.append(make_trial(params, state="running"))
    together = [trial.params for trial in history[8:]]
    assert Counter(params["method.rank"] for params in together) == dict.fromkeys(RANKS, 2)
    for rank in RANKS:
        rates = [params["optim.lr"] for params in together if params["method.rank"] == rank]
        assert abs(math.log(rates[0] / rates[1])) > math.log(1.02)


def test_values_that_are_no_numbers_are_searched_too():
    space = {"method.targets": Range(choices=["mlp", "attention", "all-linear"]), "optim.lr": LR}
    arm = make_arm(space, GP, trials=9, confirm_each="method.targets")
    history, targets = [], [subject.value for subject in arm.subjects]
    for number in range(9):
        params = ask_for_proposal(arm, history, number=number)
        value = 2 + math.log(params["optim.lr"] / 1e-3) ** 2
        history.append(make_trial(params, search_score=value))
    assert Counter(trial.params["method.targets"] for trial in history) == dict.fromkeys(targets, 3)
    for target in targets:
        found = predict(arm, number_trials(history), target)
        assert found.params["method.targets"] == target
        assert abs(math.log(found.params["optim.lr"] / 1e-3)) < math.log(1.5)


def test_a_tried_setting_wins_if_most_trials_have_the_best_score():
    """The scores of most trials are equal and best, such as those of the constant answer of small data."""
    points, costs = np.array([[0.0], [1.5], [3.0]]), [-0.39, -0.59, -0.59]
    mean, _ = fit_surrogate(points, costs).predict(points)
    assert mean[0] > max(mean[1:])

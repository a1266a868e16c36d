"""The replay of stopping rules: it decides as the controller does, whatever the order of slots."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from tests.sweep.controller.conftest import make_arm

from lorasweep.config.sweep import FixedSampler
from lorasweep.record import Trial
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.stopping_rules import RungOrder

FILE = Path(__file__).parents[2] / "benchmarks" / "bench_stopping.py"


@pytest.fixture(scope="module")
def inputs():
    spec = importlib.util.spec_from_file_location("bench_stopping", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def halving(inputs, *rungs):
    return inputs.rules.Halving(rungs=rungs, reduction_factor=2)


def arm(inputs, values, rule, *, first_part=None, fails_at=None, **settings):
    """An arm whose trials have the same value at every rung."""
    by_rung = [dict.fromkeys(rule.rungs, value) for value in values]
    fails_at = fails_at or [None] * len(values)
    return inputs.Arm(by_rung, fails_at, rule, first_part=first_part or len(values), **settings)


def test_without_a_rule_every_trial_is_complete(inputs):
    outcome = arm(inputs, [3.0, 1.0, 2.0], inputs.rules.StoppingRule()).run()
    assert outcome.steps == 3 * inputs.LAST
    assert outcome.complete == (0, 1, 2)


def test_a_branch_is_counted_at_every_rung_that_a_trial_reaches(inputs):
    outcome = arm(inputs, [1.0, 2.0], halving(inputs, 2, 4), branch_steps=1).run()
    assert outcome.steps == (12 + 2) + (2 + 1)


def random_arm(inputs, seed, rule):
    """An arm of random values with ties, some trials of which fail, and the rest of its settings."""
    draw = random.Random(seed)
    n = draw.choice([3, 8, 16, 20])
    values = [{rung: draw.choice(range(10)) + rung for rung in rule.rungs} for _ in range(n)]
    fails_at = [draw.randint(1, inputs.LAST) if draw.random() < 0.1 else None for _ in range(n)]
    return inputs.Arm(values, fails_at, rule, first_part=draw.choice([n, math.ceil(n / 2)]))


def rules_of(inputs):
    return [
        halving(inputs, 2, 4, 6, 8),
        inputs.rules.Halving(rungs=(2, 6), reduction_factor=3, min_survivors=3),
        inputs.MedianOfPeers(rungs=(2, 4, 8), min_trials=4),
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_order_of_slots_changes_nothing(inputs, seed):
    for rule in rules_of(inputs):
        straight = random_arm(inputs, seed, rule).run()
        assert random_arm(inputs, seed, rule).run(shuffle=random.Random(seed).shuffle) == straight
        assert straight.complete or not any(f is None for f in random_arm(inputs, seed, rule).fails_at)


def run_by_controller(inputs, arm):
    """Steps and complete trials where the controller's own `ArmTrials` decides what the replay decides."""
    storage = optuna.storages.InMemoryStorage()
    trials = ArmTrials(
        make_arm({"optim.lr": FloatDistribution(0, 1)}, FixedSampler(name="random")),
        study=optuna.create_study(storage=storage, study_name="lora"),
        storage=storage,
        space={"optim.lr": FloatDistribution(0, 1)},
        build_trial=lambda number, params: Trial(arm="lora", number=number, params=dict(params), run=""),
        planned=len(arm.values),
        order=RungOrder(direction="minimize"),
        rule=arm.rule,
        first_trials=arm.first_part,
    )
    done, pack, order = {}, [], 0
    while True:
        while len(pack) < inputs.NUM_SLOTS:
            order += 1
            if (promoted := trials.next_promoted()) is not None:
                trials.promote(*promoted, order=order)
                pack.append(promoted[0])
            elif trials.may_begin():
                pack.append(trials.begin({"optim.lr": 0.5}, order=order))
            else:
                break
        if not pack:
            break
        for entry in pack:
            done[entry.number] = done.get(entry.number, 0) + 1
            if done[entry.number] == arm.fails_at[entry.number]:
                trials.end(entry, "failed")
        pack = [entry for entry in pack if entry.state == "running"]
        for entry in pack:
            step = done[entry.number]
            trials.store(entry, step, arm.values[entry.number].get(step, 0.0))
        for entry in sorted(pack, key=lambda entry: (done[entry.number], entry.number)):
            goes_on = trials.decide(entry, done[entry.number])
            if done[entry.number] == inputs.LAST:
                trials.end(entry, "complete", value=1.0)
            elif not goes_on:
                trials.pause(entry, step=done[entry.number])
        pack = [entry for entry in pack if entry.state == "running"]
    complete = tuple(number for number, entry in sorted(trials.trials.items()) if entry.state == "complete")
    return inputs.Outcome(steps=sum(done.values()), complete=complete)


@pytest.mark.parametrize("seed", range(6))
def test_the_replay_decides_as_the_controller(inputs, seed):
    for rule in rules_of(inputs):
        assert random_arm(inputs, seed, rule).run() == run_by_controller(inputs, random_arm(inputs, seed, rule))


def test_the_extrapolation_of_a_curve_lies_below_what_is_known_of_it_and_is_surer_later(inputs):
    curve = {t: 1 + t**-0.5 for t in range(1, inputs.LAST + 1)}
    errors, spreads = [], []
    for rung in (2, 4, 8):
        mean, variance = inputs.extrapolate(range(1, rung + 1), [curve[t] for t in range(1, rung + 1)])
        assert mean < curve[rung]
        errors.append(abs(mean - curve[inputs.LAST]))
        spreads.append(variance)
    assert errors == sorted(errors, reverse=True)
    assert spreads == sorted(spreads, reverse=True)


def row(trial, evaluation, value, *, seed=0):
    return {"task": "t", "seed": str(seed), "trial": str(trial), "evaluation": str(evaluation), "value": str(value)}


def test_the_gain_is_that_of_the_best_trial_over_the_frozen_base(inputs):
    rows = [row(-1, 0, 2.0), row(0, 12, 1.0), row(1, 12, 1.5), row(2, 12, "nan")]
    assert inputs.measure_gain(rows, "t") == pytest.approx(1.0)


def test_seed_noise_leaves_out_what_a_seed_does_to_all_settings(inputs):
    finals = {0: [1.0, 1.1, 9, 9, 9, 9], 1: [1.5, 1.6, 9, 9, 9, 9], 2: [1.0, 1.16, 9, 9, 9, 9]}
    rows = {("curves", "t", seed): [row(n, 12, value) for n, value in enumerate(of)] for seed, of in finals.items()}
    # Of the best third, settings 0 and 1, the differences are 0.1, 0.1 and 0.16: half their spread around 0.12 each.
    assert inputs.measure_noise(rows)["t"] == pytest.approx(math.sqrt((0.02**2 + 0.02**2 + 0.04**2) / 2 / 2))


def result(inputs, name, *, steps, loss):
    tally = inputs.Tally(steps=[steps] * 20, losses=[loss] * 20, hits=[True] * 20)
    return inputs.Result(
        candidate=inputs.Candidate(name=name, rule=inputs.rules.StoppingRule()),
        tallies={n: {"t": tally} for n in inputs.BOUNDS},
    )


def test_the_default_is_the_cheapest_that_keeps_the_bounds_else_the_losses(inputs):
    cheap = result(inputs, "cheap", steps=0.2, loss=0.03)
    good, better = result(inputs, "good", steps=0.39, loss=0.004), result(inputs, "better", steps=0.35, loss=0.004)
    dear = result(inputs, "dear", steps=0.7, loss=0.0)
    assert inputs.choose_rule([dear, cheap, good, better], ["t"]) == (better, True)
    dearer = result(inputs, "dearer", steps=0.9, loss=0.0)
    assert inputs.choose_rule([dearer, cheap, dear], ["t"]) == (dear, False)

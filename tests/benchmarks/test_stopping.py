"""The replay of stopping rules decides as the controller does, whatever the order of slots."""

import importlib.util
import math
import random
import sys
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from tests.sweep.controller.conftest import make_arm

from lorasweep.config.sweep import SobolSampler
from lorasweep.record import Trial
from lorasweep.sweep.controller.arm_trials import ArmTrials, Halving, RungOrder

FILE = Path(__file__).parents[2] / "benchmarks" / "bench_stopping.py"
RULES = [
    Halving(rungs=(2, 4, 6, 8), reduction_factor=2),
    Halving(rungs=(2, 6), reduction_factor=3, min_survivors=3),
]


@pytest.fixture(scope="module")
def inputs():
    spec = importlib.util.spec_from_file_location("bench_stopping", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def random_arm(inputs, seed, rule):
    """An arm of random values with ties, some trials of which fail, and the rest of its settings."""
    draw = random.Random(seed)
    n = draw.choice([3, 8, 16, 20])
    values = [{rung: draw.choice(range(10)) + rung for rung in rule.rungs} for _ in range(n)]
    fails_at = [draw.randint(1, inputs.LAST) if draw.random() < 0.1 else None for _ in range(n)]
    return inputs.Arm(values, fails_at, rule, first_part=draw.choice([n, math.ceil(n / 2)]))


def run_by_controller(inputs, arm):
    """Steps and complete trials where the controller's own `ArmTrials` decides what the replay decides."""
    storage = optuna.storages.InMemoryStorage()
    trials = ArmTrials(
        make_arm({"optim.lr": FloatDistribution(0, 1)}, SobolSampler(name="qmc")),
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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(6))
def test_the_replay_decides_as_the_controller(inputs, seed, rule):
    straight = random_arm(inputs, seed, rule).run()
    assert straight == run_by_controller(inputs, random_arm(inputs, seed, rule))
    assert random_arm(inputs, seed, rule).run(shuffle=random.Random(seed).shuffle) == straight

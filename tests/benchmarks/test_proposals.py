"""The replay of samplers: it asks the product's `propose` in the worker's order, and the same seed gives the same."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest

from lorasweep.sweep.controller import proposals

FILE = Path(__file__).parents[2] / "benchmarks" / "bench_proposals.py"


@pytest.fixture(scope="module")
def inputs():
    spec = importlib.util.spec_from_file_location("bench_proposals", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield module
    optuna.logging.set_verbosity(verbosity)
    del sys.modules[spec.name]


@pytest.fixture
def table(inputs):
    """Two ranks and one α/r; the frozen base has 2, the best is 1."""
    rates = np.log([1e-3, 1e-2, 1e-1])
    lines = {(1.0, 1.0): (rates, np.array([1.9, 1.5, 1.8])), (2.0, 1.0): (rates, np.array([1.8, 1.0, 30.0]))}
    return inputs.Table(name="made up", lines=lines, frozen=2.0)


def test_a_learning_rate_between_two_points_is_read_off_the_line_between_them(inputs, table):
    params = {inputs.RANK: 1.0, inputs.RATIO: 1.0, inputs.LR: math.sqrt(1e-3 * 1e-2)}
    assert table.read(params) == pytest.approx(1.7)
    assert table.regret(1.7) == pytest.approx(0.7)
    assert table.read({**params, inputs.RANK: "1.0", inputs.LR: 1e-1}) == pytest.approx(1.8)


def test_the_same_seed_gives_the_same_table(inputs, monkeypatch):
    monkeypatch.setattr(inputs, "WAYS", [way for way in inputs.WAYS if way.sampler != "gp"])
    monkeypatch.setattr(inputs, "GRID_TRIALS", (8,))
    monkeypatch.setattr(inputs, "LR_TASKS", ())
    first, second = (inputs.lines_of(inputs.measure_samplers(draws=2, gp_draws=1)) for _ in range(2))
    assert first == second
    assert len(first) == 2 + 6  # of 8 trials a quarter of Sobol points is the same as half


@pytest.mark.parametrize(
    ("n", "known"), [(6, (0, 0, 0, 3, 3, 3)), (8, (0, 0, 0, 0, 4, 4, 4, 4)), (9, (0,) * 4 + (4,) * 4 + (8,))]
)
def test_a_sampler_that_learns_begins_at_most_half_of_the_trials_before_the_first_result(inputs, table, n, known):
    way = inputs.Way(name="tpe")
    assert inputs.replay(table, way, n=n, seed=0).known == known


def test_a_sampler_that_learns_nothing_fills_its_packs(inputs, table):
    assert inputs.replay(table, inputs.Way(name="random", sampler="random"), n=6, seed=0).known == (0, 0, 0, 0, 4, 4)


def test_the_product_proposes_and_sees_who_runs(inputs, table, monkeypatch):
    asked = []

    def spy(arm, history, **settings):
        asked.append((len(asked), [trial.state.name for trial in history]))
        return proposals.propose(arm, history, **settings)

    assert inputs.propose is proposals.propose
    monkeypatch.setattr(inputs, "propose", spy)
    inputs.replay(table, inputs.Way(name="tpe"), n=4, seed=0)
    assert asked == [
        (0, []),
        (1, ["RUNNING"]),
        (2, ["COMPLETE"] * 2),
        (3, ["COMPLETE"] * 2 + ["RUNNING"]),
    ]


def test_the_number_of_trials_is_none_where_too_few_come_near(inputs):
    found = inputs.summarize([[0.5, 0.04], [0.2, 0.005], [0.3, 0.3]])
    assert (found["median_trials_5"], found["p90_trials_5"]) == (2, None)
    assert found["median_trials_1"] is None
    assert found["reached_1"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["median_regret"] == pytest.approx(0.04)

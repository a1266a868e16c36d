"""The replay of samplers: it asks the product's `propose` in the worker's order, and the same seed gives the same."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "bench_proposals.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_proposals", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield module
    optuna.logging.set_verbosity(verbosity)
    del sys.modules[spec.name]


def test_a_learning_rate_between_two_points_is_read_off_the_line_between_them(bench):
    lines = {(1, 1.0): (np.log([1e-3, 1e-2, 1e-1]), np.array([1.9, 1.5, 1.8]))}
    table = bench.Table(lines=lines, frozen=2.0)
    params = {bench.RANK: 1, bench.RATIO: 1.0, bench.LR: math.sqrt(1e-3 * 1e-2)}
    assert table.read(params) == pytest.approx(1.7)
    assert table.regret(params) == pytest.approx((1.7 - 1.5) / (2.0 - 1.5))
    assert table.read({**params, bench.LR: 1.0}) == pytest.approx(1.8)


@pytest.mark.parametrize("way", range(4))
def test_the_same_seeds_give_the_same_row_and_plain_rates_are_restored(bench, way):
    rates = np.log(np.geomspace(1e-4, 1e-1, 31))  # each line has its best rate where the rate law says
    lines = {
        (rank, ratio): (rates, 1 + (rank == 1) * 0.1 + 0.05 * (rates + np.log(rank * ratio) / 2 - np.log(4e-3)) ** 2)
        for rank in (1, 4)
        for ratio in (0.5, 2.0)
    }
    table, law = bench.Table(lines=lines, frozen=2.0), sys.modules[bench.History.__module__].build_rate_law
    first, second = (bench.measure(table, bench.WAYS[way], n=8, draws=3) for _ in range(2))
    assert first == second
    assert 0 <= first[0] <= first[1]
    assert sys.modules[bench.History.__module__].build_rate_law is law

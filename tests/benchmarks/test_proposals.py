"""The replay of samplers: it asks the product's `propose` in the worker's order, and the same seed gives the same."""

import sys

import bench_proposals as bench
import numpy as np
import pytest


def test_a_learning_rate_between_two_points_is_read_off_the_line_between_them():
    lines = {(1, 1.0): (np.log([1e-3, 1e-2, 1e-1]), np.array([1.9, 1.5, 1.8]))}
    table = bench.Table(lines=lines, frozen=2.0)
    params = {bench.RANK: 1, bench.RATIO: 1.0, bench.LR: (1e-3 * 1e-2) ** 0.5}
    assert table.read(params) == pytest.approx(1.7)
    assert table.regret(params) == pytest.approx((1.7 - 1.5) / (2.0 - 1.5))
    assert table.read({**params, bench.LR: 1.0}) == pytest.approx(1.8)


@pytest.mark.parametrize("way", bench.WAYS, ids=lambda way: way.name)
def test_the_same_seeds_give_the_same_row_and_plain_rates_are_restored(way):
    rates = np.log(np.geomspace(1e-4, 1e-1, 31))  # each line has its best rate where the rate law says
    lines = {
        (rank, ratio): (rates, 1 + (rank == 1) * 0.1 + 0.05 * (rates + np.log(rank * ratio) / 2 - np.log(4e-3)) ** 2)
        for rank in (1, 4)
        for ratio in (0.5, 2.0)
    }
    table, encoding = bench.Table(lines=lines, frozen=2.0), sys.modules[bench.History.__module__]
    law = encoding.build_rate_law
    first, second = (bench.measure(table, way, n=8, draws=3) for _ in range(2))
    assert first == second
    assert 0 <= first[0] <= first[1]
    assert encoding.build_rate_law is law

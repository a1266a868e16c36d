"""How many runs train together is measured: the largest size that pays and fits."""

from __future__ import annotations

import pytest
import torch

import lorasweep.training.cost as cost_file
from lorasweep.training import choose_pack_size, measure_pack_sizes
from lorasweep.training.cost import PackMeasurement


def measurement(slots: int, step_s: float, memory_bytes: int = 0) -> PackMeasurement:
    return PackMeasurement(slots=slots, step_s=step_s, memory_bytes=memory_bytes)


@pytest.mark.parametrize(
    ("steps_s", "chosen"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 2.0}, 1),
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.2}, 4),
        ({1: 1.0, 2: 1.99, 4: 1.0}, 1),  # the gain must hold at each size
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4}, 8),
    ],
)
def test_the_largest_size_that_still_pays_is_chosen(steps_s, chosen):
    assert choose_pack_size([measurement(slots, seconds) for slots, seconds in steps_s.items()]) == chosen


def test_measuring_stops_at_the_number_of_runs_left(monkeypatch, bench):
    monkeypatch.setattr(cost_file, "_measure", lambda config, bench, slots: measurement(slots, 1.0))
    assert [m.slots for m in measure_pack_sizes(None, bench=bench, most=5)] == [1, 2, 4]


def test_measuring_stops_where_memory_runs_out(monkeypatch, bench):
    def measure(config, bench, slots):
        if slots == 4:
            raise torch.OutOfMemoryError("no")
        return measurement(slots, 1.0)

    monkeypatch.setattr(cost_file, "_measure", measure)
    assert [m.slots for m in measure_pack_sizes(None, bench=bench, most=64)] == [1, 2]


def test_measuring_stops_before_the_next_size_would_fill_the_memory(monkeypatch, bench):
    def measure(config, bench, slots):
        return measurement(slots, 1.0, memory_bytes=1000 * slots)

    monkeypatch.setattr(cost_file, "_measure", measure)
    monkeypatch.setattr(cost_file, "free_memory_bytes", lambda: 4900)
    assert [m.slots for m in measure_pack_sizes(None, bench=bench, most=64)] == [1, 2, 4]


def test_another_error_while_measuring_is_not_hidden(monkeypatch, bench):
    def measure(config, bench, slots):
        raise KeyError("bug")

    monkeypatch.setattr(cost_file, "_measure", measure)
    with pytest.raises(KeyError, match="bug"):
        measure_pack_sizes(None, bench=bench, most=4)


def test_a_real_measurement_leaves_the_base_and_the_random_stream_alone(make_config, bench):
    state = torch.get_rng_state()
    weights = {name: p.clone() for name, p in bench.base.model.named_parameters()}
    measured = measure_pack_sizes(make_config({"method.dropout": 0.1}), bench=bench, most=1)
    assert measured[0].step_s > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in bench.base.model.named_parameters())

"""What `lorasweep plan` shows is measured on a few real steps."""

from __future__ import annotations

import pytest
import torch

import lorasweep.training.cost as cost_file
from lorasweep.errors import OutOfMemory
from lorasweep.training.cost import measure_pack


def test_a_measurement_leaves_the_base_and_the_random_stream_alone(make_config, inputs):
    state = torch.get_rng_state()
    weights = {name: p.clone() for name, p in inputs.base.model.named_parameters()}
    measured = measure_pack(make_config({"method.dropout": 0.1}), inputs=inputs, slots=2)
    assert (measured.slots, measured.slot_step_s) == (2, measured.step_s / 2)
    assert measured.step_s > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in inputs.base.model.named_parameters())


@pytest.mark.parametrize(("raised", "expected"), [(MemoryError("no"), OutOfMemory), (KeyError("bug"), KeyError)])
def test_only_a_lack_of_memory_is_said_to_be_one(make_config, inputs, monkeypatch, raised, expected):
    def fail(*arguments, **named):
        raise raised

    state = torch.get_rng_state()
    monkeypatch.setattr(cost_file, "_time", fail)
    with pytest.raises(expected):
        measure_pack(make_config(), inputs=inputs, slots=1)
    assert torch.equal(torch.get_rng_state(), state)

"""What `lorasweep plan` shows is measured on a few real steps."""

from __future__ import annotations

import pytest
import torch

import lorasweep.training.cost as cost_file
from lorasweep.errors import OutOfMemory
from lorasweep.training.cost import measure_run


@pytest.mark.parametrize(
    ("settings", "slots"), [({"method.dropout": 0.1}, 2), ({"method.dropout": 0.1}, None), ({"method": "frozen"}, None)]
)
def test_a_measurement_leaves_the_base_and_the_random_stream_alone(make_config, inputs, settings, slots):
    state = torch.get_rng_state()
    weights = {name: p.clone() for name, p in inputs.base.model.named_parameters()}
    cost = measure_run(make_config(settings), inputs=inputs, slots=slots)
    assert cost.slots == (slots or 1)
    assert cost.eval_s > 0
    assert (cost.step_s > 0) == (cost.trainable_params > 0) == ("method" not in settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in inputs.base.model.named_parameters())


def test_a_run_in_a_pack_trains_as_many_parameters_as_alone(make_config, inputs):
    alone, packed = (measure_run(make_config(), inputs=inputs, slots=slots) for slots in (None, 3))
    assert alone.trainable_params == packed.trainable_params


@pytest.mark.parametrize(("raised", "expected"), [(MemoryError("no"), OutOfMemory), (KeyError("bug"), KeyError)])
def test_only_a_lack_of_memory_is_said_to_be_one(make_config, inputs, monkeypatch, raised, expected):
    def fail(*arguments, **named):
        raise raised

    state = torch.get_rng_state()
    monkeypatch.setattr(cost_file, "_measure_seconds", fail)
    with pytest.raises(expected):
        measure_run(make_config(), inputs=inputs, slots=1)
    assert torch.equal(torch.get_rng_state(), state)

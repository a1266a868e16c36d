"""AdamW's groups and the schedule's values, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lorasweep.config.run import OptimConfig, ScheduleConfig
from lorasweep.methods import ParameterGroup
from lorasweep.training.optim import build_optimizer, build_schedule, refine_groups, schedule_factor

OPTIM = OptimConfig(
    name="adamw",
    lr=0.1,
    lr_ratio_b=1.0,
    lr_ratio_head=1.0,
    layer_decay=1.0,
    ema_decay=None,
    weight_decay=0.5,
    beta1=0.8,
    beta2=0.9,
    eps=1e-6,
    clip_norm=None,
)


def make_schedule(name, warmup_fraction):
    return ScheduleConfig(name=name, warmup_fraction=warmup_fraction)


@pytest.mark.parametrize(
    ("name", "warmup_fraction", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1.0, 0.8535533905932737, 0.5, 0.1464466094067262]),
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("constant", 0.5, [1 / 3, 2 / 3, 1.0, 1.0]),
        ("linear", 0.01, [1 / 2, 1.0, 2 / 3, 1 / 3]),  # a started step of warm-up is a whole one
    ],
)
def test_schedule_has_these_values(name, warmup_fraction, expected):
    factors = [schedule_factor(make_schedule(name, warmup_fraction), step, max_steps=4) for step in range(4)]
    assert factors == pytest.approx(expected, abs=1e-12)  # float64 arithmetic


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.06, 0.5, 0.9])
def test_a_schedule_that_falls_would_be_zero_right_after_the_last_step(name, warmup_fraction):
    factors = [schedule_factor(make_schedule(name, warmup_fraction), step, max_steps=50) for step in range(52)]
    assert factors[50:] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert all(0 < factor <= 1 for factor in factors[:50])


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_a_run_of_one_step_has_a_rate(name):
    assert 0 < schedule_factor(make_schedule(name, 0.5), 0, max_steps=1) <= 1


def test_each_group_has_its_own_rate_and_only_matrices_decay():
    matrix, vector, b = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,), (3, 2)))
    groups = [
        ParameterGroup(name="a", params=(matrix, vector), lr_factor=1.0),
        ParameterGroup(name="b", params=(b,), lr_factor=16.0),
    ]
    optimizer = build_optimizer(OPTIM, groups)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(matrix): (0.1, 0.5), id(vector): (0.1, 0.0), id(b): (pytest.approx(1.6), 0.5)}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


def test_the_schedule_moves_every_group_by_the_same_share():
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    groups = [ParameterGroup(name=str(n), params=(p,), lr_factor=1.0 + n) for n, p in enumerate(parameters)]
    optimizer = build_optimizer(OPTIM, groups)
    schedule = build_schedule(make_schedule("linear", 0.0), optimizer, max_steps=4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(torch.tensor([[0.1, 0.2], [0.075, 0.15], [0.05, 0.1], [0.025, 0.05]]).numpy())


class Blocks(nn.Module):
    """Embeddings, two blocks and a new head."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(2)])
        self.norm = nn.LayerNorm(2)
        self.classifier = nn.Linear(2, 2)


def rates(model, **changes):
    groups = [ParameterGroup(name="full", params=tuple(model.parameters()), lr_factor=2.0)]
    refined = refine_groups(model, groups, replace(OPTIM, **changes), head=("classifier",))
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group.lr_factor for group in refined for p in group.params}


def test_the_head_has_its_own_rate():
    found = rates(Blocks(), lr_ratio_head=10.0)
    assert {name for name, rate in found.items() if rate == 20.0} == {"classifier.weight", "classifier.bias"}
    assert set(found.values()) == {2.0, 20.0}


def test_lower_blocks_have_lower_rates():
    found = rates(Blocks(), layer_decay=0.5)
    assert found["embed_tokens.weight"] == 0.5
    assert found["layers.0.weight"] == 1.0
    assert found["layers.1.weight"] == found["norm.weight"] == found["classifier.weight"] == 2.0


def test_without_ratios_groups_stay_as_they_are():
    model = Blocks()
    group = ParameterGroup(name="full", params=tuple(model.parameters()), lr_factor=1.0)
    (refined,) = refine_groups(model, [group], OPTIM, head=("classifier",))
    assert refined.params == group.params

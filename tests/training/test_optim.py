"""Optimizers' groups and the schedules' values, worked out by hand or by transformers."""

import pytest
import torch
import transformers
from torch import nn
from transformers import get_scheduler

from lorasweep.config.build import build
from lorasweep.config.compose import compose_run
from lorasweep.config.run import ScheduleConfig
from lorasweep.methods import ParameterGroup
from lorasweep.training.optim import build_optimizer, build_schedule, schedule_factor

ADAMW = {"optim.lr": 0.1, "optim.weight_decay": 0.5, "optim.beta1": 0.8, "optim.beta2": 0.9, "optim.eps": 1e-6}


def make_schedule(name, warmup_fraction, **arguments):
    settings = {"name": name, "warmup_fraction": warmup_fraction, **arguments}
    return build(ScheduleConfig, settings, key="schedule")


@pytest.mark.parametrize(
    ("name", "warmup_fraction", "expected"),
    [
        ("linear", 0.5, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("constant", 0.5, [1 / 3, 2 / 3, 1.0, 1.0]),
        ("linear", 0.01, [1 / 2, 1.0, 2 / 3, 1 / 3]),  # a started step of warm-up is a whole one
    ],
)
def test_schedule_has_these_values(name, warmup_fraction, expected):
    schedule = make_schedule(name, warmup_fraction)
    factors = [schedule_factor(schedule, step, max_steps=4) for step in range(4)]
    assert factors == pytest.approx(expected, abs=1e-12)  # float64 arithmetic


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant", {}),
        ("cosine", {"min_lr_rate": 0.1}),
    ],
)
def test_without_warm_up_a_schedule_is_transformers(name, arguments):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = "cosine_with_min_lr" if arguments else name
    expected = get_scheduler(theirs, optimizer, 0, 20, scheduler_specific_kwargs=arguments).lr_lambdas[0]
    schedule = make_schedule(name, 0.0, **arguments)
    found = [schedule_factor(schedule, step, max_steps=20) for step in range(20)]
    assert found == pytest.approx([expected(step) for step in range(20)], abs=1e-15)  # float64 arithmetic


def test_each_group_has_its_own_rate_and_only_matrices_decay():
    groups = two_groups()
    matrix, vector, b = (parameter for group in groups for parameter in group.params)
    optimizer = build_optimizer(compose_run(ADAMW).optim, groups)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(matrix): (0.1, 0.5), id(vector): (0.1, 0.0), id(b): (pytest.approx(1.6), 0.5)}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


def two_groups():
    matrix, vector, b = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,), (3, 2)))
    return [
        ParameterGroup(name="a", params=(matrix, vector), lr_factor=1.0),
        ParameterGroup(name="b", params=(b,), lr_factor=16.0),
    ]


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({"optim": "sgd", "optim.nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ({"optim": "adafactor"}, transformers.Adafactor, {"relative_step": False, "clip_threshold": 1.0}),
        ({"optim._target_": "torch.optim.RMSprop", "optim.alpha": 0.9}, torch.optim.RMSprop, {"alpha": 0.9}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_another_optimizer_has_our_rates_and_weight_decay_and_its_own_arguments(settings, kind, expected):
    config = compose_run({**settings, "optim.lr": 0.1, "optim.weight_decay": 0.5})
    optimizer = build_optimizer(config.optim, two_groups())
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 1.6])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.5]
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


def test_an_optimizer_without_weight_decay_takes_none():
    optimizer = build_optimizer(compose_run({"optim._target_": "torch.optim.Rprop"}).optim, two_groups())
    assert "weight_decay" not in optimizer.param_groups[0]


def test_a_schedule_of_torchs_gets_the_optimizer_and_values_of_other_settings():
    config = compose_run({"schedule": "one_cycle", "optim.lr": 0.2, "trainer.max_steps": 10})
    schedule = build_schedule(config, build_optimizer(config.optim, two_groups()))
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.2)
    assert rates[0] == pytest.approx(0.2 / 25)

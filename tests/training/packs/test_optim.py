"""A slot's optimizer clips and steps as torch does in a run alone."""

import copy

import pytest
import torch
from torch import nn

from lorasweep.config.compose import compose_run
from lorasweep.lora import LoraConfig, inject_lora, split_lora_parameters
from lorasweep.methods import ParameterGroup
from lorasweep.training.optim import build_optimizer, build_schedule
from lorasweep.training.packs.slot_run import SlotOptimizer, step_slots


def settings(**changes):
    given = {"lr": 1e-2, "weight_decay": 0.0, "clip_norm": None} | changes
    return compose_run({"schedule": "linear", "trainer.max_steps": 60, **{f"optim.{k}": v for k, v in given.items()}})


RUNS = (
    settings(weight_decay=0.1, clip_norm=0.5),
    settings(lr=3e-3, lr_ratio_b=4.0, beta1=0.8),
    settings(lr=2e-2, beta2=0.95, eps=1e-6, clip_norm=2.0),
)
SCALES = (0.01, 0.5, 3.0, 0.02, 1.0)
"""Size of the gradients in each step, so that some steps are clipped and others are not."""


def draw_gradients(parameters, scale, seed):
    """Returns gradients whose elements have sizes from 0.5 to 1.5, times a scale."""
    generator = torch.Generator().manual_seed(seed)
    return [
        scale
        * (0.5 + torch.rand(p.shape, generator=generator))
        * (2 * torch.randint(2, p.shape, generator=generator) - 1)
        for p in parameters
    ]


@pytest.mark.parametrize("rank", [1, 4])
def test_slots_step_like_torchs_clipping_and_adamw(rank):
    def get_trained(model):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    alone, slots, optimizers = [], [], []
    for seed, run in enumerate(RUNS):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        inject_lora(model, LoraConfig(rank=rank, modules_to_save=("1",)))
        slots.append(copy.deepcopy(model))
        a, b, other = map(tuple, split_lora_parameters(model))
        groups = [("a", a, 1.0), ("b", b, run.optim.lr_ratio_b), ("other", other, 1.0)]
        groups = [ParameterGroup(name=name, params=params, lr_factor=factor) for name, params, factor in groups]
        optimizer = build_optimizer(run.optim, groups)
        alone.append((model, optimizer, build_schedule(run, optimizer)))
        optimizers.append(SlotOptimizer(slots[-1], run))
    for step, scale in enumerate(SCALES):
        rates = [schedule.get_last_lr()[0] for *_, schedule in alone]
        for slot, (model, optimizer, schedule) in enumerate(alone):
            gradients = draw_gradients(get_trained(model), scale, seed=10 * step + slot)
            for own, theirs, grad in zip(get_trained(slots[slot]), get_trained(model), gradients, strict=True):
                own.grad.copy_(grad)
                theirs.grad = grad.clone()
            if (limit := RUNS[slot].optim.clip_norm) is not None:
                nn.utils.clip_grad_norm_(get_trained(model), limit)
            optimizer.step()
            schedule.step()
        assert step_slots(optimizers) == rates
        assert not any(slot.gradient.any() for slot in optimizers)
    for slot, (model, _, _) in enumerate(alone):
        run = RUNS[slot]
        eps, count = torch.finfo(torch.float32).eps, sum(p.numel() for p in get_trained(model))
        # The norms are sums of `count` squares in another order, so each gradient differs by `count` roundings, and the
        # mean and the root of Adam too. Their ratio is at most 1 / sqrt(1 - beta2), whatever the gradients are.
        largest = run.optim.lr * run.optim.lr_ratio_b / (1 - run.optim.beta2) ** 0.5
        bound = len(SCALES) * (largest * 2 * (count + 8) * eps + 4 * eps)
        for own, theirs in zip(get_trained(slots[slot]), get_trained(model), strict=True):
            torch.testing.assert_close(own, theirs, rtol=0, atol=bound)

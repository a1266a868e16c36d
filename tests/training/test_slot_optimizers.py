"""The slots of a pack are clipped and stepped as torch does it in runs alone, also after the pack became smaller."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lorasweep.config.compose import compose_run
from lorasweep.lora import LoraConfig, inject_lora, inject_packed_lora, split_lora_parameters
from lorasweep.methods import ParameterGroup
from lorasweep.training.optim import build_optimizer, build_schedule, configure_slot_optimizers


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


def draw_gradients(shapes, scale, seed):
    """Returns gradients whose elements have sizes from 0.5 to 1.5, times a scale."""
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * (0.5 + torch.rand(shape, generator=generator)) * (2 * torch.randint(2, shape, generator=generator) - 1)
        for shape in shapes
    ]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 32))


def make_pack(runs, values):
    """Returns the slots, the optimizer and the schedule of a pack whose slots have these values by name."""
    slots = inject_packed_lora(make_model(), [run.method for run in runs])
    with torch.no_grad():
        for slot, own in enumerate(values):
            for name, view in slots.weights.views(slot).items():
                view.copy_(own[name])
    wanted = configure_slot_optimizers(runs, slots)
    return slots, wanted["optimizer"], wanted["lr_scheduler"]["scheduler"]


def make_alone(run):
    """Returns the trained parameters of a run alone by name, its optimizer and its schedule."""
    model = make_model()
    inject_lora(model, run.method)
    a, b, other = map(tuple, split_lora_parameters(model))
    named = [("a", a, 1.0), ("b", b, run.optim.lr_ratio_b), ("other", other, 1.0)]
    groups = [ParameterGroup(name=name, params=params, lr_factor=factor) for name, params, factor in named]
    optimizer = build_optimizer(run.optim, groups)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained, optimizer, build_schedule(run, optimizer)


def set_gradients(slots, slot, gradients):
    for row in slots.weights.find_rows(slot):
        if row.tensor.grad is None:
            row.tensor.grad = torch.zeros_like(row.tensor)
        for name, part in row.split(row.view(row.tensor.grad)).items():
            part.copy_(gradients[name])


@pytest.mark.parametrize("ranks", [(1, 1, 1), (4, 20, 24)])
def test_slots_step_like_torchs_clipping_and_adamw(ranks):
    methods = [LoraConfig(rank=rank, modules_to_save=("1",), targets=("0",)) for rank in ranks]
    runs = [replace(run, method=method) for run, method in zip(RUNS, methods, strict=True)]
    alone = [make_alone(run) for run in runs]
    slots, together, schedules = make_pack(runs, [trained for trained, *_ in alone])
    for step, scale in enumerate(SCALES):
        assert together.rates == [schedule.get_last_lr()[0] for *_, schedule in alone]
        for slot, (trained, optimizer, schedule) in enumerate(alone):
            drawn = draw_gradients([p.shape for p in trained.values()], scale, seed=10 * step + slot)
            gradients = dict(zip(trained, drawn, strict=True))
            set_gradients(slots, slot, gradients)
            for name, parameter in trained.items():
                parameter.grad = gradients[name].clone()
            if (limit := runs[slot].optim.clip_norm) is not None:
                nn.utils.clip_grad_norm_(trained.values(), limit)
            optimizer.step()
            schedule.step()
        slots.weights.clip_gradients([run.optim.clip_norm for run in runs])
        together.step()
        schedules.step()
        together.zero_grad()
        if step == 2:  # the first run ends, and the others continue in a smaller pack
            states, last, values = together.state_dict(), schedules.state_dict(), map(slots.weights.views, (1, 2))
            runs, alone = runs[1:], alone[1:]
            slots, together, schedules = make_pack(runs, [*values])
            together.load_state_dict({"slots": states["slots"][1:]})
            schedules.load_state_dict(last)
    for slot, (trained, *_) in enumerate(alone):
        optim, count = runs[slot].optim, sum(p.numel() for p in trained.values())
        # The norms are sums of `count` squares in another order, so each gradient differs by `count` roundings, and the
        # mean and the root of Adam too. Their ratio is at most 1 / sqrt(1 - beta2), whatever the gradients are.
        largest = optim.lr * optim.lr_ratio_b / (1 - optim.beta2) ** 0.5
        eps = torch.finfo(torch.float32).eps
        bound = len(SCALES) * (largest * 2 * (count + 8) * eps + 4 * eps)
        for name, view in slots.weights.views(slot).items():
            torch.testing.assert_close(view, trained[name].detach(), rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_any_other_optimizer_steps_the_matrices_of_each_slot(name):
    given = {"optim": name, "optim.weight_decay": 0.0}
    runs = [
        replace(compose_run(given | {"optim.lr": lr}), method=LoraConfig(rank=rank, targets=("0",)))
        for rank, lr in ((2, 0.1), (5, 0.01))
    ]
    alone = [make_alone(run) for run in runs]
    slots, together, _ = make_pack(runs, [trained for trained, *_ in alone])
    for step, scale in enumerate(SCALES):
        for slot, (trained, optimizer, _) in enumerate(alone):
            drawn = draw_gradients([p.shape for p in trained.values()], scale, seed=10 * step + slot)
            set_gradients(slots, slot, dict(zip(trained, drawn, strict=True)))
            for parameter, gradient in zip(trained.values(), drawn, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        together.step()
    for slot, (trained, *_) in enumerate(alone):
        for name, view in slots.weights.views(slot).items():
            torch.testing.assert_close(view, trained[name].detach())  # fp32 defaults: the same sums of the same numbers

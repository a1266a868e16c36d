"""Optimizer and learning-rate schedule of one run, and of all slots of a pack."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lorasweep.config.components import Component, instantiate, list_argument_names
from lorasweep.config.run import OptimConfig, OptimizerComponent, RunConfig, ScheduleConfig
from lorasweep.errors import ConfigError
from lorasweep.lora import Slots
from lorasweep.lora.packed.weights import Row
from lorasweep.methods import ParameterGroup, bind


def build_optimizer(
    config: OptimConfig | OptimizerComponent, groups: Sequence[ParameterGroup]
) -> torch.optim.Optimizer:
    """Returns AdamW or the optimizer of `optim._target_`. Vectors (norms, biases) have no weight decay."""
    param_groups: list[dict[str, Any]] = []
    for trained in groups:
        for decays in (True, False):
            params = [p for p in trained.params if (p.ndim >= 2) == decays]
            if params:
                decay = config.weight_decay if decays else 0.0
                param_groups.append({"params": params, "lr": config.lr * trained.lr_factor, "weight_decay": decay})
    if isinstance(config, OptimizerComponent):
        names, takes_any = list_argument_names(config.target, key="optim")
        if "weight_decay" not in names and not takes_any:
            if config.weight_decay:
                raise ConfigError(
                    f"`optim.weight_decay` must be 0 with {config.target!r}, but got {config.weight_decay!r}. "
                    "This optimizer has no weight decay."
                )
            for group in param_groups:
                del group["weight_decay"]
        optimizer = instantiate(config, key="optim", expected=torch.optim.Optimizer, params=param_groups, lr=config.lr)
    else:
        optimizer = torch.optim.AdamW(param_groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    # Lightning forbids clipping for optimizers that can unscale gradients by themselves, such as fused AdamW. But bf16
    # needs no gradient scaler, so clipping is right.
    setattr(optimizer, "_step_supports_amp_scaling", False)  # noqa: B010 (no attribute that mypy knows)
    return optimizer


def check_optim(config: RunConfig) -> None:
    """Checks the settings of optimizer and schedule by building both for one matrix."""
    group = ParameterGroup(name="check", params=(nn.Parameter(torch.zeros(2, 2)),), lr_factor=1.0)
    build_schedule(config, build_optimizer(config.optim, [group]))


def schedule_factor(config: ScheduleConfig, step: int, *, max_steps: int) -> float:
    """Returns the factor of the peak learning rate after `step` of `max_steps` optimizer steps.

    The factor rises linearly over `warmup_fraction` of the steps. Then it is the factor of transformers'
    `get_scheduler` without warm-up.
    *Differs:* transformers' warm-up begins at 0, so its first step does not train.
    """
    warmup = math.ceil(config.warmup_fraction * max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "constant":
        return 1.0
    num_steps = max(max_steps - warmup, 1)
    progress = min(step - warmup, num_steps) / num_steps
    left = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
    return left * (1 - config.min_lr_rate) + config.min_lr_rate


def build_schedule(config: RunConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Returns a run's schedule, which is stepped once per optimizer step."""
    schedule, max_steps = config.schedule, config.trainer.max_steps
    if isinstance(schedule, Component):
        return instantiate(schedule, key="schedule", expected=torch.optim.lr_scheduler.LRScheduler, optimizer=optimizer)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule_factor(schedule, step, max_steps=max_steps)
    )


def configure_optimizers(config: RunConfig, model: nn.Module) -> dict[str, Any]:
    """Returns what Lightning's `configure_optimizers` returns, for a prepared model."""
    groups = bind(config.method).trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b)
    optimizer = build_optimizer(config.optim, groups)
    return _join_schedule(optimizer, build_schedule(config, optimizer))


def configure_slot_optimizers(configs: Sequence[RunConfig], slots: Slots) -> dict[str, Any]:
    """Returns what Lightning's `configure_optimizers` returns, for the slots of a pack."""
    optimizer = SlotOptimizers(configs, slots)
    if isinstance(configs[0].schedule, Component):  # such a run trains in a pack of its own
        return _join_schedule(optimizer, build_schedule(configs[0], optimizer))
    return _join_schedule(optimizer, SlotSchedule(configs, optimizer))


def _join_schedule(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, Any]:
    stepped = optimizer.optimizers[0] if isinstance(optimizer, SlotOptimizers) else optimizer
    name = f"lr-{type(stepped).__name__}"  # as Lightning's monitor names it
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": name}}


class SlotOptimizers(torch.optim.Optimizer):
    """The optimizers of all slots of a pack, as one optimizer for Lightning.

    AdamW steps each slot's row of the pack's tensors as a few long vectors, because it takes each number for itself. An
    optimizer of `optim._target_` gets the matrices of the slot's solo model, as views.

    A checkpoint has the state of each slot by the parameters of its solo model, so that a slot can continue in a pack
    whose rows have other columns.
    """

    def __init__(self, configs: Sequence[RunConfig], slots: Slots) -> None:
        self.weights = slots.weights
        self._by_row = [not isinstance(config.optim, OptimizerComponent) for config in configs]
        self.rows: list[list[tuple[Row, nn.Parameter]]] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        for slot, (config, by_row) in enumerate(zip(configs, self._by_row, strict=True)):
            rows = [(row, nn.Parameter(row.view(row.tensor.detach()))) for row in self.weights.find_rows(slot)]
            self.rows.append(rows)
            if by_row:
                groups = _group_rows(rows, lr_ratio_b=config.optim.lr_ratio_b)
            else:
                groups = bind(config.method).trainable_groups(slots.models[slot], lr_ratio_b=config.optim.lr_ratio_b)
            self.optimizers.append(build_optimizer(config.optim, groups))
        self._models = slots.models
        first = self.optimizers[0]  # its defaults, because some schedules look there for momentum
        super().__init__([group for one in self.optimizers for group in one.param_groups], defaults=first.defaults)
        self._link_groups()

    def _link_groups(self) -> None:
        # the same dictionaries, so that a schedule of these groups sets the rates of the slots' optimizers
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]

    @property
    def slot_of_groups(self) -> list[int]:
        """The slot of each of `param_groups`."""
        return [slot for slot, one in enumerate(self.optimizers) for _ in one.param_groups]

    @property
    def rates(self) -> list[float]:
        """The learning rate of each slot."""
        return [float(one.param_groups[0]["lr"]) for one in self.optimizers]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for slot, optimizer in enumerate(self.optimizers):
            if self._by_row[slot]:
                for row, parameter in self.rows[slot]:
                    parameter.grad = None if row.tensor.grad is None else row.view(row.tensor.grad)
            else:
                parameters = dict(self._models[slot].named_parameters())
                for row, _ in self.rows[slot]:
                    for name, gradient in (
                        row.split(row.view(row.tensor.grad)).items() if row.tensor.grad is not None else ()
                    ):
                        parameters[name].grad = gradient
            optimizer.step()
            optimizer.zero_grad()  # they are views, which would keep all gradients until the next step
        self.weights.forget()  # fused kernels change values without a count
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's argument)
        self.weights.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns a list with the state of each slot, as copies."""
        return {"slots": [self._read_state(slot) for slot in range(len(self.optimizers))]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for slot, state in enumerate(state_dict["slots"]):
            self._load_state(slot, state)
        self._link_groups()

    def _read_state(self, slot: int) -> dict[str, Any]:
        optimizer = self.optimizers[slot]
        if not self._by_row[slot]:
            state: dict[str, Any] = apply_to_collection(optimizer.state_dict(), Tensor, torch.clone)
            return state
        moments: dict[str, Any] = {}
        for row, parameter in self.rows[slot]:
            for key, value in optimizer.state[parameter].items():
                parts = row.split(value) if value.dim() else {row.kind: value}
                moments.setdefault(key, {}).update({name: part.clone() for name, part in parts.items()})
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"groups": groups, "moments": moments}

    def _load_state(self, slot: int, state: Mapping[str, Any]) -> None:
        optimizer = self.optimizers[slot]
        if not self._by_row[slot]:
            optimizer.load_state_dict(dict(state))
            return
        for group, settings in zip(optimizer.param_groups, state["groups"], strict=True):
            group |= settings
        for row, parameter in self.rows[slot]:
            for key, parts in state["moments"].items():
                if row.kind in parts:
                    optimizer.state[parameter][key] = parts[row.kind].to(parameter.device)
                else:
                    values = torch.zeros_like(parameter)
                    for name, part in row.split(values).items():
                        part.copy_(parts[name])
                    optimizer.state[parameter][key] = values


class SlotSchedule(torch.optim.lr_scheduler.LambdaLR):
    """The schedule of each slot's learning rate. A checkpoint has the step alone, since the slots may become fewer."""

    def __init__(self, configs: Sequence[RunConfig], optimizer: SlotOptimizers) -> None:
        factors = [partial(_find_factor, config) for config in configs]
        super().__init__(optimizer, [factors[slot] for slot in optimizer.slot_of_groups])

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.__dict__.update(state_dict)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _find_factor(config: RunConfig, step: int) -> float:
    settings = config.schedule
    assert isinstance(settings, ScheduleConfig)
    return schedule_factor(settings, step, max_steps=config.trainer.max_steps)


def _group_rows(rows: Sequence[tuple[Row, nn.Parameter]], *, lr_ratio_b: float) -> list[ParameterGroup]:
    """Returns the rows of a slot, grouped by learning rate."""
    by_factor: dict[float, list[nn.Parameter]] = {}
    for row, parameter in rows:
        by_factor.setdefault(lr_ratio_b if row.kind == "lora_b" else 1.0, []).append(parameter)
    return [
        ParameterGroup(name=f"factor {factor:g}", params=tuple(params), lr_factor=factor)
        for factor, params in by_factor.items()
    ]

"""AdamW for the stacked parameters of a pack: one step for all slots, each with its own settings and step count.

Everything is elementwise or reduced within a slot, so a slot whose gradient is NaN leaves the others' numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.run import OptimConfig

PackedParameters = tuple[Sequence[nn.Parameter], Sequence[nn.Parameter], Sequence[nn.Parameter]]
"""Stacked A, stacked B and what else trains, as `lorasweep.lora.split_packed_parameters` gives them."""


@dataclass(kw_only=True)
class Moments:
    """Adam's state of one group: means of the gradient and of its square, (slots, numbers of all its parameters)."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    shapes: list[torch.Size]
    """Shapes that the parameters had when this was laid out, without the slot dimension."""


class StackedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) for each slot by itself.

    A slot's numbers are those of its own AdamW over its own parameters, as `training.optim` builds it: B at
    `lr · lr_ratio_b`, what trains in full at `lr · lr_ratio_head`, no weight decay of vectors. Padded parts are zero,
    have zero gradients and stay zero.
    *Differs:* a parameter without a gradient counts as one of zero gradient and does not decay.

    Attributes:
        settings: Of each slot.
        lr_factors: Share of the peak learning rate at which each slot makes its next step; its schedule's to set.
        num_steps: Steps that each slot has made.
    """

    def __init__(self, parameters: PackedParameters, settings: Sequence[OptimConfig]) -> None:
        """Starts with no steps made, at the peak rates.

        Args:
            parameters: Of a packed model; the first dimension of each is the slot.
            settings: One per slot. `clip_norm` is used by `clip_slots`.

        Raises:
            ValueError: The number of settings is not that of the slots, or an `eps` is 0.
        """
        super().__init__(_group(parameters), defaults={})
        self.settings: list[OptimConfig] = list(settings)
        slots = self.param_groups[0]["params"][0].shape[0]
        if len(self.settings) != slots:
            raise ValueError(f"There must be settings for {slots} slots, but got {len(self.settings)}.")
        for slot, config in enumerate(self.settings):
            _check_eps(slot, config)
        self.lr_factors = [1.0] * slots
        self.num_steps = [0] * slots
        self._moments = [_zero_moments(group["params"]) for group in self.param_groups]

    @property
    def num_slots(self) -> int:
        """How many slots there are."""
        return len(self.settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Makes one step in every slot, from the gradients of the parameters."""
        self.num_steps = [number + 1 for number in self.num_steps]
        for group, moments in zip(self.param_groups, self._moments, strict=True):
            self._update(group, moments)

    @torch.no_grad()
    def clip_slots(self) -> Tensor:
        """Scales each slot's gradients to a norm of at most its `clip_norm`, as `clip_grad_norm_` does for a model.

        Returns:
            The norms before, (slots,).
        """
        limits = [config.clip_norm for config in self.settings]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in gradients])
        total: Tensor = torch.linalg.vector_norm(norms, dim=0)  # (slots,)
        if any(limit is not None for limit in limits):
            largest = total.new_tensor([float("inf") if limit is None else limit for limit in limits])
            factors = (largest / (total + 1e-6)).clamp(max=1.0)  # 1e-6 as in `clip_grad_norm_`
            for grad in gradients:
                grad.mul_(_per_slot(factors, grad).to(grad.dtype))
        return total

    def reset_slot(self, slot: int, settings: OptimConfig) -> None:
        """Starts a slot anew for another trial: no steps, no moments, at its peak rate.

        Raises:
            ValueError: `eps` is 0.
        """
        _check_eps(slot, settings)
        self.settings[slot] = settings
        self.lr_factors[slot], self.num_steps[slot] = 1.0, 0
        for moments in self._moments:
            moments.exp_avg[slot], moments.exp_avg_sq[slot] = 0, 0

    @torch.no_grad()
    def follow(self, parameters: PackedParameters, *, keep: Sequence[int] | None = None) -> None:
        """Goes on with the parameters of a pack whose slots were filled or compacted.

        Parameters known so far keep their moments, cut or padded with zeros to the new shapes; new ones start at zero.

        Args:
            parameters: Of the packed model as it is now.
            keep: The slots that stayed, as given to `compact_slots`; None when all did.
        """
        kept = list(range(self.num_slots)) if keep is None else list(keep)
        known = self._by_parameter()
        for name in ("settings", "lr_factors", "num_steps"):
            setattr(self, name, [getattr(self, name)[slot] for slot in kept])
        self.param_groups.clear()
        for group in _group(parameters):
            self.add_param_group(group)
        self._moments = [_zero_moments(group["params"]) for group in self.param_groups]
        for parameter, new in self._by_parameter().items():
            for old_moment, new_moment in zip(known.get(parameter, ()), new, strict=False):
                overlap = tuple(
                    slice(0, min(a, b)) for a, b in zip(old_moment.shape[1:], new_moment.shape[1:], strict=True)
                )
                new_moment[(slice(None), *overlap)] = old_moment[kept][(slice(None), *overlap)]

    def slot_moments(self, slot: int) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Copies of a slot's means of the gradient and of its square, by parameter, without the slot dimension."""
        return {p: (mean[slot].clone(), square[slot].clone()) for p, (mean, square) in self._by_parameter().items()}

    def load_slot(self, slot: int, moments: Mapping[nn.Parameter, tuple[Tensor, Tensor]], *, num_steps: int) -> None:
        """Goes on in a slot with what `slot_moments` gave, cut or padded with zeros to the shapes of this pack."""
        self.num_steps[slot] = num_steps
        for parameter, own in self._by_parameter().items():
            for into, given in zip(own, moments.get(parameter, ()), strict=False):
                overlap = tuple(slice(0, min(a, b)) for a, b in zip(into[slot].shape, given.shape, strict=True))
                into[slot][overlap] = given[overlap].to(into)

    def _update(self, group: dict[str, Any], moments: Moments) -> None:
        """AdamW in the order of operations of `torch.optim.adamw`, on all parameters of a group laid side by side."""
        parameters: list[nn.Parameter] = group["params"]
        exp_avg, exp_avg_sq = moments.exp_avg, moments.exp_avg_sq
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        grad = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)  # (slots, numbers)
        decay, mean_weight, sq_factor, sq_weight, correction, eps, step_size = self._coefficients(group, like=grad)
        exp_avg.lerp_(grad, mean_weight)
        exp_avg_sq.mul_(sq_factor).addcmul_(grad * sq_weight, grad)
        denominator = exp_avg_sq.sqrt().div_(correction).add_(eps)
        change = (exp_avg * -step_size).div_(denominator)
        decays = group["decays"] and any(config.weight_decay for config in self.settings)
        sizes = [shape.numel() for shape in moments.shapes]
        for parameter, own in zip(parameters, torch.split(change, sizes, dim=1), strict=True):
            if decays and parameter.grad is not None:
                parameter.mul_(_per_slot(decay[:, 0], parameter))
            parameter.add_(own.view(parameter.shape))

    def _coefficients(self, group: dict[str, Any], *, like: Tensor) -> tuple[Tensor, ...]:
        """A column (slots, 1) for each number that enters the update."""
        rows = [self._slot_coefficients(slot, group) for slot in range(self.num_slots)]
        return tuple(_column(rows, like=like).unsqueeze(-1).unbind(1))

    def _slot_coefficients(self, slot: int, group: dict[str, Any]) -> tuple[float, ...]:
        config, step = self.settings[slot], self.num_steps[slot]
        ratios = {"lora_a": 1.0, "lora_b": config.lr_ratio_b}
        lr = config.lr * ratios.get(group["name"], config.lr_ratio_head) * self.lr_factors[slot]
        return (
            1 - lr * (config.weight_decay if group["decays"] else 0.0),
            1 - config.beta1,
            config.beta2,
            1 - config.beta2,
            (1 - config.beta2**step) ** 0.5,
            config.eps,
            lr / (1 - config.beta1**step),
        )

    def _by_parameter(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Views of both moments of each parameter, in its shape."""
        found = {}
        for group, moments in zip(self.param_groups, self._moments, strict=True):
            sizes = [shape.numel() for shape in moments.shapes]
            both = zip(*(torch.split(m, sizes, dim=1) for m in (moments.exp_avg, moments.exp_avg_sq)), strict=True)
            for parameter, shape, (mean, square) in zip(group["params"], moments.shapes, both, strict=True):
                found[parameter] = mean.view(mean.shape[0], *shape), square.view(mean.shape[0], *shape)
        return found


def _group(parameters: PackedParameters) -> list[dict[str, Any]]:
    """The groups that `build_optimizer` makes for a solo run: vectors of a slot are (slots, n) here."""
    lora_a, lora_b, other = parameters
    matrices, vectors = [p for p in other if p.ndim > 2], [p for p in other if p.ndim <= 2]
    named = (("lora_a", lora_a), ("lora_b", lora_b), ("other", matrices), ("vectors", vectors))
    return [{"name": name, "params": list(of), "decays": name != "vectors"} for name, of in named if of]


def _zero_moments(parameters: Sequence[nn.Parameter]) -> Moments:
    first, shapes = parameters[0], [p.shape[1:] for p in parameters]
    size = first.shape[0], sum(shape.numel() for shape in shapes)
    return Moments(exp_avg=first.new_zeros(size), exp_avg_sq=first.new_zeros(size), shapes=shapes)


def _column(values: Sequence[Any], *, like: Tensor) -> Tensor:
    """Numbers per slot as a tensor: computed in float64, rounded once to the dtype of the parameters."""
    return torch.tensor(values, dtype=torch.float64).to(dtype=like.dtype).to(like.device, non_blocking=True)


def _per_slot(values: Tensor, like: Tensor) -> Tensor:
    """(slots,) so that it is broadcast over a stacked tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _check_eps(slot: int, config: OptimConfig) -> None:
    if config.eps == 0:
        raise ValueError(
            f"`optim.eps > 0` must hold in a pack, but slot {slot} has 0: padded parts would be 0 / 0. Run it alone."
        )

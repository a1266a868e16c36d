"""AdamW for the stacked parameters of a pack: one step for all slots, each with its own settings and step count.

All operations are elementwise, or reduce within a slot, so a slot whose gradient is NaN does not change the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.run import OptimConfig

PackedParameters = tuple[Sequence[nn.Parameter], Sequence[nn.Parameter], Sequence[nn.Parameter]]
"""Stacked A, stacked B, and the other trained parameters, as `lorasweep.lora.split_lora_parameters` returns them."""


class StackedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) for each slot by itself.

    A slot's numbers are those of its own AdamW over its own parameters, as `training.optim` builds it: B at
    `lr · lr_ratio_b`, parameters that train in full at `lr · lr_ratio_head`, no weight decay of vectors. Padded parts
    are zero, have zero gradients and stay zero.
    *Differs:* a parameter without a gradient counts as one of zero gradient and does not decay.

    Attributes:
        settings: The `optim` settings of each slot.
        lr_factors: Share of the peak learning rate at which each slot makes its next step. The caller sets it.
        num_steps: Steps that each slot has made.
    """

    def __init__(self, parameters: PackedParameters, settings: Sequence[OptimConfig]) -> None:
        """Starts with no steps made, at the peak rates.

        Args:
            parameters: The parameters of a packed model; the first dimension of each is the slot.
            settings: One per slot.

        Raises:
            ValueError: The number of settings is not that of the slots, or an `eps` is 0.
        """
        super().__init__(_group(parameters), defaults={})
        self.settings: list[OptimConfig] = list(settings)
        slots = self.param_groups[0]["params"][0].shape[0]
        if len(self.settings) != slots:
            raise ValueError(f"There must be settings for {slots} slots, but got {len(self.settings)}.")
        for config in self.settings:
            _check_eps(config)
        self.lr_factors = [1.0] * slots
        self.num_steps = [0] * slots
        self._set_zero_moments()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Makes one step in every slot, from the gradients of the parameters."""
        self.num_steps = [number + 1 for number in self.num_steps]
        for group, moments in zip(self.param_groups, self._moments, strict=True):
            self._update(group, *moments)

    @torch.no_grad()
    def clip_slots(self) -> Tensor:
        """Scales each slot's gradients to a norm of at most its `clip_norm`, as `clip_grad_norm_` does for a model.

        Returns:
            The norms before, (slots,).
        """
        max_norms = [float("inf") if config.clip_norm is None else config.clip_norm for config in self.settings]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in gradients])
        total: Tensor = torch.linalg.vector_norm(norms, dim=0)  # (slots,)
        factors = (total.new_tensor(max_norms) / (total + 1e-6)).clamp(max=1.0)  # 1e-6 as in `clip_grad_norm_`
        for grad in gradients:
            grad.mul_(_per_slot(factors, grad).to(grad.dtype))
        return total

    def reset_slot(self, slot: int, settings: OptimConfig) -> None:
        """Starts a slot anew for another run: no steps, no moments, at its peak rate.

        Raises:
            ValueError: `eps` is 0.
        """
        _check_eps(settings)
        self.settings[slot] = settings
        self.lr_factors[slot], self.num_steps[slot] = 1.0, 0
        for mean, square in self._moments:
            mean[slot], square[slot] = 0, 0

    @torch.no_grad()
    def replace_parameters(self, parameters: PackedParameters, *, kept_slots: Sequence[int] | None = None) -> None:
        """Takes the parameters of a pack whose slots were refilled or compacted.

        Known parameters keep their moments, cut or padded with zeros to the new shapes; new ones start at zero.

        Args:
            parameters: The parameters of the packed model as it is now.
            kept_slots: The slots that were given to `compact_slots`; None if all stayed.
        """
        kept = list(range(len(self.settings))) if kept_slots is None else list(kept_slots)
        known = self._by_parameter()
        for name in ("settings", "lr_factors", "num_steps"):
            setattr(self, name, [getattr(self, name)[slot] for slot in kept])
        self.param_groups.clear()
        for group in _group(parameters):
            self.add_param_group(group)
        self._set_zero_moments()
        for parameter, new in self._by_parameter().items():
            for old_moment, new_moment in zip(known.get(parameter, ()), new, strict=False):
                _copy_overlap(old_moment[kept], new_moment)

    def slot_moments(self, slot: int) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Copies a slot's means of the gradient and of its square, by parameter, without the slot dimension."""
        return {p: (mean[slot].clone(), square[slot].clone()) for p, (mean, square) in self._by_parameter().items()}

    def load_slot(self, slot: int, moments: Mapping[nn.Parameter, Sequence[Tensor]], *, num_steps: int) -> None:
        """Resumes a slot from its `slot_moments`, cut or padded with zeros to the shapes of this pack."""
        self.num_steps[slot] = num_steps
        for parameter, own in self._by_parameter().items():
            for into, given in zip(own, moments.get(parameter, ()), strict=False):
                _copy_overlap(given, into[slot])

    def _update(self, group: dict[str, Any], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Steps the parameters of a group, with the operations of `torch.optim.adamw` in the same order."""
        parameters: list[nn.Parameter] = group["params"]
        # All parameters of the group lie side by side, (slots, numbers): a dozen operations instead of as many for each
        # of a hundred small tensors.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        grad = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        rows = [self._slot_coefficients(slot, group) for slot in range(len(self.settings))]
        # computed in float64 and rounded once, as torch does with the numbers of one run
        table = torch.tensor(rows, dtype=torch.float64).to(dtype=grad.dtype).to(grad.device, non_blocking=True)
        decay, mean_weight, sq_factor, sq_weight, correction, eps, step_size = table.unsqueeze(-1).unbind(1)
        exp_avg.lerp_(grad, mean_weight)
        exp_avg_sq.mul_(sq_factor).addcmul_(grad * sq_weight, grad)
        denominator = exp_avg_sq.sqrt().div_(correction).add_(eps)
        change = (exp_avg * -step_size).div_(denominator)
        decays = group["decays"] and any(config.weight_decay for config in self.settings)
        sizes = [p[0].numel() for p in parameters]
        for parameter, own in zip(parameters, torch.split(change, sizes, dim=1), strict=True):
            if decays and parameter.grad is not None:
                parameter.mul_(_per_slot(decay[:, 0], parameter))
            parameter.add_(own.view(parameter.shape))

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

    def _set_zero_moments(self) -> None:
        """Lays out both moments of each group, (slots, numbers of all its parameters)."""
        self._moments: list[tuple[Tensor, Tensor]] = []
        self._shapes: dict[nn.Parameter, torch.Size] = {}
        for group in self.param_groups:
            # kept, because a pack that is refilled changes the shapes before this optimizer hears of it
            self._shapes |= {p: p.shape[1:] for p in group["params"]}
            first, width = group["params"][0], sum(p[0].numel() for p in group["params"])
            size = first.shape[0], width
            self._moments.append((first.new_zeros(size), first.new_zeros(size)))

    def _by_parameter(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Returns views of both moments of each parameter, in the parameter's shape."""
        found = {}
        for group, moments in zip(self.param_groups, self._moments, strict=True):
            shapes = [self._shapes[p] for p in group["params"]]
            sizes = [shape.numel() for shape in shapes]
            both = zip(*(torch.split(moment, sizes, dim=1) for moment in moments), strict=True)
            for parameter, shape, (mean, square) in zip(group["params"], shapes, both, strict=True):
                found[parameter] = mean.view(-1, *shape), square.view(-1, *shape)
        return found


def _group(parameters: PackedParameters) -> list[dict[str, Any]]:
    """Returns the groups that `build_optimizer` makes for a run alone: a slot's vectors are (slots, n) here."""
    lora_a, lora_b, other = parameters
    matrices, vectors = [p for p in other if p.ndim > 2], [p for p in other if p.ndim <= 2]
    named = (("lora_a", lora_a), ("lora_b", lora_b), ("other", matrices), ("vectors", vectors))
    return [{"name": name, "params": list(of), "decays": name != "vectors"} for name, of in named if of]


def _copy_overlap(source: Tensor, target: Tensor) -> None:
    """Copies the part of a tensor that another one of the same number of dimensions has too."""
    overlap = tuple(slice(0, min(a, b)) for a, b in zip(source.shape, target.shape, strict=True))
    target[overlap] = source[overlap].to(target)


def _per_slot(values: Tensor, like: Tensor) -> Tensor:
    """Returns (slots,) in a shape that broadcasts over a stacked tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _check_eps(config: OptimConfig) -> None:
    if config.eps == 0:
        raise ValueError("`optim.eps > 0` must hold in a pack, where padded parts would be 0 / 0, but got 0.")

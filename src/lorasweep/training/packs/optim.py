"""AdamW for the stacked parameters of a pack. One call steps all slots, each with its own settings and step count.

No operation mixes values of two slots. So a NaN gradient in one slot does not change the other slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.run import OptimConfig

PackedParameters = tuple[Sequence[nn.Parameter], Sequence[nn.Parameter], Sequence[nn.Parameter]]
"""Result of `lorasweep.lora.split_lora_parameters`: all stacked A, all stacked B, and the other trained parameters."""


class StackedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) for each slot separately.

    Each slot is updated like a solo run with the optimizer of `training.optim`. The learning rate is `lr · lr_ratio_b`
    for B and `lr · lr_ratio_head` for parameters that train in full. Vectors have no weight decay.

    A slot of a lower rank is padded with zeros. Its gradients are zero, so it stays zero if `optim.eps` is above 0.
    `packing.plan_packing` ensures this.

    *Differs:* a parameter without a gradient is updated as with a zero gradient, but does not decay.

    Attributes:
        settings: For each slot, the `optim` settings. The slot is the first dimension of each parameter.
        lr_factors: For each slot, the next step's learning rate as a fraction of the peak. The caller sets it.
        num_steps: For each slot, the number of steps done.
    """

    def __init__(self, parameters: PackedParameters, settings: Sequence[OptimConfig]) -> None:
        super().__init__(_build_groups(parameters), defaults={})
        self.settings: list[OptimConfig] = list(settings)
        self.lr_factors = [1.0] * len(settings)
        self.num_steps = [0] * len(settings)
        self._set_zero_moments()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.num_steps = [number + 1 for number in self.num_steps]
        for group, moments in zip(self.param_groups, self._moments, strict=True):
            self._step_group(group, *moments)

    @torch.no_grad()
    def clip_gradients(self) -> Tensor:
        """Clips each slot's gradients to the norm `clip_norm`, and returns the norms before clipping, (slots,)."""
        max_norms = [float("inf") if config.clip_norm is None else config.clip_norm for config in self.settings]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in gradients])
        total: Tensor = torch.linalg.vector_norm(norms, dim=0)  # (slots,)
        factors = (total.new_tensor(max_norms) / (total + 1e-6)).clamp(max=1.0)  # 1e-6 as in `clip_grad_norm_`
        for grad in gradients:
            grad.mul_(_broadcast_slots(factors, grad).to(grad.dtype))
        return total

    def reset_slot(self, slot: int, settings: OptimConfig) -> None:
        """Resets a slot for another run: zero steps, zero moments and a learning rate factor of 1."""
        self.settings[slot] = settings
        self.lr_factors[slot], self.num_steps[slot] = 1.0, 0
        for mean, square in self._moments:
            mean[slot], square[slot] = 0, 0

    @torch.no_grad()
    def replace_parameters(self, parameters: PackedParameters, *, kept_slots: Sequence[int] | None = None) -> None:
        """Optimizes the parameters that a pack has after a refill, or after dropping all slots except `kept_slots`.

        Old parameters keep their moments, cut or padded with zeros to the new shapes. New parameters have zero moments.
        """
        kept = list(range(len(self.settings))) if kept_slots is None else list(kept_slots)
        old_moments = self._get_moments_by_parameter()
        for name in ("settings", "lr_factors", "num_steps"):
            setattr(self, name, [getattr(self, name)[slot] for slot in kept])
        self.param_groups.clear()
        for group in _build_groups(parameters):
            self.add_param_group(group)
        self._set_zero_moments()
        for parameter, new in self._get_moments_by_parameter().items():
            for old_moment, new_moment in zip(old_moments.get(parameter, ()), new, strict=False):
                _copy_overlap(old_moment[kept], new_moment)

    def copy_slot_moments(self, slot: int) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Returns copies of both moments of a slot by parameter, without the slot dimension."""
        return {
            p: (mean[slot].clone(), square[slot].clone())
            for p, (mean, square) in self._get_moments_by_parameter().items()
        }

    def load_slot_moments(self, slot: int, moments: Mapping[nn.Parameter, Sequence[Tensor]], *, num_steps: int) -> None:
        """Resumes a slot from moments of `copy_slot_moments`, cut or padded with zeros to the shapes of this pack."""
        self.num_steps[slot] = num_steps
        for parameter, stacked in self._get_moments_by_parameter().items():
            for target, source in zip(stacked, moments.get(parameter, ()), strict=False):
                _copy_overlap(source, target[slot])

    def _step_group(self, group: dict[str, Any], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Updates the parameters of a group, with the operations of `torch.optim.adamw` in the same order."""
        parameters: list[nn.Parameter] = group["params"]
        # All gradients are concatenated to (slots, parameters). A step then takes a dozen operations for the group,
        # instead of a dozen for each of a hundred small tensors.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        grad = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        rows = [self._compute_coefficients(slot, group) for slot in range(len(self.settings))]
        # Coefficients are computed in float64 and rounded once, as torch does in a solo run.
        table = torch.tensor(rows, dtype=torch.float64).to(dtype=grad.dtype).to(grad.device, non_blocking=True)
        decay, mean_weight, sq_factor, sq_weight, correction, eps, step_size = table.unsqueeze(-1).unbind(1)
        exp_avg.lerp_(grad, mean_weight)
        exp_avg_sq.mul_(sq_factor).addcmul_(grad * sq_weight, grad)
        denominator = exp_avg_sq.sqrt().div_(correction).add_(eps)
        update = (exp_avg * -step_size).div_(denominator)
        has_decay = group["decays"] and any(config.weight_decay for config in self.settings)
        sizes = [p[0].numel() for p in parameters]
        for parameter, parameter_update in zip(parameters, torch.split(update, sizes, dim=1), strict=True):
            if has_decay and parameter.grad is not None:
                parameter.mul_(_broadcast_slots(decay[:, 0], parameter))
            parameter.add_(parameter_update.view(parameter.shape))

    def _compute_coefficients(self, slot: int, group: dict[str, Any]) -> tuple[float, ...]:
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
        """Creates both moments of each group, as (slots, parameters of the group)."""
        self._moments: list[tuple[Tensor, Tensor]] = []
        self._shapes: dict[nn.Parameter, torch.Size] = {}
        for group in self.param_groups:
            # The moments have these shapes until `replace_parameters`, while a refill already changes the parameters.
            self._shapes |= {p: p.shape[1:] for p in group["params"]}
            first = group["params"][0]
            size = first.shape[0], sum(p[0].numel() for p in group["params"])
            self._moments.append((first.new_zeros(size), first.new_zeros(size)))

    def _get_moments_by_parameter(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Returns views of both moments of each parameter, in the parameter's shape."""
        views = {}
        for group, moments in zip(self.param_groups, self._moments, strict=True):
            shapes = [self._shapes[p] for p in group["params"]]
            sizes = [shape.numel() for shape in shapes]
            both = zip(*(torch.split(moment, sizes, dim=1) for moment in moments), strict=True)
            for parameter, shape, (mean, square) in zip(group["params"], shapes, both, strict=True):
                views[parameter] = mean.view(-1, *shape), square.view(-1, *shape)
        return views


def _build_groups(parameters: PackedParameters) -> list[dict[str, Any]]:
    """Returns the parameter groups: A, B, other matrices, and vectors, which do not decay."""
    lora_a, lora_b, other = parameters
    # the first dimension is the slot, so a vector of a solo run has two dimensions here
    matrices, vectors = [p for p in other if p.ndim > 2], [p for p in other if p.ndim <= 2]
    groups = {"lora_a": lora_a, "lora_b": lora_b, "other": matrices, "vectors": vectors}
    return [{"name": name, "params": list(p), "decays": name != "vectors"} for name, p in groups.items() if p]


def _copy_overlap(source: Tensor, target: Tensor) -> None:
    """Copies the part of `source` that fits into `target`. Both have the same number of dimensions."""
    overlap = tuple(slice(0, min(a, b)) for a, b in zip(source.shape, target.shape, strict=True))
    target[overlap] = source[overlap].to(target)


def _broadcast_slots(values: Tensor, like: Tensor) -> Tensor:
    """Returns values (slots,) in a shape that broadcasts over a stacked tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))

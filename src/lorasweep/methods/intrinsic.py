"""`intrinsic`: trains d coordinates of a random subspace of all weights (arXiv 1804.08838; 2012.13255, sections 3, 4).

The projection P from the d coordinates to the weights is never built. It is a product of random signs and a Hadamard
transform (Ailon and Chazelle 2009, "The fast Johnson-Lindenstrauss transform"):

    P = S H G / √d      for each block of n weights

n is the smallest power of two ≥ d (and at least 8). H is the Hadamard matrix (n × n). S and G are diagonal matrices of
random signs, other ones for each block, stored as two bits per weight. Every entry of P is ±1/√d, so a step of size η
in each of the d numbers moves each weight by about η, for any d.

*Differs* from Fastfood (Le, Sarlós and Smola 2013), which both papers use: one Hadamard transform instead of two, and
signs instead of normal numbers. Columns of P have length √(D/d) instead of 1, so learning rates do not depend on d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.nn.utils import parametrize

from lorasweep.config.method import IntrinsicConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.patterns import get_block_name
from lorasweep.methods.method import Method, ParameterGroup

SIGNS_PER_BYTE = 8
"""Signs are stored as bits. A block has at least this number of weights, so that its signs fill whole bytes."""
WEIGHTS_PER_CHUNK = 2**18
"""Number of weights that are projected at a time, so that temporary tensors stay in the CPU's cache."""


class IntrinsicMethod(Method[IntrinsicConfig]):
    """Trains all weights θ in a random subspace, and a scale λ_i of each layer i of m: θ_i = θ0_i + λ_i P_i θ_(d-m).

    θ_(d-m) and λ are saved with the seed of P. Each forward pass computes every weight in fp32 and rounds it once to
    the base's dtype. Until the end of the backward pass, the computed weights take as much memory as the base.
    """

    weights_file = "intrinsic.safetensors"

    def check(self, model: nn.Module, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if d is above the number of weights, or not above the number of layers."""
        layers = find_layers(model)
        num_weights = sum(weight.numel() for layer in layers for weight in layer)
        if not len(layers) < self.config.dim <= num_weights:
            raise ConfigError(
                f"`{len(layers)} < method.dim <= {num_weights}` must hold (number of layers, each of which has "
                f"a scale, and number of weights), but got {self.config.dim!r}."
            )

    def _make_trainable(self, model: nn.Module, *, generator: torch.Generator, **_: Any) -> None:
        layers = find_layers(model)
        intrinsic = IntrinsicParameters(self.config, num_scales=len(layers))
        updates = {
            id(weight): ProjectedUpdate(intrinsic, layer=index, weight=weight)
            for index, layer in enumerate(layers)
            for weight in layer
        }
        intrinsic.updates = tuple(updates.values())
        # Tied weights have several names, and each name gets the same update. The loops need lists, because
        # parametrizing adds modules.
        for module in list(model.modules()):
            for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(weight) in updates:
                    parametrize.register_parametrization(module, name, updates[id(weight)], unsafe=True)
        intrinsic.seed.copy_(torch.randint(2**32, (), generator=generator))
        intrinsic.draw_projection()

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the coordinates as one group, and the scales as a group with √(D/d) times the learning rate.

        The factor is the length of P's columns, which is 1 in the paper.
        """
        intrinsic = find_intrinsic_parameters(model)
        factor = math.sqrt(sum(update.num_weights for update in intrinsic.updates) / len(intrinsic.coordinates))
        return [
            ParameterGroup(name="intrinsic", params=(intrinsic.coordinates,), lr_factor=1.0),
            ParameterGroup(name="scales", params=(intrinsic.scales,), lr_factor=factor),
        ]

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads coordinates, scales and seed, and draws the projection of that seed."""
        super().load(model, folder)
        find_intrinsic_parameters(model).draw_projection()

    def merge(self, model: nn.Module) -> None:
        """Replaces each parametrized weight by its current value, in a tensor that no other model shares."""
        merged: dict[int, nn.Parameter] = {}
        for module in list(model.modules()):
            if not parametrize.is_parametrized(module):
                continue
            for name, (update, *_) in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                # tied weights have the same update, so they get the same merged weight and stay tied
                if id(update) not in merged:
                    merged[id(update)] = nn.Parameter(getattr(module, name).detach(), requires_grad=False)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, merged[id(update)])

    def _get_tensors_to_save(self, model: nn.Module) -> dict[str, Tensor]:
        return find_intrinsic_parameters(model).state_dict()


class IntrinsicParameters(nn.Module):
    """The trained parameters of `intrinsic`, and the seed of the projection."""

    seed: Tensor

    def __init__(self, config: IntrinsicConfig, *, num_scales: int) -> None:
        super().__init__()
        self.coordinates = nn.Parameter(torch.zeros(config.dim - num_scales))  # θ_(d-m)
        self.scales = nn.Parameter(torch.ones(num_scales))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))  # 32 bits, as torch's CPU generator
        self.block = max(SIGNS_PER_BYTE, 1 << (len(self.coordinates) - 1).bit_length())
        self.updates: tuple[ProjectedUpdate, ...] = ()

    def draw_projection(self) -> None:
        """Draws the bits of G and of S for each weight."""
        generator = torch.Generator().manual_seed(int(self.seed))
        for update in self.updates:
            num_bytes = -(-update.num_weights // self.block) * self.block // SIGNS_PER_BYTE
            signs = torch.randint(0, 256, (2, num_bytes), dtype=torch.uint8, generator=generator)
            update.signs = signs.to(update.signs.device)


class ProjectedUpdate(nn.Module):
    """A torch parametrization that adds a random projection of the coordinates to a weight. Tied weights share it."""

    signs: UInt8[Tensor, "2 bytes"]

    def __init__(self, intrinsic: IntrinsicParameters, *, layer: int, weight: Tensor) -> None:
        super().__init__()
        self.intrinsic = intrinsic
        self.layer = layer
        self.num_weights = weight.numel()
        self.register_buffer("signs", torch.empty(0, dtype=torch.uint8, device=weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        intrinsic = self.intrinsic
        factor = intrinsic.scales[self.layer] * (1 / math.sqrt(len(intrinsic.coordinates)))
        vector = pad(intrinsic.coordinates * factor, (0, intrinsic.block - len(intrinsic.coordinates)))
        return add_projection(weight, vector, self.signs)


def add_projection(
    base: Float[Tensor, "*shape"], vector: Float[Tensor, " n"], signs: UInt8[Tensor, "2 bytes"]
) -> Float[Tensor, "*shape"]:
    """Returns base + S H G vector in the shape and dtype of `base`, computed in the wider dtype and rounded once.

    `vector` is divided by √d and padded with zeros to n elements. `signs` has the bits of G and of S, for as many whole
    blocks as `base` needs.
    """
    result: Tensor = _AddProjection.apply(base, vector, signs)  # type: ignore[no-untyped-call]
    return result


class _AddProjection(torch.autograd.Function):
    """Adds the projection. Backward needs only the signs, because the gradient of a linear map needs no inputs."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, vector: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.like = vector.detach()
        update = vector.new_empty(len(vector), signs[0].numel() * SIGNS_PER_BYTE // len(vector))
        for columns, (signs_g, signs_s) in _unpack_signs(signs, vector):
            torch.mul(apply_hadamard(signs_g * vector[:, None]), signs_s, out=update[:, columns])
        # the last block may be longer than the number of remaining weights
        return (base + update.flatten()[: base.numel()].view(base.shape)).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (signs,) = ctx.saved_tensors
        padded = pad(grad.reshape(-1), (0, signs[0].numel() * SIGNS_PER_BYTE - grad.numel())).view(len(ctx.like), -1)
        total = torch.zeros_like(ctx.like)
        for columns, (signs_g, signs_s) in _unpack_signs(signs, ctx.like):
            # the transpose of the forward pass, because H is symmetric
            total += (signs_g * apply_hadamard(signs_s * padded[:, columns])).sum(1)
        return grad, total, None


def apply_hadamard(x: Float[Tensor, "n columns"]) -> Float[Tensor, "n columns"]:
    """Returns H x, computed in log2(n) steps of sums and differences. H is not normalised: H H = n I."""
    size, half = len(x), 1
    while half < size:
        above, below = x.reshape(size // (2 * half), 2, -1).unbind(1)
        x = torch.stack((above + below, above - below), dim=1)
        half *= 2
    return x.reshape(size, -1)


def _unpack_signs(signs: UInt8[Tensor, "2 bytes"], vector: Float[Tensor, " n"]) -> Iterator[tuple[slice, Tensor]]:
    """Yields some columns (blocks) at a time, with the signs of G and S (2, n, columns) as ±1 in the vector's dtype."""
    bits = (signs[..., None] >> torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=signs.device)) & 1
    bits = bits.view(2, len(vector), -1)
    step = max(1, WEIGHTS_PER_CHUNK // len(vector))
    for begin in range(0, bits.shape[2], step):
        columns = slice(begin, begin + step)
        yield columns, bits[:, :, columns].to(vector.dtype).mul_(-2).add_(1)


def find_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """Returns the floating-point parameters of each block and of each module outside the blocks; tied ones once."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, weight in sorted(model.named_parameters()):
        if weight.is_floating_point():
            layers.setdefault(get_block_name(name) or name.rpartition(".")[0], []).append(weight)
    return list(layers.values())


def find_intrinsic_parameters(model: nn.Module) -> IntrinsicParameters:
    return next(module for module in model.modules() if isinstance(module, IntrinsicParameters))

"""Initial values of A and B. With each except PiSSA, the weight update B A is zero at first."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lorasweep.config.method import Init


def draw_matrices(
    *,
    d_out: int,
    d_in: int,
    rank: int,
    init: Init,
    is_embedding: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    """Returns A and B in fp32 on the CPU, with B A = 0.

    `default`: A uniform within ±1/√d_in, which is Kaiming-uniform with a = √5, and B zero, as in LoRA's own code
    (github.com/microsoft/LoRA, `loralib/layers.py`); for an embedding A is zero and B standard normal, as there.
    `gaussian`: A normal with deviation 1/rank, as in PEFT; LoRA's section 4.1 says "random Gaussian" and no more.
    `orthogonal`: A and B take the even and odd rows of one random rotation, so that both are random and B A = 0
    (PEFT's `orthogonal`, after datta0.github.io/posts/rethink-lora-init). The rank must be even.
    `pissa` does not draw: see `split_weight`.
    """
    if init == "orthogonal":
        rotation, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
        lora_a = torch.randn(d_in, rank // 2, generator=generator).mm(rotation[0::2]).t() / 10
        lora_b = torch.randn(d_out, rank // 2, generator=generator).mm(rotation[1::2]) / 10
        return lora_a.contiguous(), lora_b
    if is_embedding:
        return torch.zeros(rank, d_in), torch.randn(d_out, rank, generator=generator)
    if init == "gaussian":
        return torch.randn(rank, d_in, generator=generator) / rank, torch.zeros(d_out, rank)
    lora_a = torch.empty(rank, d_in)
    torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
    return lora_a, torch.zeros(d_out, rank)


@torch.no_grad()
def split_weight(
    matrix: Float[Tensor, "d_out d_in"], *, rank: int, scaling: float
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    """Returns A and B for which scaling · B A is the principal part of `matrix`.

    PiSSA (arXiv 2404.02948), section 3, equations 2 and 3: A = √S Vᵀ and B = U √S of the largest singular values.
    *Differs:* divided by √scaling each, so that any α gives the principal part.
    """
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root

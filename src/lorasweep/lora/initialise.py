"""Initial values of A and B. The initial weight update B A is zero, except with PiSSA."""

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

    - An embedding with `default` or `gaussian`: A zero, B standard normal, as in LoRA's code.
    - `default`: A uniform within ±1/√d_in (Kaiming-uniform with a = √5), B zero, as in LoRA's code
      (github.com/microsoft/LoRA, `loralib/layers.py`).
    - `gaussian`: A normal with standard deviation 1/rank as in PEFT, B zero. LoRA's section 4.1 says "random Gaussian".
    - `orthogonal`: A uses the even rows of one random rotation and B the odd rows, so both are random and B A = 0
      (PEFT's `orthogonal`, after datta0.github.io/posts/rethink-lora-init). The rank must be even.
    - `pissa` draws nothing (see `split_principal_part`).
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
def split_principal_part(
    matrix: Float[Tensor, "d_out d_in"], *, rank: int, scaling: float
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    """Returns A and B so that scaling · B A is the best approximation of `matrix` of this rank.

    PiSSA (arXiv 2404.02948), section 3, equations 2 and 3: A = √S Vᵀ and B = U √S, with the largest singular values.
    *Differs:* A and B are each divided by √scaling, so that the result does not depend on α.
    """
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root

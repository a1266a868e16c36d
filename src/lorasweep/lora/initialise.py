"""How A and B start. All but PiSSA start with a change of zero; `layers` calls `draw_matrices`."""

from __future__ import annotations

import math

import torch
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
) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank) in fp32 on the CPU, B A = 0.

    `default`: A uniform within ±1/√d_in, which is Kaiming-uniform with a = √5, and B zero, as in LoRA's own code
    (github.com/microsoft/LoRA, `loralib/layers.py`); for an embedding A is zero and B standard normal, as there.
    `gaussian`: A normal with deviation 1/rank, as in PEFT; LoRA's section 4.1 says "random Gaussian" and no more.
    `orthogonal`: A and B take the even and odd rows of one random rotation, so that both are random and B A = 0
    (PEFT's `orthogonal`, after datta0.github.io/posts/rethink-lora-init). `pissa` is `split_weight`'s business.

    Args:
        d_out: Rows of the layer's matrix.
        d_in: Columns of it.
        rank: Rank of the change; even for `orthogonal`.
        init: Which start.
        is_embedding: Whether d_in counts the rows of an embedding.
        generator: CPU random stream; torch's own when None.
    """
    if init == "orthogonal":
        return _draw_orthogonal(d_out=d_out, d_in=d_in, rank=rank, generator=generator)
    if is_embedding:
        return torch.zeros(rank, d_in), torch.randn(d_out, rank, generator=generator)
    if init == "gaussian":
        return torch.randn(rank, d_in, generator=generator) / rank, torch.zeros(d_out, rank)
    lora_a = torch.empty(rank, d_in)
    torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
    return lora_a, torch.zeros(d_out, rank)


@torch.no_grad()
def split_weight(matrix: Tensor, *, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B whose change scaling · B A is the principal part of `matrix` (d_out, d_in).

    PiSSA (arXiv 2404.02948), section 3, equations 2 and 3: A = √S Vᵀ and B = U √S of the largest singular values.
    *Differs:* divided by √scaling each, so that any α gives the principal part.
    """
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _draw_orthogonal(*, d_out: int, d_in: int, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    rotation, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    lora_a = torch.randn(d_in, rank // 2, generator=generator).mm(rotation[0::2]).t() / 10
    lora_b = torch.randn(d_out, rank // 2, generator=generator).mm(rotation[1::2]) / 10
    return lora_a.contiguous(), lora_b

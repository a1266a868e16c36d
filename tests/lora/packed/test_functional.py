from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from lorasweep.lora.functional import draw_keep_mask, lora_linear
from lorasweep.lora.packed.functional import packed_change, packed_lora_linear

SLOTS, ROWS = 3, 2
SCALINGS = (0.7, 0.0, 2.0)


def make_inputs(*, shape: tuple[int, ...] = (SLOTS * ROWS, 3, 5), d_out: int = 4, rank: int = 2) -> tuple[Tensor, ...]:
    """x, weight, bias, stacked A and stacked B in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (d_out, shape[-1]), (d_out,), (SLOTS, rank, shape[-1]), (SLOTS, d_out, rank))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def make_keep(x: Tensor) -> Tensor:
    return draw_keep_mask(x, dropout=0.5, generator=torch.Generator().manual_seed(3))


def make_b_mask(b: Tensor) -> Tensor:
    return torch.rand(b.shape, generator=torch.Generator().manual_seed(4)) > 0.4


FACTORS = torch.tensor(SCALINGS, dtype=torch.float64)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(SLOTS * ROWS, 5), (SLOTS * ROWS, 3, 5), (SLOTS, 2, 3, 5), (0, 5)])
def test_equals_one_layer_per_slot(shape: tuple[int, ...], with_bias: bool, drop: bool) -> None:
    x, weight, bias, a, b = make_inputs(shape=shape)
    chosen = bias if with_bias else None
    keep = make_keep(x) if drop else None
    leaves = [t.requires_grad_() for t in (x, a, b)]
    packed = packed_lora_linear(x, weight, chosen, a, b, factors=FACTORS / (0.5 if drop else 1), keep=keep)
    keeps = [None] * SLOTS if keep is None else keep.chunk(SLOTS)
    separate = [
        lora_linear(rows, weight, chosen, a[k], b[k], scaling=SCALINGS[k], keep=keeps[k], dropout=0.5)
        for k, rows in enumerate(x.chunk(SLOTS) if x.numel() else [x] * SLOTS)
    ]
    expected = torch.cat(separate)
    torch.testing.assert_close(packed, expected)  # float64 defaults: the same products in another order
    grad = torch.linspace(-1, 1, packed.numel(), dtype=packed.dtype).view(packed.shape)
    torch.testing.assert_close(torch.autograd.grad(packed, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("trains", [t for t in itertools.product([True, False], repeat=5) if any(t)])
def test_gradcheck_for_every_choice_of_what_trains(drop: bool, masked: bool, trains: tuple[bool, ...]) -> None:
    x, weight, bias, a, b = make_inputs(shape=(SLOTS * ROWS, 3))
    mask = make_b_mask(b) if masked else None
    keep = make_keep(x) if drop else None
    inputs = tuple(t.requires_grad_(needs) for t, needs in zip((x, weight, bias, a, b), trains, strict=True))

    def run(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        given = b if mask is None else b * mask  # where B is masked, its values are zero
        return packed_lora_linear(x, weight, bias, a, given, factors=FACTORS, keep=keep, b_mask=mask)

    assert gradcheck(run, inputs)


def test_gradcheck_of_transposed_views() -> None:
    x, weight, bias, a, b = make_inputs(shape=(SLOTS * ROWS, 3))
    x, weight = (t.t().contiguous().t().requires_grad_() for t in (x, weight))
    assert not x.is_contiguous()
    inputs = (x, weight, bias, a.mT.contiguous().mT.requires_grad_(), b.requires_grad_())
    assert gradcheck(lambda *t: packed_lora_linear(*t, factors=FACTORS), inputs)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("drop", [True, False])
def test_the_change_alone_is_what_is_added(drop: bool, masked: bool) -> None:
    x, weight, bias, a, b = make_inputs()
    mask = make_b_mask(b) if masked else None
    b = b if mask is None else b * mask
    options = {"factors": FACTORS, "keep": make_keep(x) if drop else None, "b_mask": mask}
    leaves = [t.requires_grad_() for t in (x, a, b)]
    whole = packed_lora_linear(x, weight, bias, a, b, **options)
    parts = torch.nn.functional.linear(x, weight, bias) + packed_change(x, a, b, **options)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), leaves), torch.autograd.grad(whole.sum(), leaves))


def test_a_slot_of_nan_leaves_the_others_bit_identical() -> None:
    x, weight, bias, a, b = make_inputs()
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def run() -> list[Tensor]:
        out = packed_lora_linear(x, weight, bias, a, b, factors=FACTORS)
        return [out, *torch.autograd.grad(out.pow(2).sum(), leaves)]

    expected = run()
    with torch.no_grad():
        a[1], b[1], x[ROWS : 2 * ROWS] = float("nan"), float("inf"), float("nan")
    for got, value in zip(run(), expected, strict=True):
        for slot in (0, 2):
            assert torch.equal(got.chunk(SLOTS)[slot], value.chunk(SLOTS)[slot])
        assert got.chunk(SLOTS)[1].isnan().all()


def test_fp32_adapters_on_a_bf16_base_equal_the_solo_layers() -> None:
    x, weight, bias, a, b = make_inputs(shape=(SLOTS * ROWS, 32, 64), d_out=16, rank=4)
    half = [t.bfloat16() for t in (x, weight, bias)]
    adapters = [t.float().requires_grad_() for t in (a, b)]
    packed = packed_lora_linear(*half, *adapters, factors=FACTORS.float())
    assert packed.dtype is torch.bfloat16
    grads = torch.autograd.grad(packed.float().pow(2).sum(), adapters)
    separate = torch.cat(
        [
            lora_linear(rows, *half[1:], *(t[k] for t in adapters), scaling=SCALINGS[k])
            for k, rows in enumerate(half[0].chunk(SLOTS))
        ]
    )
    # bf16 has 8 bits: another order of summing moves a result by at most one rounding, 2^-8 of the largest terms
    assert (packed - separate).float().norm() <= 0.004 * separate.float().norm()
    for grad, expected in zip(grads, torch.autograd.grad(separate.float().pow(2).sum(), adapters), strict=True):
        assert grad.dtype is torch.float32
        assert (grad - expected).norm() <= 0.01 * expected.norm()


def test_autocast_computes_in_its_dtype() -> None:
    x, weight, bias, a, b = (t.float().requires_grad_() for t in make_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_lora_linear(x, weight, bias, a, b, factors=FACTORS.float(), keep=make_keep(x))
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert {t.grad.dtype for t in (x, a, b)} == {torch.float32}


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    x, weight, bias, a, b = make_inputs()
    a.requires_grad_()
    out = packed_lora_linear(x, weight, bias, a, b, factors=FACTORS)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_x_is_saved_once_for_layers_that_share_it() -> None:
    x, weight, bias, a, b = make_inputs()
    a.requires_grad_(), b.requires_grad_()
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = [packed_lora_linear(x, weight, bias, a, b, factors=FACTORS) for _ in range(3)]
    shared = {t.data_ptr() for t in (x, weight, a, b, FACTORS)}
    assert len(saved) == len(shared) + len(alive)  # and one u (slots, tokens, rank) per layer

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from lorasweep.lora.functional import Rows, add_change, draw_keep_mask, lora_linear, scaling_factor


def make_inputs(*, shape: tuple[int, ...] = (3, 5), d_out: int = 4, rank: int = 2) -> tuple[Tensor, ...]:
    """x, weight, bias, A and B in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (d_out, shape[-1]), (d_out,), (rank, shape[-1]), (d_out, rank))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The formula in one line, with the change as a full matrix."""
    return torch.nn.functional.linear(x, weight + scaling * b @ a, bias)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients_equal_the_dense_formula(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias, a, b = make_inputs(shape=shape)
    chosen = bias if with_bias else None
    leaves = [t.requires_grad_() for t in (x, a, b)]
    ours, reference = lora_linear(x, weight, chosen, a, b, scaling=0.7), dense(x, weight, chosen, a, b, 0.7)
    torch.testing.assert_close(ours, reference)  # float64 defaults: the same products in another order
    grad = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view(ours.shape)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(reference, leaves, grad))


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("trains", [t for t in itertools.product([True, False], repeat=5) if any(t)])
def test_gradcheck_for_every_choice_of_what_trains(drop: bool, trains: tuple[bool, ...]) -> None:
    inputs = make_inputs()
    for tensor, needs_grad in zip(inputs, trains, strict=True):
        tensor.requires_grad_(needs_grad)
    keep = draw_keep_mask(inputs[0], dropout=0.5, generator=torch.Generator().manual_seed(3)) if drop else None
    assert gradcheck(lambda *t: lora_linear(*t, scaling=0.7, keep=keep, dropout=0.5), inputs)


def test_gradcheck_without_bias() -> None:
    x, weight, _, a, b = (t.requires_grad_() for t in make_inputs())
    assert gradcheck(lambda x, w, a, b: lora_linear(x, w, None, a, b, scaling=2.0), (x, weight, a, b))


def test_gradcheck_of_transposed_views() -> None:
    x, weight, bias, a, b = (t.t().contiguous().t() for t in make_inputs()[:2] + make_inputs()[2:])
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias, a, b))
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    assert gradcheck(lambda *t: lora_linear(*t, scaling=0.7), leaves)


def test_gradcheck_of_an_expanded_input_and_gradient() -> None:
    x, weight, bias, a, b = make_inputs(shape=(2, 1, 5))
    x.requires_grad_()
    out = lora_linear(x.expand(2, 3, 5), weight, bias, a, b, scaling=0.7)
    (got,) = torch.autograd.grad(out.sum(), x)  # sum's gradient is an expanded scalar
    (expected,) = torch.autograd.grad(dense(x.expand(2, 3, 5), weight, bias, a, b, 0.7).sum(), x)
    torch.testing.assert_close(got, expected)


def test_dropout_scales_what_it_keeps_and_leaves_the_base_alone() -> None:
    x, weight, bias, a, b = make_inputs()
    keep = draw_keep_mask(x, dropout=0.5, generator=torch.Generator().manual_seed(3))
    expected = torch.nn.functional.linear(x, weight, bias) + 0.7 * (x * keep / 0.5) @ a.t() @ b.t()
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, scaling=0.7, keep=keep, dropout=0.5), expected)


def test_keep_mask_drops_the_asked_fraction() -> None:
    keep = draw_keep_mask(torch.empty(100, 1000), dropout=0.3, generator=torch.Generator().manual_seed(0))
    assert keep.float().mean().item() == pytest.approx(0.7, abs=0.01)  # 100,000 draws: deviation 0.0015


def test_scaling_zero_gives_the_base_exactly() -> None:
    x, weight, bias, a, b = make_inputs()
    assert torch.equal(lora_linear(x, weight, bias, a, b, scaling=0.0), torch.nn.functional.linear(x, weight, bias))


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    x, weight, bias, a, b = make_inputs()
    a.requires_grad_()
    (grad,) = torch.autograd.grad(lora_linear(x, weight, bias, a, b, scaling=1.0).pow(2).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_fp32_adapters_on_a_bf16_base_get_fp32_gradients() -> None:
    x, weight, bias, a, b = make_inputs(shape=(64, 32), d_out=16, rank=4)
    half = [t.bfloat16() for t in (x, weight, bias)]
    adapters = [t.float().requires_grad_() for t in (a, b)]
    out = lora_linear(*half, *adapters, scaling=0.5)
    assert out.dtype is torch.bfloat16
    grads = torch.autograd.grad(out.float().pow(2).sum(), adapters)
    exact = [t.detach().double().requires_grad_() for t in adapters]
    wide = [t.double() for t in half]
    reference = torch.autograd.grad(dense(*wide, *exact, 0.5).pow(2).sum(), exact)
    for grad, expected in zip(grads, reference, strict=True):
        assert grad.dtype is torch.float32
        # bf16 has 8 bits: each of a few roundings is at most 2^-8 of the largest terms of a sum
        assert (grad - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("drop", [True, False])
def test_autocast_computes_in_its_dtype(drop: bool) -> None:
    x, weight, bias, a, b = (t.float() for t in make_inputs(shape=(2, 6, 32), d_out=16))
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    keep = draw_keep_mask(x, dropout=0.5, generator=torch.Generator().manual_seed(3)) if drop else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lora_linear(x, weight, bias, a, b, scaling=0.5, keep=keep, dropout=0.5)
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert {t.grad.dtype for t in (x, a, b)} == {torch.float32}


def test_x_is_saved_once_for_layers_that_share_it() -> None:
    x, weight, bias, a, b = make_inputs(shape=(2, 3, 5))
    a.requires_grad_(), b.requires_grad_()
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = [lora_linear(x, weight, bias, a, b, scaling=1.0) for _ in range(3)]
    assert len(saved) == len({t.data_ptr() for t in (x, weight, a, b)}) + len(
        alive
    )  # and one u (rank, tokens) per layer


def test_scaling_rules() -> None:
    assert scaling_factor(alpha=8, rank=4, rule="alpha_over_rank") == 2
    assert scaling_factor(alpha=8, rank=4, rule="alpha_over_sqrt_rank") == 4


ROWS = ((1, 3), (5, 6))  # two parts of a fused projection with 7 rows


def make_fused_inputs() -> tuple[Tensor, ...]:
    x, weight, bias, a, _ = make_inputs(shape=(2, 3, 5), d_out=7, rank=4)  # two parts of rank 2
    return x, weight, bias, a, torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_rows_get_a_change_each_from_its_own_a_and_b() -> None:
    x, weight, bias, a, b = make_fused_inputs()
    changed = weight.clone()
    changed[1:3] += 0.7 * b[:2] @ a[:2]
    changed[5:6] += 0.7 * b[2:] @ a[2:]
    expected = torch.nn.functional.linear(x, changed, bias)
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, scaling=0.7, rows=ROWS), expected)


@pytest.mark.parametrize("drop", [True, False])
def test_gradcheck_of_rows(drop: bool) -> None:
    inputs = tuple(t.requires_grad_() for t in make_fused_inputs())
    keep = draw_keep_mask(inputs[0], dropout=0.5, generator=torch.Generator().manual_seed(3)) if drop else None
    assert gradcheck(lambda *t: lora_linear(*t, scaling=0.7, keep=keep, dropout=0.5, rows=ROWS), inputs)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("rows", [(), ROWS])
@pytest.mark.parametrize("trains", [t for t in itertools.product([True, False], repeat=4) if any(t)])
def test_gradcheck_of_a_change_added_to_any_output(drop: bool, rows: Rows, trains: tuple[bool, ...]) -> None:
    x, _, _, a, b = make_fused_inputs() if rows else make_inputs(shape=(2, 3, 5), d_out=7)
    y = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs = tuple(t.requires_grad_(needs) for t, needs in zip((y, x, a, b), trains, strict=True))
    keep = draw_keep_mask(x, dropout=0.5, generator=torch.Generator().manual_seed(3)) if drop else None
    assert gradcheck(lambda *t: add_change(*t, scaling=0.7, keep=keep, dropout=0.5, rows=rows), inputs)


@pytest.mark.parametrize("rows", [(), ROWS])
def test_a_change_added_to_the_bases_output_is_the_same_layer(rows: Rows) -> None:
    x, weight, bias, a, b = make_fused_inputs() if rows else make_inputs(shape=(2, 3, 5), d_out=7)
    y = torch.nn.functional.linear(x, weight, bias)
    before = y.clone()
    expected = lora_linear(x, weight, bias, a, b, scaling=0.7, rows=rows)
    torch.testing.assert_close(add_change(y, x, a, b, scaling=0.7, rows=rows), expected)
    assert torch.equal(y, before)

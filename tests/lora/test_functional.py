import pytest
import torch
from torch.autograd import gradcheck

from lorasweep.lora.functional import SlotGroup, linear_update, lora_linear

SLOTS, ROWS = 3, 2
FACTORS = torch.tensor([0.7, 0.0, 2.0], dtype=torch.float64)[:, None, None]


def make_inputs(*, shape=(SLOTS * ROWS, 3, 5), slots=SLOTS, d_out=4, rank=2):
    """x, weight, bias, stacked A and stacked B in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (d_out, shape[-1]), (d_out,), (slots, rank, shape[-1]), (slots, d_out, rank))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def run_lora(x, weight, bias, a, b, *, factor, keep=None):
    return lora_linear(x, weight, bias, [SlotGroup(a, b * factor)], keep=keep)


def make_keep(x):
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) > 0.5


def dense(x, weight, bias, a, b, factor):
    """The formula slot by slot, with the change as a full matrix."""
    rows = x.chunk(len(a)) if x.numel() else [x] * len(a)
    return torch.cat(
        [torch.nn.functional.linear(r, weight + factor[k] * b[k] @ a[k], bias) for k, r in enumerate(rows)]
    )


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5), (3, 2, 3, 5), (0, 5)])
@pytest.mark.parametrize("slots", [1, SLOTS])
def test_output_and_gradients_equal_the_dense_formula(shape, slots):
    x, weight, bias, a, b = make_inputs(shape=shape, slots=slots)
    chosen = bias if slots == 1 else None
    leaves = [t.requires_grad_() for t in (x, a, b)]
    factor = FACTORS[:slots]
    ours, reference = run_lora(x, weight, chosen, a, b, factor=factor), dense(x, weight, chosen, a, b, factor)
    torch.testing.assert_close(ours, reference)  # float64 defaults: the same products in another order
    grad = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view(ours.shape)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(reference, leaves, grad))


@pytest.mark.parametrize("drop", [True, False])
def test_groups_of_slots_and_the_update_alone_equal_one_padded_group(drop):
    x, weight, bias, a, b = make_inputs()
    keep = make_keep(x) if drop else None
    a, b = a.clone(), b.clone()
    a[0, 1], b[0, :, 1] = 0, 0  # slot 0 has rank 1, padded to 2
    leaves = [t.requires_grad_() for t in (x, a, b)]
    padded = run_lora(x, weight, bias, a, b, factor=FACTORS, keep=keep)
    groups = [SlotGroup(a[:1, :1], FACTORS[:1] * b[:1, :, :1]), SlotGroup(a[1:], FACTORS[1:] * b[1:])]
    grouped = lora_linear(x, weight, bias, groups, keep=keep)
    apart = torch.nn.functional.linear(x, weight, bias) + linear_update(x, SlotGroup(a, b * FACTORS), keep=keep)
    expected = torch.autograd.grad(padded.sum(), leaves)
    # the factor of slot 1 is 0, and the padding of slot 0 gets no gradient in any way
    for other in (grouped, apart):
        torch.testing.assert_close(other, padded)
        torch.testing.assert_close(torch.autograd.grad(other.sum(), leaves), expected)


TRAINS = [(True,) * 5, *(tuple(i == k for i in range(5)) for k in range(5)), (False, False, False, True, True)]


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("trains", TRAINS)
def test_gradcheck_of_what_trains(drop, trains):
    inputs = make_inputs(shape=(SLOTS * ROWS, 3))
    inputs = tuple(t.requires_grad_(needs) for t, needs in zip(inputs, trains, strict=True))
    keep = make_keep(inputs[0]) if drop else None
    assert gradcheck(lambda *t: run_lora(*t, factor=FACTORS, keep=keep), inputs)


def test_gradients_of_transposed_views_and_of_an_expanded_input():
    x, weight, bias, a, b = make_inputs(shape=(SLOTS * ROWS, 3))
    x, weight = (t.t().contiguous().t().requires_grad_() for t in (x, weight))
    assert not x.is_contiguous()
    inputs = (x, weight, bias, a.mT.contiguous().mT.requires_grad_(), b.requires_grad_())
    assert gradcheck(lambda *t: run_lora(*t, factor=FACTORS), inputs)
    x, weight, bias, a, b = make_inputs(shape=(SLOTS, 1, 5))
    x.requires_grad_()
    out = run_lora(x.expand(SLOTS, 3, 5), weight, bias, a, b, factor=FACTORS)
    (got,) = torch.autograd.grad(out.sum(), x)  # sum's gradient is an expanded scalar
    (expected,) = torch.autograd.grad(dense(x.expand(SLOTS, 3, 5), weight, bias, a, b, FACTORS).sum(), x)
    torch.testing.assert_close(got, expected)


def test_a_second_derivative_is_refused_instead_of_wrong():
    x, weight, bias, a, b = make_inputs()
    a.requires_grad_()
    (grad,) = torch.autograd.grad(run_lora(x, weight, bias, a, b, factor=1.0).pow(2).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_fp32_adapters_on_a_bf16_base_get_fp32_gradients():
    x, weight, bias, a, b = make_inputs(shape=(SLOTS * ROWS, 32, 64), d_out=16, rank=4)
    half = [t.bfloat16() for t in (x, weight, bias)]
    adapters = [t.float().requires_grad_() for t in (a, b)]
    out = run_lora(*half, *adapters, factor=FACTORS.float())
    assert out.dtype is torch.bfloat16
    grads = torch.autograd.grad(out.float().pow(2).sum(), adapters)
    exact = [t.detach().double().requires_grad_() for t in adapters]
    wide = [t.double() for t in half]
    reference = torch.autograd.grad(dense(*wide, *exact, FACTORS).pow(2).sum(), exact)
    for grad, expected in zip(grads, reference, strict=True):
        assert grad.dtype is torch.float32
        # bf16 has 8 bits: each of a few roundings is at most 2^-8 of the largest terms of a sum
        assert (grad - expected).norm() <= 0.02 * expected.norm()


def test_a_slot_of_nan_leaves_the_others_bit_identical():
    x, weight, bias, a, b = make_inputs()
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def run():
        out = run_lora(x, weight, bias, a, b, factor=FACTORS)
        return [out, *torch.autograd.grad(out.pow(2).sum(), leaves)]

    expected = run()
    with torch.no_grad():
        a[1], b[1], x[ROWS : 2 * ROWS] = float("nan"), float("inf"), float("nan")
    for got, value in zip(run(), expected, strict=True):
        for slot in (0, 2):
            assert torch.equal(got.chunk(SLOTS)[slot], value.chunk(SLOTS)[slot])
        assert got.chunk(SLOTS)[1].isnan().all()

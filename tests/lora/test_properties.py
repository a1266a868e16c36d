"""What the mathematics promises, for any shape and value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorasweep.lora import LoraConfig, LoraLayer, find_targets, inject_lora, split_lora_parameters
from lorasweep.lora.targets import Target

sizes = st.integers(min_value=1, max_value=9)
seeds = st.integers(min_value=0, max_value=2**31)
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def make_layer(d_out: int, d_in: int, *, rank: int, alpha: float = 2.0, seed: int = 0, **changes: object) -> LoraLayer:
    torch.manual_seed(seed)
    base = nn.Linear(d_in, d_out, dtype=torch.float64)
    layer = LoraLayer(base, Target(config=LoraConfig(rank=rank, **changes), rank=rank, alpha=alpha)).double()
    nn.init.normal_(layer.lora_b)
    return layer


@FEW
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_full_rank_expresses_any_change(d_out: int, d_in: int, seed: int) -> None:
    rank = min(d_out, d_in)
    layer = make_layer(d_out, d_in, rank=rank, seed=seed)
    wanted = torch.randn(d_out, d_in, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
    layer.lora_a.data = vh[:rank]
    layer.lora_b.data = u * s / layer.scaling
    x = torch.randn(4, d_in, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.base.weight + wanted, layer.base.bias))


@FEW
@given(d_out=sizes, d_in=sizes, rank=sizes, seed=seeds)
def test_the_change_has_at_most_its_rank(d_out: int, d_in: int, rank: int, seed: int) -> None:
    layer = make_layer(d_out, d_in, rank=rank, seed=seed)
    assert torch.linalg.matrix_rank(layer.compute_weight_update()) <= rank


@FEW
@given(shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4), data=st.data())
def test_trainable_count_is_rank_times_the_sides(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(min(shape) for shape in shapes)))
    model = nn.ModuleList(nn.Linear(d_in, d_out) for d_out, d_in in shapes)
    model = nn.ModuleDict({"layers": model})
    expected = sum(rank * (d_out + d_in) for d_out, d_in in shapes)
    coverage = find_targets(model, LoraConfig(rank=rank))
    inject_lora(model, LoraConfig(rank=rank))
    assert coverage.trainable_params == expected == sum(p.numel() for p in model.parameters() if p.requires_grad)


@FEW
@given(alpha=st.floats(0.1, 64), seed=seeds, init=st.sampled_from(["default", "gaussian", "orthogonal", "pissa"]))
def test_every_start_is_the_base(alpha: float, seed: int, init: str) -> None:
    torch.manual_seed(seed)
    base = nn.Linear(6, 8, dtype=torch.float64)
    layer = LoraLayer(base, Target(config=LoraConfig(rank=4, init=init), rank=4, alpha=alpha)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    # A and B are drawn in fp32: where their product is zero only by cancelling, up to 2^-24 of α <= 64 remains
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-5)


def test_strength_zero_is_the_base_exactly(make_model, tokens: Tensor, fill_b) -> None:
    model, base = make_model(), make_model()
    inject_lora(model, LoraConfig(rank=2, alpha=0.0, targets=("all-linear", "embed", "out")))
    fill_b(model)
    assert torch.equal(model(tokens), base(tokens))


def train(layer: LoraLayer, x: Tensor, y: Tensor, *, lr_a: float, lr_b: float, num_steps: int = 20) -> Tensor:
    a, b, _ = split_lora_parameters(layer)
    optimizer = torch.optim.Adam([{"params": a, "lr": lr_a}, {"params": b, "lr": lr_b}], eps=0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (layer(x) - y).pow(2).mean().backward()
        optimizer.step()
    return layer(x).detach()


@FEW
@given(factor=st.floats(0.1, 10), seed=seeds)
def test_under_adam_strength_and_the_rate_of_b_are_one_choice(factor: float, seed: int) -> None:
    """(α, lr_A, lr_B) and (c α, lr_A, lr_B / c) train the same function: Adam's step does not see a gradient's size."""
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 7, dtype=torch.float64)
    one, other = (make_layer(7, 5, rank=2, alpha=alpha, seed=seed) for alpha in (2.0, 2.0 * factor))
    other.lora_b.data = one.lora_b.data / factor
    trained = train(one, x, y, lr_a=0.01, lr_b=0.02)
    # Adam divides by the gradient's size, so rounding of 1e-16 grows where a gradient is nearly zero
    torch.testing.assert_close(train(other, x, y, lr_a=0.01, lr_b=0.02 / factor), trained, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_planted_change_is_recovered_down_to_the_tail_of_its_singular_values(rank: int) -> None:
    """Eckart and Young: no change of rank r comes nearer than the singular values past r; one of rank 3 was planted."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64))
    singular = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    layer = make_layer(8, 6, rank=rank, alpha=float(rank))
    nn.init.zeros_(layer.lora_b)
    x = torch.eye(6, dtype=torch.float64)  # so that the squared error is that of the matrices
    y = nn.functional.linear(x, layer.base.weight + u * singular @ v.t(), layer.base.bias).detach()
    optimizer = torch.optim.LBFGS([layer.lora_a, layer.lora_b], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = (layer(x) - y).pow(2).sum()
        error.backward()
        return error

    optimizer.step(loss)
    floor = singular[rank:].pow(2).sum().item()
    assert loss().item() == pytest.approx(floor, abs=1e-6)

"""The projection: Hadamard's transform, orthogonal columns, unit rows, its gradient, and how little memory it takes."""

import math
from functools import reduce

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasweep.methods import projection
from lorasweep.methods.projection import add_projection, apply_hadamard, draw_signs, get_block_size


def signs_for(count, *, block, seed=0):
    return draw_signs(count, block=block, generator=torch.Generator().manual_seed(seed))


def matrix(count, dim, *, seed=0):
    """P with rows of length 1, column by column, in float64."""
    block = get_block_size(dim)
    signs = signs_for(count, block=block, seed=seed)
    base = torch.zeros(count, dtype=torch.float64)
    columns = torch.eye(dim, block, dtype=torch.float64) / math.sqrt(dim)
    return torch.stack([add_projection(base, column, signs) for column in columns], dim=1)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_transform_is_the_kronecker_power_of_its_two_by_two_matrix(size):
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    expected = reduce(torch.kron, [two] * (size.bit_length() - 1), torch.ones(1, 1))
    assert torch.equal(apply_hadamard(torch.eye(size)), expected)


def test_transform_twice_is_n_times_the_identity():
    x = torch.randint(-9, 9, (256, 3)).double()  # whole numbers, so that nothing is rounded
    assert torch.equal(apply_hadamard(apply_hadamard(x)), 256 * x)


@pytest.mark.parametrize(("dim", "block"), [(1, 8), (8, 8), (9, 16), (200, 256), (256, 256), (257, 512)])
def test_block_is_the_power_of_two_from_the_dimension_on(dim, block):
    assert get_block_size(dim) == block


@pytest.mark.parametrize("dim", [3, 16, 20])
def test_rows_have_length_one_and_entries_one_size(dim):
    p = matrix(1000, dim)
    assert torch.allclose(p.abs(), torch.full_like(p, dim**-0.5))  # default tolerance of float64: 1e-5 of it


@pytest.mark.parametrize("dim", [3, 16, 20])
def test_columns_are_orthogonal_within_whole_blocks(dim):
    count = 4 * get_block_size(dim)
    p = matrix(count, dim)
    assert torch.allclose(p.T @ p, torch.eye(dim, dtype=torch.float64) * (count / dim), atol=1e-12)


def test_a_direction_keeps_its_length_in_the_subspace_up_to_chance():
    """Structured directions too, which a transform without signs on both its sides would map to one number."""
    dim, count = 64, 64 * 64
    directions = [torch.ones(count), apply_hadamard(torch.eye(64))[5].repeat_interleave(64), torch.eye(1, count)[0]]
    for direction in directions:
        kept = []
        for seed in range(200):
            inside = coordinates_of(direction.double() / direction.norm(), dim, seed=seed)
            kept.append(float(inside.square().sum()))
        # each is like a mean of `dim` squares: expected 1, deviation about √(2 / dim) = 0.18, over √200 for the mean
        assert sum(kept) / len(kept) == pytest.approx(1.0, abs=0.06)
        assert torch.tensor(kept).std() < 0.3


def coordinates_of(direction, dim, *, seed):
    vector = torch.zeros(get_block_size(dim), dtype=torch.float64, requires_grad=True)
    signs = signs_for(len(direction), block=get_block_size(dim), seed=seed)
    change = add_projection(torch.zeros_like(direction), vector / math.sqrt(dim), signs)
    change.backward(direction)
    return vector.grad


def test_change_of_a_random_point_has_the_variance_of_its_numbers():
    vector = torch.randn(256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = add_projection(torch.zeros(4096, dtype=torch.float64), vector / 16, signs_for(4096, block=256))
    # exact in whole blocks: P Pᵀ has no part outside them
    assert change.square().mean() == pytest.approx(float(vector.square().mean()), rel=1e-12)


def test_a_weight_that_does_not_fill_its_block_gets_the_first_rows_of_the_whole_product():
    block, count = 64, 11
    signs = signs_for(count, block=block)
    assert len(signs) == (64 + 16) // 8
    inner, outer = projection._unpack_signs(signs, dtype=torch.float64).split((64, 16))
    vector = torch.randn(block, dtype=torch.float64)
    expected = outer[:count] * apply_hadamard((inner * vector)[:, None])[:count, 0]
    change = add_projection(torch.zeros(count, dtype=torch.float64), vector, signs)
    assert torch.allclose(change, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (11,), (7, 9), (3, 4, 11)])
def test_gradient_is_that_of_finite_differences(shape):
    base = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(16, dtype=torch.float64, requires_grad=True)
    signs = signs_for(base.numel(), block=16)
    assert torch.autograd.gradcheck(lambda b, n: add_projection(b, n, signs), (base, vector))


def test_gradient_in_several_pieces_is_that_of_finite_differences(monkeypatch):
    monkeypatch.setattr(projection, "WEIGHTS_PER_CHUNK", 64)
    vector = torch.randn(16, dtype=torch.float64, requires_grad=True)
    base, signs = torch.zeros(150, dtype=torch.float64), signs_for(150, block=16)
    assert torch.autograd.gradcheck(lambda n: add_projection(base, n, signs), (vector,))
    p = torch.autograd.functional.jacobian(lambda n: add_projection(base, n, signs), vector.detach())
    assert torch.equal(p.abs(), torch.ones_like(p))
    assert torch.equal(p[:128].T @ p[:128], 128 * torch.eye(16, dtype=torch.float64))


def test_sum_is_rounded_once_to_the_weights_dtype():
    base = torch.randn(300).bfloat16()
    vector, signs = torch.randn(16) / 4, signs_for(300, block=16)
    change = add_projection(torch.zeros(300), vector, signs)
    assert torch.equal(add_projection(base, vector, signs), (base.float() + change).bfloat16())


def test_base_is_not_written_to_and_may_be_in_any_layout():
    base = torch.randn(12, 10).T
    before = base.clone()
    changed = add_projection(base, torch.ones(8), signs_for(120, block=8))
    assert torch.equal(base, before)
    assert torch.equal(changed, add_projection(base.contiguous(), torch.ones(8), signs_for(120, block=8)))


def test_same_seed_gives_the_same_projection():
    assert torch.equal(matrix(100, 16, seed=3), matrix(100, 16, seed=3))
    assert not torch.equal(matrix(100, 16, seed=3), matrix(100, 16, seed=4))


class Sizes(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return result


def test_no_tensor_is_larger_than_the_weights_and_the_signs_take_two_bits():
    count, dim = 3 * 2**20 + 17, 200  # a dense projection would have 629 million entries
    base = torch.randn(count)
    signs = signs_for(count, block=get_block_size(dim))
    assert signs.numel() <= count / 4 + 2 * 256
    vector = torch.randn(256, requires_grad=True)
    with Sizes() as sizes:
        add_projection(base, vector, signs).sum().backward()
    assert sizes.largest == count
    assert vector.grad.isfinite().all()

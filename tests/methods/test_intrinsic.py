"""`intrinsic`: its projection, what trains, that it reaches what full reaches where d allows, files, ties, merging."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

from lorasweep.config.method import IntrinsicConfig
from lorasweep.errors import ConfigError
from lorasweep.methods import bind
from lorasweep.methods.intrinsic import IntrinsicParameters, add_projection

from .conftest import logits_of, make_base, prepare, train

CONFIG = IntrinsicConfig(dim=40)
LAYERS = 4  # of the small Llama: embeddings (tied to the head), two blocks, the last norm
METHOD = bind(IntrinsicConfig())


def draw_signs(count, *, block, seed=0):
    size = (2, -(-count // block) * block // 8)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def build_p(count, dim, *, block, seed=0):
    """P (count, dim) with rows of length 1, column by column, in float64."""
    signs, base = draw_signs(count, block=block, seed=seed), torch.zeros(count, dtype=torch.float64)
    columns = torch.eye(dim, block, dtype=torch.float64) / math.sqrt(dim)
    return torch.stack([add_projection(base, column, signs) for column in columns], dim=1)


@pytest.mark.parametrize(("dim", "block"), [(3, 8), (16, 16), (20, 32)])
def test_rows_have_length_one_and_columns_are_orthogonal_within_whole_blocks(dim, block):
    p = build_p(1000, dim, block=block)
    assert torch.allclose(p.abs(), torch.full_like(p, dim**-0.5))  # default tolerance of float64: 1e-5 of it
    whole = build_p(4 * block, dim, block=block)
    assert torch.allclose(whole.T @ whole, torch.eye(dim, dtype=torch.float64) * (4 * block / dim), atol=1e-12)
    assert not torch.equal(p, build_p(1000, dim, block=block, seed=1))


@pytest.mark.parametrize("shape", [(5,), (11,), (7, 9), (3, 4, 11)])
def test_gradient_of_the_projection_is_that_of_finite_differences(shape):
    base = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(16, dtype=torch.float64, requires_grad=True)
    signs = draw_signs(base.numel(), block=16)
    assert torch.autograd.gradcheck(lambda b, n: add_projection(b, n, signs), (base, vector))


def test_file_has_the_numbers_and_the_seed_alone_and_brings_back_the_projection(tmp_path):
    base = make_base()
    model = prepare(base, "intrinsic", config=CONFIG, seed=7)
    train(model, "intrinsic")
    METHOD.save(model, tmp_path, base=base)
    sizes = {name: tensor.numel() for name, tensor in load_file(tmp_path / METHOD.weights_file).items()}
    assert sizes == {"coordinates": 40 - LAYERS, "scales": LAYERS, "seed": 1}
    other = prepare(base, "intrinsic", config=CONFIG, seed=3)
    METHOD.load(other, tmp_path)
    assert torch.equal(logits_of(other, "intrinsic"), logits_of(model, "intrinsic"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_is_a_plain_one_with_the_same_output(tied, dtype):
    base = make_base(tied=tied, dtype=dtype)
    before = copy.deepcopy(base.model.state_dict())
    model = prepare(base, "intrinsic", config=CONFIG)
    train(model, "intrinsic")
    expected = logits_of(model, "intrinsic")
    METHOD.merge(model)
    assert torch.equal(logits_of(model, "intrinsic"), expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.model.modules()]
    assert model.state_dict().keys() == before.keys()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(isinstance(module, IntrinsicParameters) for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.model.state_dict().items())
    assert not any(p is q for p, q in zip(model.parameters(), base.model.parameters(), strict=True))


@pytest.mark.parametrize("dim", [10**6, LAYERS])
def test_dimension_that_does_not_fit_is_refused(dim):
    with pytest.raises(ConfigError, match=rf"`{LAYERS} < method.dim <= \d+` must hold .* but got {dim}"):
        prepare(make_base(), "intrinsic", config=IntrinsicConfig(dim=dim))

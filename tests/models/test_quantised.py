"""A base in few bits: the values that are stored, the gradients that pass through, and what stays unquantised."""

import copy

import pytest
import torch
from tests.tiny_tokenizer import load_tokenizer
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorasweep.errors import ConfigError
from lorasweep.lora import LoraConfig, inject_lora
from lorasweep.lora.layer_kinds import dequantised_weight, is_quantised
from lorasweep.models.load import Labels, fingerprint_weights, load_base

pytest.importorskip("bitsandbytes", reason="bitsandbytes, an optional extra, is not installed")

DTYPES = (torch.float32, torch.bfloat16)
# appendix E of arXiv 2305.14314
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
TOKENS = torch.randint(257, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def load(model_config, quantisable_model):
    def load(quantization="none", *, dtype=torch.float32, path=quantisable_model, labels=None):
        kind = "causal_lm" if labels is None else "classifier"
        return load_base(model_config(path, quantization=quantization, kind=kind), dtype=dtype, labels=labels)

    return load


@pytest.fixture
def save(tmp_path):
    def save(model):
        model.save_pretrained(tmp_path / "model")
        load_tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def quantised_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantised(m)}


def linear_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def round_to_nf4(weight, *, block_size=64):
    blocks = weight.reshape(-1, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NF4_VALUES)
    return (values[(blocks / scales)[..., None].sub(values).abs().argmin(-1)] * scales).view_as(weight)


def test_nf4_stores_the_nearest_of_16_values_times_the_largest_of_64(load):
    plain, model = load().model, load("nf4").model
    for name, layer in quantised_layers(model).items():
        expected = round_to_nf4(plain.get_submodule(name).weight)
        # the scales themselves are rounded to 8 bits (double quantisation)
        torch.testing.assert_close(dequantised_weight(layer), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_linear_layers_but_the_head_are_quantised_and_the_same_each_time(load, dtype):
    plain, base = load(dtype=dtype), load("nf4", dtype=dtype)
    assert set(linear_layers(base.model)) - set(quantised_layers(base.model)) == {"lm_head"}
    others = [p for p in base.model.parameters() if p.is_floating_point() and p.dim() > 1]
    assert {p.dtype for p in others} == {dtype}
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.num_parameters == plain.num_parameters
    assert load("nf4", dtype=dtype).fingerprint == base.fingerprint != plain.fingerprint


def test_outputs_and_gradients_are_those_of_the_dequantised_weights(load):
    model = load("nf4").model
    reference = copy.deepcopy(load().model)
    for name, layer in quantised_layers(model).items():
        reference.get_submodule(name).weight.copy_(dequantised_weight(layer))
    found, expected = (run_backward(each) for each in (model, reference))
    # Sums in another order: each term of the sums on the way to a value, forward and backward, adds an error of at most
    # fp32's eps times the size of the values. Without the rounded weights the error would be 30 times this bound.
    num_terms = sum(layer.in_features + layer.out_features for layer in linear_layers(reference).values())
    for one, other in zip(found, expected, strict=True):
        bound = num_terms * torch.finfo(torch.float32).eps * other.abs().max()
        assert (one - other).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_evaluation_changes_neither_gradients_nor_weights(load, dtype):
    """bitsandbytes alone loses the base's part of gradients after an evaluation, on CPUs with AVX512-BF16."""
    base = load("nf4", dtype=dtype)
    before = run_backward(base.model)
    with torch.no_grad():
        base.model.eval()(input_ids=TOKENS)
    after = run_backward(base.model)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert fingerprint_weights(base.model) == base.fingerprint


def run_backward(model):
    """Returns the logits, and the gradient at the embeddings."""
    inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model.train()(inputs_embeds=inputs).logits
    logits.float().square().sum().backward()
    return logits.detach(), inputs.grad


def test_conv1d_layers_are_quantised(load, save):
    torch.manual_seed(0)
    path = save(GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=64, n_layer=2, n_head=2, n_positions=64)))
    plain = load(path=path).model(input_ids=TOKENS).logits
    model = load("nf4", path=path).model
    assert len(quantised_layers(model)) == 8
    assert 0 < (model(input_ids=TOKENS).logits - plain).norm() < 0.2 * plain.norm()


def test_a_new_head_and_a_pooler_are_not_quantised(load, save):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    path = save(BertModel(BertConfig(vocab_size=257, **sizes)))
    labels = Labels(kind="single_label", names=("a", "b", "c"))
    base = load("nf4", path=path, labels=labels)
    assert base.new_head_names == ("classifier",)
    assert set(linear_layers(base.model)) - set(quantised_layers(base.model)) == {"bert.pooler.dense", "classifier"}
    inject_lora(base.model, LoraConfig(rank=2, modules_to_save=["classifier"]))
    base.model.train()(input_ids=TOKENS).logits.sum().backward()
    trained = {name: p for name, p in base.model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


def test_a_layer_whose_rows_are_no_whole_blocks_stays_unquantised(load, save):
    """bitsandbytes' kernel for CPUs gives it wrong values."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = save(LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)))
    base = load("nf4", path=path)
    unquantised = set(linear_layers(base.model)) - set(quantised_layers(base.model))
    assert unquantised == {"lm_head", "model.layers.0.mlp.down_proj"}


def test_what_can_not_be_quantised_or_trained_so_is_refused(load, tmp_path):
    with pytest.raises(ConfigError, match=r"multiple of 64 inputs, but 'embedded:tiny' has none"):
        load("nf4", path="embedded:tiny")
    with pytest.raises(ValueError, match=r"`method.modules_to_save` .* 'model.layers.0.mlp.up_proj' is quantised"):
        inject_lora(load("nf4").model, LoraConfig(rank=2, modules_to_save=["up_proj"]))
    load("nf4").model.save_pretrained(tmp_path)  # files that are quantised already
    load_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"must be none for a model whose files are quantised already, but got 'nf4'"):
        load("nf4", path=tmp_path)

"""Training without padding gives the outputs and gradients of the padded batch."""

import copy
from itertools import pairwise

import pytest
import torch
import transformers
import transformers.modeling_flash_attention_utils as flash_utils
from tests.rounding import assert_equal_up_to_rounding
from torch import nn

from lorasweep.models.attention import IMPLEMENTATIONS
from lorasweep.training.unpadded import can_unpad, lay_out, unpadded

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = transformers.BertConfig(**SIZES, intermediate_size=32, num_labels=3)
LLAMA = transformers.LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=1)
HEADS = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
QWEN = transformers.Qwen3_5TextConfig(
    **SIZES, **HEADS, num_key_value_heads=1, layer_types=["linear_attention", "full_attention"]
)
LFM = transformers.Lfm2Config(**SIZES, num_key_value_heads=1, layer_types=["conv", "full_attention"])
ROUNDED_IN_FP32 = {"llama": 200}
"""Number of fp32 operations on the way to a value of a model that otherwise computes in float64.

Llama's five norms add up 16 squares in fp32, and its two layers' eager attention takes a softmax of at most 9 scores in
fp32; all of that once forward and once backward: 2 * (5 * 16 + 2 * 9) = 196. Bert computes in float64 throughout."""
T5 = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


def make_model(config, attention="eager"):
    torch.manual_seed(0)
    kinds = {"bert": "SequenceClassification", "t5": "Seq2SeqLM"}
    model_class = getattr(transformers, f"AutoModelFor{kinds.get(config.model_type, 'CausalLM')}")
    return model_class.from_config(copy.deepcopy(config), attn_implementation=attention).double().eval()


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """Computes what flash-attn's function of this name does: (tokens, heads, size), each sequence for itself."""
    assert cu_seqlens_q.dtype == torch.int32
    limits = cu_seqlens_q.tolist()
    assert limits == cu_seqlens_k.tolist()
    assert limits[-1] == len(q)
    assert max_seqlen_q == max_seqlen_k == max(end - first for first, end in pairwise(limits)) > 0
    outputs = []
    for first, end in pairwise(limits):
        inputs = [x[first:end].transpose(0, 1)[None] for x in (q, k, v)]
        named = {"scale": softmax_scale, "is_causal": causal, "enable_gqa": True}
        outputs.append(nn.functional.scaled_dot_product_attention(*inputs, **named)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch):
    """Puts a function for the CPU in the place of the kernel, which only a GPU has."""
    functions = (None, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda name, *_, **__: {"flash_attention_2": functions}[name])
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)


def make_batch(lengths):
    ids = torch.randint(5, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def assert_same(found, expected, *, model):
    """Compares outputs and gradients with the rounding of the dtype that computes them."""
    terms = ROUNDED_IN_FP32.get(model.config.model_type)
    for one, other in zip(found, expected, strict=True):
        # in float64: two layers of products with at most 32 terms, attention and norms, forward and backward
        dtype = torch.float64 if terms is None else torch.float32
        assert_equal_up_to_rounding(one, other, terms=terms or 1000, dtype=dtype)


def differentiate(model, batch, layout):
    """Returns the logits at real tokens, and all gradients of the sum of their squares."""
    model.zero_grad()
    with unpadded(model, layout):
        logits = model(**batch).logits
    if logits.dim() == 3:
        logits = logits[batch["attention_mask"].bool()]
    logits.square().sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("config", [BERT, LLAMA], ids=["bert", "llama"])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_padded_batch(config, attention, slots):
    model, batch = make_model(config, attention), make_batch([7, 3, 9, 8, 2, 6, 4, 8])
    assert can_unpad(model, make_batch([3, 5]))
    expected = differentiate(model, batch, None)
    layout = lay_out(batch, slots=slots)
    assert layout.num_positions < batch["input_ids"].numel()
    assert_same(differentiate(model, batch, layout), expected, model=model)


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=["bert", "llama"])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_flash_attention_gets_the_length_of_each_example(flash, config, slots):
    model, batch = make_model(config, "sdpa"), make_batch([7, 3, 9, 8, 2, 6, 4, 8])
    expected = differentiate(model, batch, None)
    model.config._attn_implementation = "flash_attention_2"
    assert can_unpad(model, make_batch([3, 5]))
    assert model.config._attn_implementation == "flash_attention_2"
    assert_same(differentiate(model, batch, lay_out(batch, slots=slots)), expected, model=model)


def test_lengths_for_flash_attention_are_those_of_a_padding_free_collator():
    """Such a collator gives the position of each token in its example, from which transformers computes the lengths."""
    batch = make_batch([4, 3, 6, 6])
    layout = lay_out(batch)
    positions = layout.unpad_rows(torch.arange(batch["input_ids"].shape[1])[None])
    (limits, _), (longest, _) = flash_utils.prepare_fa_kwargs_from_position_ids(positions)
    assert (layout.sequence_limits.tolist(), layout.longest_sequence) == (limits.tolist(), int(longest))


def test_linear_layers_see_the_real_tokens_alone_and_the_model_is_as_before_afterwards():
    model, batch = make_model(BERT), make_batch([2, 9, 4])
    seen = []
    model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape))
    with unpadded(model, lay_out(batch)):
        model(**batch)
    assert seen == [(1, 15, 32)]
    model, batch = make_model(BERT), make_batch([2, 5])
    expected = model(**batch).logits
    with pytest.raises(KeyboardInterrupt), unpadded(model, lay_out(batch)):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(**batch).logits, expected)


class MixingLayer(nn.Module):
    """Adds to each token the token before it, so that an unpadded row sees the row before it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, *args, **kwargs):
        return self.layer(hidden_states, *args, **kwargs) + hidden_states.roll(1, dims=1)


def test_models_that_need_their_rows_are_not_unpadded():
    batch = make_batch([3, 5])
    assert not can_unpad(make_model(T5), {**batch, "decoder_input_ids": batch["input_ids"]})
    assert not can_unpad(nn.Linear(2, 2), batch)
    # a convolution or a recurrent state over an unpadded row would see the row before it
    assert not can_unpad(make_model(QWEN), batch)
    assert not can_unpad(make_model(LFM), batch)
    mixing = make_model(BERT)
    dense = mixing.bert.encoder.layer[1].output
    dense.forward = MixingLayer(copy.deepcopy(dense)).forward
    assert not can_unpad(mixing, batch)


@pytest.mark.parametrize(("lengths", "slots"), [([4, 4], 1), ([2, 5], 2)])
def test_without_padding_or_with_one_row_per_slot_nothing_changes(lengths, slots):
    batch = make_batch(lengths)
    if min(lengths) == max(lengths):
        del batch["attention_mask"]  # as the data leaves it out
    assert lay_out(batch, slots=slots) is None

"""A GGUF file is dequantised as it is loaded, tokenizer and all, and is then like any other base."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorasweep.config.method import FullConfig
from lorasweep.errors import ConfigError
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import load_base

HEADS, SIZE, WORDS = 2, 32, 258
NAMES = {  # of llama.cpp, by those of transformers
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOKENS = torch.arange(60, 84).reshape(2, 12)


def permute(weight):
    """llama.cpp's order of the rows of q and k, whose rotary halves lie side by side."""
    return weight.reshape(HEADS, 2, SIZE // HEADS // 2, SIZE).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small random Llama as a GGUF file: its folder, and the weights that it must come back with."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    state = LlamaForCausalLM(settings).state_dict()
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name("small")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(SIZE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(SIZE // HEADS)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*dict(sorted(bytes_to_unicode().items())).values(), "th", "<|end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(257)
    expected = {}
    for name, tensor in state.items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = permute(values)
        if "proj" in name:
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(foreign_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(foreign_name(name), values)
        expected[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, expected


def foreign_name(name):
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    whole["lm_head.weight"] = "output.weight"
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


@pytest.fixture(scope="module")
def base(written, model_config):
    return load_base(model_config(written[0] / "model.gguf"), dtype=torch.float32)


def test_weights_are_those_that_were_quantised(base, written):
    state = base.model.state_dict()
    assert state.keys() == written[1].keys()
    for name, tensor in written[1].items():
        step = tensor.abs().max() / 127 if "proj" in name else 0.0
        # 8 bits round to half a step, and their scale in fp16 moves the largest by 127 / 2048 of one
        assert (state[name] - tensor).abs().max() <= 0.57 * step


def test_full_fine_tuning_saves_plain_weights(base, tmp_path):
    method, model = METHODS["full"], copy_sharing_weights(base.model)
    method.prepare(model, FullConfig(), generator=torch.Generator().manual_seed(0))
    method.save(model, tmp_path, base=base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_damaged_file_is_one_sentence(tmp_path, model_config):
    (tmp_path / "model.gguf").write_bytes(np.arange(100, dtype=np.uint8).tobytes())
    with pytest.raises(ConfigError, match=r"`model.path` must be a causal language model") as caught:
        load_base(model_config(tmp_path / "model.gguf"), dtype=torch.float32)
    assert "\n" not in str(caught.value)

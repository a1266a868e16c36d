"""Small random models of the architectures that people use, saved as transformers saves them."""

from functools import partial

import pytest
import torch
from tests.tiny_tokenizer import load_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

from lorasweep.config.build import build
from lorasweep.config.run import ModelConfig

SIZES = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
DECODER = SIZES | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
HYBRID = DECODER | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
GROUPED_EXPERTS |= {"moe_intermediate_size": 24, "first_k_dense_replace": 1}
IMAGES = {
    "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
}
ENCODER = {key: value for key, value in DECODER.items() if key not in ("num_key_value_heads", "head_dim")}
ENCODER |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

CAUSAL, ENCODER_ONLY = AutoModelForCausalLM.from_config, AutoModel.from_config
ROBERTA = ENCODER | {"max_position_embeddings": 330}
T5 = SIZES | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 256}
ARCHITECTURES = {
    "llama": (CAUSAL, "llama", DECODER),
    "gpt2": (CAUSAL, "gpt2", SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24}),
    "qwen2": (CAUSAL, "qwen2", DECODER),
    "qwen3": (CAUSAL, "qwen3", DECODER),
    "qwen3_next": (CAUSAL, "qwen3_next", HYBRID | EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": (CAUSAL, "qwen3_moe", DECODER | EXPERTS),
    "qwen3_5": (CAUSAL, "qwen3_5_text", HYBRID),
    "qwen3_5_with_images": (
        AutoModelForImageTextToText.from_config,
        "qwen3_5",
        {"text_config": HYBRID, "vision_config": IMAGES},
    ),
    "glm4_moe": (CAUSAL, "glm4_moe", DECODER | GROUPED_EXPERTS),
    "gemma3": (CAUSAL, "gemma3_text", DECODER),
    "bert": (ENCODER_ONLY, "bert", ENCODER),
    "bert_without_pooler": (partial(ENCODER_ONLY, add_pooling_layer=False), "bert", ENCODER),
    "roberta": (partial(ENCODER_ONLY, add_pooling_layer=False), "roberta", ROBERTA),
    "t5": (AutoModelForSeq2SeqLM.from_config, "t5", T5),
}

SETTINGS = {
    "name": "causal_lm",
    "kind": "causal_lm",
    "path": "embedded:tiny",
    "revision": None,
    "attention": "auto",
    "quantization": "none",
    "dropout": None,
    "trust_remote_code": False,
}


@pytest.fixture(scope="session")
def model_config():
    """Makes the settings of a base model from its path; the others are those of `conf/model/causal_lm.yaml`."""

    def make(path="embedded:tiny", **settings):
        values = SETTINGS | {"path": None if path is None else str(path)} | settings
        return build(ModelConfig, values, key="model")

    return make


@pytest.fixture(scope="session")
def save_random(tmp_path_factory):
    """Saves a small random model of an architecture with a byte tokenizer, once; gives its folder."""
    folders = {}

    def save(architecture):
        if architecture not in folders:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                make, model_type, settings = ARCHITECTURES[architecture]
                model = make(AutoConfig.for_model(model_type, **settings))
            folders[architecture] = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folders[architecture])
            load_tokenizer().save_pretrained(folders[architecture])
        return folders[architecture]

    return save

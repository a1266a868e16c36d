"""Small random models of the architectures that people use, saved as transformers saves them."""

import pytest
import torch
from tests.tiny_tokenizer import load_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
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
IMAGES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
ENCODER = {key: value for key, value in DECODER.items() if key not in ("num_key_value_heads", "head_dim")}
ENCODER |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

ARCHITECTURES = {
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**DECODER)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=64, n_inner=24)
    ),
    "qwen2": lambda: AutoModelForCausalLM.from_config(Qwen2Config(**DECODER)),
    "qwen3": lambda: AutoModelForCausalLM.from_config(Qwen3Config(**DECODER)),
    "qwen3_next": lambda: AutoModelForCausalLM.from_config(
        Qwen3NextConfig(**HYBRID, **EXPERTS, shared_expert_intermediate_size=24)
    ),
    "qwen3_moe": lambda: AutoModelForCausalLM.from_config(Qwen3MoeConfig(**DECODER, **EXPERTS)),
    "qwen3_5": lambda: AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**HYBRID)),
    "qwen3_5_with_images": lambda: Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=HYBRID, vision_config=IMAGES)
    ),
    "glm4_moe": lambda: AutoModelForCausalLM.from_config(
        Glm4MoeConfig(**DECODER, **GROUPED_EXPERTS, moe_intermediate_size=24, first_k_dense_replace=1)
    ),
    "gemma3": lambda: AutoModelForCausalLM.from_config(Gemma3TextConfig(**DECODER)),
    "bert": lambda: BertModel(BertConfig(**ENCODER)),
    "bert_without_pooler": lambda: BertModel(BertConfig(**ENCODER), add_pooling_layer=False),
    "roberta": lambda: RobertaModel(
        RobertaConfig(**ENCODER | {"max_position_embeddings": 330}), add_pooling_layer=False
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(**SIZES, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=256)
    ),
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
                model = ARCHITECTURES[architecture]()
            folders[architecture] = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folders[architecture])
            load_tokenizer().save_pretrained(folders[architecture])
        return folders[architecture]

    return save

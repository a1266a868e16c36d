"""What tests of methods share: a small random model, and how a method prepares and trains a copy of it."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lorasweep.config.method import (
    FrozenConfig,
    FullConfig,
    IntrinsicConfig,
    LoraConfig,
    PeftConfig,
)
from lorasweep.lora.layer_kinds import count_parameters
from lorasweep.methods import bind
from lorasweep.models.load import BaseModel, fingerprint_weights

CONFIGS = {
    "lora": LoraConfig(rank=2, alpha=4),
    "full": FullConfig(),
    "head": FullConfig(parameters="lm_head.*"),
    "norms": FullConfig(parameters=".*norm.*"),
    "intrinsic": IntrinsicConfig(dim=40),
    "frozen": FrozenConfig(),
    "peft": PeftConfig(config={"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "o_proj"], "d_initial": 1.0}),
}
METHODS = {name: bind(config) for name, config in CONFIGS.items()}
TRAINING = [name for name in CONFIGS if name != "frozen"]
TOKENS = torch.arange(24).reshape(2, 12)


def make_base(*, tied=True, dtype=torch.bfloat16):
    """A small random Llama as `load_base` gives it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"tie_word_embeddings": tied, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, **more))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not `.to`, which would cast the rotary frequencies too
    return as_base(model)


def as_base(model, **more):
    model.requires_grad_(False).eval()
    fingerprint = fingerprint_weights(model, exclude=more.get("new_head_names", ()))
    about = {"path": "some/base", "fingerprint": fingerprint, "num_parameters": count_parameters(model)}
    return BaseModel(model=model, tokenizer=None, **about, **more)


def prepare(base, name, *, config=None, seed=0):
    return bind(config or CONFIGS[name]).prepare(base, generator=torch.Generator().manual_seed(seed))


def logits_of(model, name):
    with torch.autocast("cpu", torch.bfloat16, enabled=METHODS[name].needs_autocast):
        return model(input_ids=TOKENS[:, :-1]).logits.float()


def train(model, name, *, steps=3, lr=0.03):
    groups = METHODS[name].trainable_groups(model, lr_ratio_b=1.0)
    optimizer = torch.optim.AdamW([{"params": group.params, "lr": lr * group.lr_factor} for group in groups])
    losses = []
    for _ in range(steps):
        loss = cross_entropy(logits_of(model, name).flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

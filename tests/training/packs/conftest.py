"""Packs of runs on a small random Llama, which trains faster than the embedded model."""

import pytest
import torch
from tests.conftest import SHORT_RUN
from tests.tiny_tokenizer import load_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from lorasweep.config.compose import compose_run
from lorasweep.training.inputs import build_inputs


@pytest.fixture(scope="session")
def make_config(quantisable_model):
    def make(settings=None):
        given = settings or {}
        small = {} if "model" in given else {"model": "causal_lm", "model.path": str(quantisable_model)}
        return compose_run({**SHORT_RUN, **small, **given})

    return make


@pytest.fixture(scope="session")
def inputs(make_config):
    return build_inputs(make_config())


def save_gpt2(folder, *, attention, others):
    """Saves a small random GPT-2 that drops attention, its embeddings and its residuals at these rates."""
    rates = {"attn_pdrop": attention, "resid_pdrop": others, "embd_pdrop": others}
    sizes = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=256, eos_token_id=256)).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return {"model": "causal_lm", "model.path": str(folder)}

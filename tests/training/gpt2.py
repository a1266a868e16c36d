"""A model whose dropout is not only that of LoRA."""

import torch
from tests.tiny_tokenizer import load_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel


def save_gpt2(folder, *, attention, others):
    """Saves a small random GPT-2 that drops attention, its embeddings and its residuals at these rates."""
    rates = {"attn_pdrop": attention, "resid_pdrop": others, "embd_pdrop": others}
    sizes = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=256, eos_token_id=256)).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return {"model": "causal_lm", "model.path": str(folder)}

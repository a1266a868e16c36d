"""Blocks that are computed again in the backward pass give the losses and gradients of blocks that are kept."""

import copy
from threading import Thread

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasweep.errors import ConfigError
from lorasweep.lora import LoraConfig, inject_packed_lora
from lorasweep.lora.dropout import FunctionalDropout
from lorasweep.training.prepare import checkpoint_activations, save_block_contexts

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
DECODER = SIZES | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "attention_dropout": 0.2}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": transformers.LlamaConfig(**DECODER),
    "qwen3": transformers.Qwen3Config(**DECODER),
    "gemma3": transformers.Gemma3TextConfig(**DECODER, layer_types=["sliding_attention", "full_attention"]),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=32, attention_dropout=0.2, hidden_dropout=0.3),
    "gpt2": transformers.GPT2Config(**GPT2, attn_pdrop=0.2, resid_pdrop=0.3, embd_pdrop=0.1),
    "bert": transformers.BertConfig(**SIZES, intermediate_size=32, attention_probs_dropout_prob=0.2),
    "mixtral": transformers.MixtralConfig(**DECODER, num_local_experts=4),
}
SLOTS = (LoraConfig(rank=2, dropout=0.3), LoraConfig(rank=3))


def make_pack(name):
    torch.manual_seed(0)
    kind = "SequenceClassification" if name == "bert" else "CausalLM"
    model_class = getattr(transformers, f"AutoModelFor{kind}")
    settings = {"experts_implementation": "eager"} if name == "mixtral" else {}  # the default one knows no fp64
    config = copy.deepcopy(CONFIGS[name])
    model = model_class.from_config(config, attn_implementation="eager", **settings).double()
    slots = inject_packed_lora(model, SLOTS, dropout_seeds=[8, 9])
    for slot in range(len(SLOTS)):
        for view in slots.weights.views(slot).values():  # B too: with zeros, A has no gradient
            view.copy_(torch.randn(view.shape, dtype=torch.float64) / 4)
    return model.train(), slots


def make_batch(lengths=(7, 3, 9, 8)):
    ids = torch.randint(5, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def train_step(model, slots, batch):
    """Returns the losses of two micro-batches and all gradients. The first backward pass runs after the contexts of the
    forward pass in another thread, as on a GPU, and the second inside the contexts."""
    losses = []
    for is_second in (False, True):
        slots.masks.begin(0, int(is_second))
        with FunctionalDropout(slots.masks.drop):
            losses.append(model(**batch).logits.square().mean())
            if is_second:
                losses[-1].backward()
        if not is_second:
            thread = Thread(target=losses[-1].backward)
            thread.start()
            thread.join()
    return torch.stack(losses).detach(), [p.grad for p in slots.weights.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_that_drops_gets_the_losses_and_gradients_of_kept_activations(name):
    batch, (kept, kept_slots), (again, slots) = make_batch(), make_pack(name), make_pack(name)
    expected = train_step(kept, kept_slots, batch)
    checkpoint_activations(again, save_block_contexts(slots.masks))
    calls = []
    block = next(module for module in again.modules() if isinstance(module, GradientCheckpointingLayer))
    next(block.children()).register_forward_pre_hook(lambda *_: calls.append("part"))
    found = train_step(again, slots, batch)
    assert calls.count("part") == 4  # twice in each of two micro-batches
    assert found[1]
    assert all(gradient.any() for gradient in found[1])
    # the same operations on the same values, but the first block's input needs no gradient
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"`trainer\.activation_checkpointing` must be false"):
        checkpoint_activations(nn.Linear(2, 2))

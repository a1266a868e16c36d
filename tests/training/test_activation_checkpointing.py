"""Blocks that are computed again in the backward pass give the losses and gradients of blocks that are kept."""

import copy
from contextlib import nullcontext
from threading import Thread

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasweep.errors import ConfigError
from lorasweep.lora import LoraConfig, inject_packed_lora, set_dropout_streams, slot_model
from lorasweep.lora.dropout import FunctionalDropout
from lorasweep.lora.packed.inject import find_slots
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
    inject_packed_lora(model, SLOTS)
    for slot in range(len(SLOTS)):
        for parameter in slot_model(model, slot).parameters():
            if parameter.requires_grad:  # B too: with zeros, A has no gradient
                parameter.data = torch.randn(parameter.shape, dtype=torch.float64) / 4
    set_dropout_streams(model, [torch.Generator().manual_seed(8 + slot) for slot in range(len(SLOTS))])
    return model.train()


def make_batch(lengths=(7, 3, 9, 8)):
    ids = torch.randint(5, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def train_step(model, batch):
    """Returns the losses of two micro-batches and all gradients. The first backward pass runs after the contexts of the
    forward pass in another thread, as on a GPU, and the second inside the contexts."""
    slots, losses = find_slots(model), []
    with slots.stacks.share():
        for is_second in (False, True):
            with FunctionalDropout(slots.drop):
                losses.append(model(**batch).logits.square().mean())
                if is_second:
                    losses[-1].backward()
            if not is_second:
                thread = Thread(target=losses[-1].backward)
                thread.start()
                thread.join()
    return torch.stack(losses).detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_that_drops_gets_the_losses_and_gradients_of_kept_activations(name):
    batch, kept, again = make_batch(), make_pack(name), make_pack(name)
    expected = train_step(kept, batch)
    checkpoint_activations(again, save_block_contexts(find_slots(again)))
    calls = []
    block = next(module for module in again.modules() if isinstance(module, GradientCheckpointingLayer))
    next(block.children()).register_forward_pre_hook(lambda *_: calls.append("part"))
    found = train_step(again, batch)
    assert calls.count("part") == 4  # twice in each of two micro-batches
    assert len(found[1]) == len(expected[1]) > 8
    # the same operations on the same values, but the first block's input needs no gradient
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    streams = [find_slots(model).generators for model in (kept, again)]
    assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(*streams, strict=True))


def test_other_masks_or_a_model_without_blocks_are_refused():
    model = make_pack("llama")
    checkpoint_activations(model, lambda: (nullcontext(), nullcontext()))
    with pytest.raises(ValueError, match="must draw the dropout masks of a pack again"):
        model(**make_batch()).logits.sum().backward()
    with pytest.raises(ConfigError, match=r"`trainer\.activation_checkpointing` must be false"):
        checkpoint_activations(nn.Linear(2, 2))

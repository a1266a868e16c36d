"""Losses of scored tokens, chunk by chunk, are those of all logits."""

import pytest
import torch
import transformers
from saved_bytes import count_saved_bytes
from tests.slot_gradients import read_slot_gradients
from torch import nn

from lorasweep.data.rows import IGNORED, repeat_batch
from lorasweep.lora import LoraConfig, inject_lora, inject_packed_lora
from lorasweep.objectives import scored_tokens
from lorasweep.objectives.scored_tokens import can_score_by_chunk, compute_logits, score_tokens

VOCABULARY = 50
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = ("llama", {**SIZES, "num_key_value_heads": 1})
FAMILIES = {
    "llama": LLAMA,
    "llama tied": ("llama", {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2 soft cap": ("gemma2", {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", SIZES),
    "granite logits_scaling": ("granite", {**SIZES, "num_key_value_heads": 1, "logits_scaling": 3.0}),
    "cohere logit_scale": ("cohere", {**SIZES, "num_key_value_heads": 1, "logit_scale": 0.3}),
    "phi bias": ("phi", SIZES),
    "opt": ("opt", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 24}),
}
HEADS = {
    "frozen": LoraConfig(rank=2),
    "adapted": LoraConfig(rank=3, targets=("q_proj", "lm_head")),
    "trained": LoraConfig(rank=2, modules_to_save=("lm_head", "embed_tokens")),
}


def make_model(family):
    """Returns a model with random weights and dropout 0, in float64: both ways then differ by rounding alone."""
    model_type, settings = family
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings, use_cache=False)
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases too, which are zero otherwise
    return model


def make_batch(lengths=(9, 5, 7, 2), *, scored_from=(3, 4, 2, 2)):
    """Returns padded rows whose scored tokens differ in number; the last row has none."""
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    position = torch.arange(max(lengths))
    is_real = position < torch.tensor(lengths)[:, None]
    is_scored = is_real & (position >= torch.tensor(scored_from)[:, None])
    return {
        "input_ids": ids.masked_fill(~is_real, 0),
        "attention_mask": is_real.long(),
        "targets": ids.roll(-1, 1).masked_fill(~is_scored, IGNORED),
    }


@pytest.fixture
def set_chunk(monkeypatch):
    """Sets the number of tokens in a chunk."""

    def set_size(tokens, slots=1):
        monkeypatch.setattr(scored_tokens, "MAX_CHUNK_BYTES", {"cpu": 4 * VOCABULARY * slots * tokens})

    return set_size


def differentiate(model, batch, *, by_chunk):
    """Returns the losses and the gradients of a sum in which each row has another weight."""
    model.zero_grad()
    losses = score_tokens(model, batch, by_chunk=by_chunk)
    (losses.sum(-1) * torch.linspace(0.5, 2, len(losses))).sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_both_ways_are_equal(model):
    expected, found = (differentiate(model, make_batch(), by_chunk=by_chunk) for by_chunk in (False, True))
    torch.testing.assert_close(found, expected)


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("tokens", [1, 4, 1000])
def test_losses_and_gradients_of_a_family_are_those_of_all_logits(family, tokens, set_chunk):
    set_chunk(tokens)
    model = make_model(family)
    assert can_score_by_chunk(model.eval())
    for trained in (model, model.get_decoder()):  # with and without the head
        model.requires_grad_(requires_grad=False)
        trained.requires_grad_(requires_grad=True)
        assert_both_ways_are_equal(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tokens", [3, 1000])
def test_losses_and_gradients_beside_a_head_of_each_kind_are_those_of_all_logits(tied, config, tokens, set_chunk):
    set_chunk(tokens)
    model = make_model(("llama", {**LLAMA[1], "tie_word_embeddings": tied}))
    inject_lora(model, config)
    randomise(model)
    assert_both_ways_are_equal(model)


PACKS = {
    "adapted": [
        LoraConfig(rank=3, targets=("q_proj", "lm_head")),
        LoraConfig(rank=20, targets=("q_proj", "lm_head")),
        LoraConfig(rank=2),  # its head is frozen
    ],
    "with dropout": [
        LoraConfig(rank=3, targets=("q_proj", "lm_head"), dropout=0.4),
        LoraConfig(rank=20, targets=("q_proj", "lm_head"), dropout=0.2),
        LoraConfig(rank=2, dropout=0.3),
    ],
    "trained": [HEADS["trained"], HEADS["trained"], HEADS["frozen"]],
    "frozen": [HEADS["frozen"]] * 3,
}


def make_pack(configs, *, first=0):
    """Returns a model with its slots, whose values and masks follow from the numbers `first`, `first + 1` and so on."""
    numbers, pack = range(first, first + len(configs)), make_model(LLAMA)
    slots = inject_packed_lora(
        pack, configs, generators=[torch.Generator().manual_seed(n) for n in numbers], dropout_seeds=list(numbers)
    )
    slots.weights.double()
    for solo in slots.models:
        randomise(solo)
    return pack.train(), slots


@pytest.mark.parametrize("configs", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("tokens", [2, 1000])
def test_each_slot_of_a_pack_has_the_losses_and_gradients_of_its_run_alone(configs, tokens, set_chunk):
    set_chunk(tokens, slots=3)
    pack, slots = make_pack(configs)
    batches = [make_batch(scored_from=first) for first in ((3, 4, 2, 2), (0, 9, 9, 9), (8, 4, 9, 1))]
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    losses, _ = differentiate(pack, joined, by_chunk=True)
    gradients = [read_slot_gradients(slots, slot) for slot in range(3)]
    assert all(gradient.any() for each in gradients for gradient in each.values())  # also of the heads
    for slot, (config, batch) in enumerate(zip(configs, batches, strict=True)):
        alone, own = make_pack([config], first=slot)
        expected = score_tokens(alone, batch, by_chunk=True)
        torch.testing.assert_close(losses.chunk(3)[slot], expected.detach())
        # the weights of `differentiate` for the rows of this slot
        (expected.sum(-1) * torch.linspace(0.5, 2, 12).chunk(3)[slot]).sum().backward()
        torch.testing.assert_close(gradients[slot], read_slot_gradients(own, 0))


def test_evaluation_of_a_pack_has_the_losses_of_all_logits(set_chunk):
    set_chunk(2, slots=2)
    pack, _ = make_pack([HEADS["adapted"]] * 2)
    pack.eval()
    batch = repeat_batch(make_batch(), slots=2)
    with torch.no_grad():
        expected, found = (score_tokens(pack, batch, by_chunk=by_chunk) for by_chunk in (False, True))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_without_a_scored_token_losses_and_gradients_are_zero(config):
    model = make_model(LLAMA)
    inject_lora(model, config)
    losses, gradients = differentiate(model, make_batch(scored_from=(9, 9, 9, 9)), by_chunk=True)
    assert torch.equal(losses, torch.zeros_like(losses))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_a_frozen_head_gets_scored_tokens_alone_and_the_model_computes_as_before_afterwards(set_chunk):
    set_chunk(4)
    model, batch, seen = make_model(LLAMA), make_batch(), []
    inject_lora(model, HEADS["frozen"])
    before = model(input_ids=batch["input_ids"]).logits
    hook = model.lm_head.register_forward_pre_hook(lambda layer, args: seen.append((args[0].shape, args[0].stride())))
    losses = score_tokens(model, batch, by_chunk=True)
    losses.sum().backward()
    hook.remove()
    # the strides are those of a whole tensor: with others, torch copies the weight
    assert seen == [((1, 4, 24), (96, 24, 1))] * 3
    assert int((losses > 0).sum()) == int((batch["targets"] != IGNORED).sum()) == 12
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)


def test_backward_keeps_no_logits_of_a_frozen_head(set_chunk):
    set_chunk(2)
    model, batch = make_model(LLAMA), make_batch(scored_from=(0, 0, 0, 0))
    inject_lora(model, HEADS["frozen"])
    saved = [
        count_saved_bytes(lambda way=way: score_tokens(model, batch, by_chunk=way), model=model)
        for way in (False, True)
    ]
    num_positions, num_scored, token_bytes = batch["targets"].numel(), 23, 8 * VOCABULARY
    # by chunk, hidden states of 24 numbers and their gradients are kept for each scored token; with all logits, they
    # are kept in float64 with their log-softmax
    assert saved[1] < saved[0] - num_positions * token_bytes + 3 * 8 * 24 * num_scored


class MixingLM(transformers.LlamaForCausalLM):
    """Subtracts from each token's logits the mean over its row."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(1, keepdim=True)
        return output


def test_models_whose_logits_need_more_than_the_last_hidden_state_are_refused():
    assert not can_score_by_chunk(MixingLM(make_model(LLAMA).config))
    assert not can_score_by_chunk(nn.Linear(2, 2))
    assert not can_score_by_chunk(make_model(LLAMA).model)  # a decoder without a head


def test_a_head_that_is_no_linear_layer_gives_the_losses_and_gradients_of_all_logits(set_chunk):
    set_chunk(4)
    model = make_model(LLAMA)
    model.lm_head = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, VOCABULARY)).double()
    assert can_score_by_chunk(model)
    inject_lora(model, LoraConfig(rank=2))
    randomise(model)
    assert_both_ways_are_equal(model)


@pytest.mark.release
def test_a_compiled_model_computes_all_logits():
    model, batch = make_model(LLAMA), make_batch()
    expected = score_tokens(model, batch, by_chunk=False)
    seen = []
    model.lm_head.register_forward_hook(lambda layer, args, output: seen.append(output.shape[:2]))
    model.compile(backend="eager")
    torch.testing.assert_close(score_tokens(model, batch, by_chunk=True), expected)
    assert seen == [batch["targets"].shape]
    assert compute_logits(model, batch).shape == (*batch["targets"].shape, VOCABULARY)

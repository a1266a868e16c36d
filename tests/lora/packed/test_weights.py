import copy

import pytest
import torch
from torch import nn

from lorasweep.lora import LoraConfig, inject_packed_lora, lora_state, merge_lora

from .conftest import get_trained, randomise, stream

CONFIGS = [
    LoraConfig(rank=2, alpha=3, dropout=0.1, rank_pattern={"1.up": 5}),
    LoraConfig(rank=1, targets=("proj",), scaling="alpha_over_sqrt_rank"),
    LoraConfig(rank=4, targets=("proj",), modules_to_save=("out",)),
]
TOKENS = torch.randint(11, (6, 5), generator=stream(1))


@pytest.fixture
def pack(make_model):
    """Returns a model with its slots, in evaluation mode."""
    model = make_model().eval()
    slots = inject_packed_lora(model, CONFIGS)
    for slot, solo in enumerate(slots.models):
        randomise(solo, slot)
    return model, slots


def compute_gradients(model, slots, *batches):
    """Returns the gradients of the pack after the forward passes of all micro-batches, then their backward passes."""
    slots.weights.zero_grad()
    for loss in [model(batch).float().square().sum() for batch in batches]:
        loss.backward()
    return [parameter.grad for parameter in slots.weights.parameters() if parameter.numel()]


def count_numbers(slots):
    return sum(value.numel() for solo in slots.models for value in get_trained(solo).values())


def test_the_model_of_a_slot_shares_the_base_and_computes_what_the_slot_does(pack):
    model, slots = pack
    packed = model(TOKENS).chunk(3)
    base = {id(parameter) for parameter in model.parameters()}
    for solo, rows, expected in zip(slots.models, TOKENS.chunk(3), packed, strict=True):
        assert base <= {id(parameter) for parameter in solo.parameters()}
        # fp32: at most 16 terms of size 1 in another order, through six layers
        torch.testing.assert_close(solo(rows), expected, rtol=1e-4, atol=1e-4)
        merged = copy.deepcopy(solo)
        merge_lora(merged)
        torch.testing.assert_close(merged(rows), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat(packed), model(TOKENS))  # merging left the pack alone


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_evaluation_after_a_change_in_place_has_the_new_values(pack, grad):
    model, slots = pack
    with grad():
        before = model(TOKENS)
    for solo in slots.models:
        randomise(solo, 9)
    with grad():
        after = model(TOKENS)
    assert not any(torch.equal(*rows) for rows in zip(before.chunk(3), after.chunk(3), strict=True))
    slots.weights.forget()
    with grad():
        assert torch.equal(after, model(TOKENS))


def test_parameters_of_solo_models_stay_views_after_a_move_to_another_dtype(pack):
    model, slots = pack
    before = [lora_state(solo) for solo in slots.models]
    model.double()
    slots.weights.double()
    for solo, state in zip(slots.models, before, strict=True):
        assert all(torch.equal(value, state[key].double()) for key, value in lora_state(solo).items())
    assert {factor.dtype for group in slots.weights.iter_groups() for factor in group.factors} == {torch.float64}
    with torch.no_grad():
        for parameter in slots.weights.parameters():
            parameter.zero_()
    assert not any(value.any() for solo in slots.models for value in get_trained(solo).values())
    base = model(TOKENS)
    randomise(slots.models[1], 3)
    assert [torch.equal(*rows) for rows in zip(base.chunk(3), model(TOKENS).chunk(3), strict=True)] == [
        True,
        False,
        True,
    ]


def test_the_padding_of_lower_ranks_stays_zero_in_training(pack):
    model, slots = pack
    optimizer = torch.optim.AdamW(slots.weights.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        compute_gradients(model.train(), slots, TOKENS)
        optimizer.step()
    tensors = [p.detach().clone() for p in slots.weights.parameters()]
    with torch.no_grad():
        for value in (value for solo in slots.models for value in get_trained(solo).values()):
            assert value.ne(0).all()
            value.zero_()  # what is left belongs to no slot
    assert sum(tensor.numel() for tensor in tensors) > count_numbers(slots)
    assert sum(int(tensor.count_nonzero()) for tensor in tensors) == count_numbers(slots)
    assert not any(parameter.any() for parameter in slots.weights.parameters())


def test_gradients_of_micro_batches_add_up_in_fp32_beside_a_bf16_base():
    torch.manual_seed(0)
    shared = nn.Linear(24, 24)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(24, 40)).bfloat16()
    # scalings are powers of two, so that the sum of scaled bf16 gradients is exact in fp32
    slots = inject_packed_lora(model, [LoraConfig(rank=rank, alpha=2 * rank) for rank in (1, 20, 3)])
    for solo in slots.models:
        randomise(solo, 1)
    batches = [torch.randn(3 * rows, 24).bfloat16() for rows in (2, 3)]
    apart = zip(*(compute_gradients(model, slots, batch) for batch in batches), strict=True)
    expected = [one + other for one, other in apart]
    found = compute_gradients(model, slots, *batches)
    assert {grad.dtype for grad in found} == {torch.float32}
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("limits", [[0.1, 0.2, 0.3], [0.1, 1e9, None], [None, None, None]])
def test_the_gradients_of_each_slot_are_clipped_as_those_of_a_run_alone(pack, limits):
    model, slots = pack
    compute_gradients(model, slots, TOKENS)
    places = slots.weights.places
    expected = []
    for (group, row), limit in zip(places, limits, strict=True):
        own = [nn.Parameter(tensor.detach()[row].clone()) for tensor in (group.lora, group.others)]
        for parameter, tensor in zip(own, (group.lora, group.others), strict=True):
            parameter.grad = None if tensor.grad is None else tensor.grad[row].clone()
        if limit is not None:
            nn.utils.clip_grad_norm_(own, limit)
        expected.append([parameter.grad for parameter in own])
    slots.weights.clip_gradients(limits)
    for (group, row), grads in zip(places, expected, strict=True):
        for tensor, grad in zip((group.lora, group.others), grads, strict=True):
            if grad is not None:
                torch.testing.assert_close(tensor.grad[row], grad)  # the same fp32 sum in another order

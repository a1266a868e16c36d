import copy

import pytest
import torch
from torch import nn

from lorasweep.lora import (
    LoraConfig,
    compact_slots,
    fill_slot,
    inject_lora,
    lora_state,
    merge_lora,
    set_dropout_streams,
    slot_model,
)
from lorasweep.lora.packed.inject import find_slots
from lorasweep.lora.packed.layers import packed_layers, packed_trained_modules

from .conftest import stream

CONFIGS = [
    LoraConfig(rank=2, alpha=3, dropout=0.1, rank_pattern={"1.up": 5}),
    LoraConfig(rank=1, targets=("proj",), scaling="alpha_over_sqrt_rank"),
    LoraConfig(rank=4, targets=("proj",), modules_to_save=("out",)),
]


@pytest.fixture
def both(make_model, make_pack):
    return make_pack(make_model, CONFIGS)


def states(model):
    """Copies of the states of all slots."""
    return [copy.deepcopy(lora_state(slot_model(model, slot))) for slot in range(find_slots(model).num_slots)]


def assert_identical(got, expected):
    assert list(got) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in got.items())


def test_a_slot_as_a_model_shares_the_base_and_computes_what_the_slot_does(both, make_model):
    tokens = torch.randint(11, (3, 5), generator=stream(1))
    both.pack.eval()
    packed = both.pack(tokens).chunk(3)
    base = {id(layer.base.weight) for layer in packed_layers(both.pack).values()}
    for slot, rows in enumerate(tokens.chunk(3)):
        solo = slot_model(both.pack, slot)
        assert base <= {id(p) for p in solo.parameters()}
        torch.testing.assert_close(solo(rows), packed[slot])
        merged = copy.deepcopy(solo)
        merge_lora(merged)
        torch.testing.assert_close(merged(rows), packed[slot])
    torch.testing.assert_close(torch.cat(both.pack(tokens).chunk(3)), torch.cat(packed))  # merging left the pack alone


def test_a_filled_slot_starts_as_its_solo_run_and_the_others_stay(both, make_model):
    before = states(both.pack)
    config = LoraConfig(rank=3, targets=("up", "proj"))
    coverage = fill_slot(both.pack, 1, config, generator=stream(9))
    solo = make_model()
    assert coverage == inject_lora(solo, config, generator=stream(9))
    assert_identical(lora_state(slot_model(both.pack, 1)), lora_state(solo))
    for slot in (0, 2):
        assert_identical(lora_state(slot_model(both.pack, slot)), before[slot])


def test_layers_that_no_slot_adapted_are_added(make_model, make_pack):
    both = make_pack(make_model, [LoraConfig(rank=2, targets=("up",))] * 2)
    before = states(both.pack)[0]
    fill_slot(both.pack, 1, LoraConfig(rank=2, targets=("0.proj",), modules_to_save=("out",)))
    assert list(packed_trained_modules(both.pack)) == ["out"]
    assert_identical(lora_state(slot_model(both.pack, 0)), before)
    assert list(packed_layers(both.pack)) == ["layers.0.up", "layers.0.proj", "layers.1.up"]
    assert both.pack(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 11)


def test_a_slot_is_added_after_the_last(both, make_model):
    before = states(both.pack)
    config = LoraConfig(rank=3, targets=("up", "proj"))
    fill_slot(both.pack, 3, config, generator=stream(9))
    slot_model(both.pack, 3).double()
    solo = make_model().double()
    inject_lora(solo, config, generator=stream(9))
    both.solos.append(solo.double())
    assert find_slots(both.pack).num_slots == 4
    for slot in range(3):
        assert_identical(lora_state(slot_model(both.pack, slot)), before[slot])
    both.assert_equal(torch.randint(11, (8, 5), generator=stream(1)))


def test_compaction_keeps_the_slots_asked_for_in_that_order(both):
    before = states(both.pack)
    streams = [stream(k) for k in range(3)]
    set_dropout_streams(both.pack, streams)
    compact_slots(both.pack, [2, 0])
    assert find_slots(both.pack).num_slots == 2
    assert_identical(lora_state(slot_model(both.pack, 0)), before[2])
    assert_identical(lora_state(slot_model(both.pack, 1)), before[0])
    assert packed_layers(both.pack)["layers.0.up"].slots.generators == [streams[2], streams[0]]
    both.solos = [both.solos[2], both.solos[0]]
    both.assert_equal(torch.randint(11, (4, 5), generator=stream(1)))


def test_compaction_drops_what_no_slot_needs(both):
    with find_slots(both.pack).stacks.share():
        both.pack(torch.randint(11, (3, 5), generator=stream(1)))
    compact_slots(both.pack, [1])
    assert not find_slots(both.pack).stacks._leaves  # the memory of all slots' stacks
    assert list(packed_layers(both.pack)) == ["layers.0.proj", "layers.1.proj"]
    assert {len(layer.lora_a) for layer in packed_layers(both.pack).values()} == {1}
    assert not packed_trained_modules(both.pack)
    assert isinstance(both.pack.out, nn.Linear)
    both.solos = [both.solos[1]]
    both.assert_equal(torch.randint(11, (2, 5), generator=stream(1)))

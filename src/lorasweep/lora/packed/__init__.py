"""Many trials in one forward pass on one frozen base: a stacked change per layer, one slot per trial.

    coverages = inject_packed_lora(model, [LoraConfig(rank=4), LoraConfig(rank=64)])  # inputs: slot-major, 2 · B rows

`inject` puts `layers` in place, which compute by `functional` and draw `dropout` from one stream per slot; `trained` is
what slots train in full. `slots` reads, writes, refills and drops single slots.
"""

from lorasweep.lora.packed.dropout import SlotDropout
from lorasweep.lora.packed.functional import packed_lora_linear
from lorasweep.lora.packed.inject import (
    inject_packed_lora,
    num_slots,
    set_dropout_streams,
    set_row_lengths,
    split_packed_parameters,
    why_not_packable,
)
from lorasweep.lora.packed.layers import (
    PackedLoraConv2d,
    PackedLoraEmbedding,
    PackedLoraLayer,
    PackedLoraLinear,
    packed_layers,
)
from lorasweep.lora.packed.slots import (
    FilledSlot,
    compact_slots,
    fill_slot,
    load_slot,
    save_slot,
    slot_model,
    slot_state,
)
from lorasweep.lora.packed.trained import StackedModule, stacked_modules

__all__ = [
    "FilledSlot",
    "PackedLoraConv2d",
    "PackedLoraEmbedding",
    "PackedLoraLayer",
    "PackedLoraLinear",
    "SlotDropout",
    "StackedModule",
    "compact_slots",
    "fill_slot",
    "inject_packed_lora",
    "load_slot",
    "num_slots",
    "packed_layers",
    "packed_lora_linear",
    "save_slot",
    "set_dropout_streams",
    "set_row_lengths",
    "slot_model",
    "slot_state",
    "split_packed_parameters",
    "stacked_modules",
    "why_not_packable",
]

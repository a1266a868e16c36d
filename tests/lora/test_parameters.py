from __future__ import annotations

from torch import nn

from lorasweep.lora import LoraConfig, inject_lora, split_lora_parameters


def test_every_trained_parameter_is_in_one_group(model: nn.Module) -> None:
    config = LoraConfig(rank=2, targets=("up", "embed"), variant="dora", modules_to_save=("out",), bias="all")
    inject_lora(model, config)
    a, b, other = split_lora_parameters(model)
    assert [tuple(p.shape) for p in a] == [(2, 11), (2, 8), (2, 8)]
    assert [tuple(p.shape) for p in b] == [(8, 2), (16, 2), (16, 2)]
    assert len(other) == 3 + 1 + 2  # row lengths, the head's copy, the biases of `proj`
    assert {id(p) for p in (*a, *b, *other)} == {id(p) for p in model.parameters() if p.requires_grad}

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from lorasweep.lora import LoraConfig, inject_lora, layers


def test_wrong_shapes_are_refused_with_the_argument_and_its_shape() -> None:
    x, weight = torch.ones(3, 5), torch.ones(4, 5)
    a, b = torch.ones(1, 2, 5), torch.ones(1, 4, 3)  # ranks 2 and 3
    with pytest.raises(TypeCheckError, match=r"(?s)lora_b.*slots d_out rank"):
        layers.lora_linear(x, weight, None, a, b, factor=1.0)


def test_shapes_are_checked_when_a_layer_computes(model) -> None:
    inject_lora(model, LoraConfig(rank=2, targets="up"))
    model.layers[0].up.lora_a.data = torch.ones(3, 8)  # B has rank 2
    with pytest.raises(TypeCheckError, match="lora_b"):
        model(torch.zeros(1, 5, dtype=torch.long))

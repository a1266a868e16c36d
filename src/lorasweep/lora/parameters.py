"""The parameters that train, by their part in the change: for optimizers that treat A and B differently (LoRA+)."""

from __future__ import annotations

from torch import nn

from lorasweep.lora.layers import lora_layers


def split_lora_parameters(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The A matrices, the B matrices, and what else trains (row lengths, heads, biases), in the model's order.

    LoRA+ (arXiv 2402.12354, section 4) gives B a learning rate `optim.lr_ratio_b` times that of A. In an embedding it
    is A that starts at zero; it counts as A all the same.
    """
    layers = lora_layers(model).values()
    a_parameters = [layer.lora_a for layer in layers if layer.lora_a.requires_grad]
    b_parameters = [layer.lora_b for layer in layers if layer.lora_b.requires_grad]
    taken = {id(parameter) for parameter in (*a_parameters, *b_parameters)}
    other = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return a_parameters, b_parameters, other

import pytest
import torch
from torch import nn

from lorasweep.lora import LoraConfig, LoraLayer, inject_lora, lora_layers, split_lora_parameters
from lorasweep.lora.layers import draw_matrices
from lorasweep.lora.targets import Target


def stream():
    return torch.Generator().manual_seed(0)


def test_encoders_of_torch_apply_their_updates_in_evaluation_too_and_torchs_settings_stay():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 3, 8).double(), torch.tensor([[False, False, False], [False, False, True]])
    for encoder, arguments in ((layer, {}), (nn.TransformerEncoder(layer, 2), {"src_key_padding_mask": padding})):
        inject_lora(encoder, LoraConfig(targets=["linear1", "linear2"], rank=2))
        for adapted in lora_layers(encoder).values():
            nn.init.normal_(adapted.lora_b)
        encoder.double()
        expected = encoder(x, **arguments)
        with torch.no_grad():
            torch.testing.assert_close(encoder.eval()(x, **arguments), expected)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "forward"])
def test_a_base_with_hooks_is_called(hook):
    base, x, calls = nn.Linear(6, 10).double(), torch.randn(3, 6).double(), []
    if hook == "forward":
        base.forward = lambda x: calls.append(1) or nn.Linear.forward(base, x)  # as accelerate wraps a layer
    else:
        getattr(base, hook)(lambda *_: calls.append(1))
    layer = LoraLayer(base, Target(config=LoraConfig(rank=4), rank=4, alpha=8.0)).double()
    nn.init.normal_(layer.lora_b)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, base.weight + layer.compute_weight_update(), base.bias)
    )
    assert calls == [1]


def test_injecting_twice_is_refused(model):
    inject_lora(model, LoraConfig(rank=2, targets=("layers.0.up",)))
    with pytest.raises(ValueError, match=r"no LoRA layers yet, but 'layers.0.up' is one"):
        inject_lora(model, LoraConfig(rank=2))


def test_every_trained_parameter_is_in_one_group(model):
    config = LoraConfig(rank=2, targets=("up",), modules_to_save=("out",))
    inject_lora(model, config)
    a, b, other = split_lora_parameters(model)
    assert [tuple(p.shape) for p in a] == [(2, 8), (2, 8)]
    assert [tuple(p.shape) for p in b] == [(16, 2), (16, 2)]
    assert len(other) == 1  # the head's copy
    assert {id(p) for p in (*a, *b, *other)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_is_drawn_as_a_linear_layer_of_torch_and_b_is_zero():
    torch.manual_seed(0)
    drawn, b = draw_matrices(d_out=6, d_in=400, rank=8, generator=stream())
    assert torch.equal(drawn, nn.Linear(400, 8, bias=False).weight)
    assert not b.any()

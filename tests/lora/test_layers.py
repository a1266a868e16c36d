import copy

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from lorasweep.lora import LoraConfig, LoraLayer, inject_lora, merge_lora, split_lora_parameters
from lorasweep.lora.targets import Target


def test_an_encoder_layer_of_torch_applies_its_update_in_evaluation_too():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    inject_lora(encoder, LoraConfig(targets=["linear1", "linear2"], rank=2))
    for layer in (encoder.linear1, encoder.linear2):
        nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 3, 8)
    expected = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", ["alpha_over_rank", "alpha_over_sqrt_rank"])
def test_equals_pefts_layer_with_the_same_a_and_b(bias, rule):
    torch.manual_seed(0)
    base = nn.Linear(6, 10, bias=bias)
    ours = LoraLayer(copy.deepcopy(base), Target(config=LoraConfig(scaling=rule), rank=4, alpha=8.0))
    peft_config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rule == "alpha_over_sqrt_rank")
    theirs = PeftLinear(base, "default", config=peft_config, r=4, lora_alpha=8)
    with torch.no_grad():
        ours.lora_b.normal_()
        theirs.lora_A["default"].weight.copy_(ours.lora_a)
        theirs.lora_B["default"].weight.copy_(ours.lora_b)
    x = torch.randn(3, 5, 6, requires_grad=True)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)  # float32 defaults: the same products, scaled before or after
    grads = torch.autograd.grad(out.pow(2).sum(), [x, ours.lora_a, ours.lora_b])
    reference = torch.autograd.grad(
        expected.pow(2).sum(), [x, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    )
    torch.testing.assert_close(grads, reference, rtol=1e-5, atol=1e-4)  # sums of 15 squares: entries near 100


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "forward"])
def test_a_base_with_hooks_is_called(hook):
    base, x, calls = nn.Linear(6, 10), torch.randn(3, 6), []
    if hook == "forward":
        base.forward = lambda x: calls.append(1) or nn.Linear.forward(base, x)  # as accelerate wraps a layer
    else:
        getattr(base, hook)(lambda *_: calls.append(1))
    layer = LoraLayer(base, Target(config=LoraConfig(rank=4), rank=4, alpha=8.0))
    nn.init.normal_(layer.lora_b)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, base.weight + layer.compute_weight_update(), base.bias)
    )
    assert calls == [1]


def test_an_embedding_that_scales_its_rows_scales_the_change():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, tokens):
            return super().forward(tokens) * self.embed_scale

    model = nn.ModuleDict({"embed": Scaled(7, 4)})
    inject_lora(model, LoraConfig(rank=2, targets=("embed",)))
    nn.init.normal_(model["embed"].lora_a)
    tokens = torch.tensor([[0, 6], [3, 3]])
    separate = model["embed"](tokens)
    merge_lora(model)
    torch.testing.assert_close(model["embed"](tokens), separate)


def test_every_trained_parameter_is_in_one_group(model):
    config = LoraConfig(rank=2, targets=("up", "embed"), variant="dora", modules_to_save=("out",))
    inject_lora(model, config)
    a, b, other = split_lora_parameters(model)
    assert [tuple(p.shape) for p in a] == [(2, 11), (2, 8), (2, 8)]
    assert [tuple(p.shape) for p in b] == [(8, 2), (16, 2), (16, 2)]
    assert len(other) == 3 + 1  # row norms, the head's copy
    assert {id(p) for p in (*a, *b, *other)} == {id(p) for p in model.parameters() if p.requires_grad}

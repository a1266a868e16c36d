import torch
from tests.rounding import assert_equal_up_to_rounding
from torch import nn

from lorasweep.lora import LoraConfig, LoraLayer, inject_lora, load_adapter, lora_layers, merge_lora, save_adapter


class IntegerLinear(nn.Linear):
    """A quantised layer in a few lines: weights as whole numbers, dequantised at use."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.step = self.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((self.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


def make_quantised():
    torch.manual_seed(0)
    return nn.Sequential(IntegerLinear(8, 16), nn.Tanh(), IntegerLinear(16, 4))


def adapt(model):
    inject_lora(model, LoraConfig(rank=2, targets="all-linear"))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def test_a_quantised_base_computes_its_own_output_and_the_change_is_added():
    model, x = adapt(make_quantised()), torch.randn(3, 8, requires_grad=True)
    layer = model[0]
    assert isinstance(layer, LoraLayer)
    assert layer.calls_base
    expected = layer.base(x) + layer.scaling * x @ layer.lora_a.t() @ layer.lora_b.t()
    assert_equal_up_to_rounding(layer(x), expected, terms=2 * 8 + 2)  # 8 inputs of the base and of A, 2 ranks
    model(x).sum().backward()
    assert x.grad.any()
    assert layer.lora_a.grad.any()


def test_an_adapter_of_a_quantised_base_is_saved_loaded_and_merged_into_dequantised_layers(tmp_path):
    model, x = adapt(make_quantised()), torch.randn(3, 8)
    expected = model(x)
    save_adapter(model, tmp_path, base_path="")
    loaded = adapt(make_quantised())
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), expected)
    merge_lora(model)
    assert type(model[0]) is nn.Linear
    # two layers with 8 and 16 inputs, each with its change's two products
    assert_equal_up_to_rounding(model(x), expected, terms=2 * (8 + 16 + 2 * 2))

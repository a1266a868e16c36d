import pytest
import torch

from lorasweep.lora import LoraConfig, inject_lora
from lorasweep.lora.fully_trained import trained_modules


def adapt(model, **changes):
    inject_lora(model, LoraConfig(rank=2, targets=("up",), **changes))
    return model


def step(model, tokens):
    model(tokens).float().pow(2).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad


def test_a_module_to_save_trains_on_a_copy(make_model, tokens):
    model, base = make_model(), make_model()
    adapt(model, modules_to_save=("out",))
    assert torch.equal(model(tokens), base(tokens))
    step(model, tokens)
    assert torch.equal(model.out.base.weight, base.out.weight)
    assert not torch.equal(model.out.weight, base.out.weight)
    assert model.get_output_embeddings() is model.out


def test_the_copy_is_fp32_on_a_bf16_base(make_model, tokens):
    model = adapt(make_model().bfloat16(), modules_to_save=("out", "embed"))
    assert {p.dtype for p in trained_modules(model)["out"].trained.parameters()} == {torch.float32}
    assert model(tokens).dtype is torch.bfloat16
    step(model, tokens)
    assert trained_modules(model)["embed"].weight.dtype is torch.float32


def test_layers_inside_a_module_to_save_get_no_change(make_model):
    model = make_model()
    coverage = inject_lora(model, LoraConfig(rank=2, targets=("all-linear",), modules_to_save=("layers.1",)))
    assert coverage.layers == ("layers.0.up", "layers.0.proj")
    full = sum(p.numel() for p in make_model().layers[1].parameters())
    assert coverage.trainable_params == 2 * 2 * (8 + 16) + full


def test_modules_with_a_tied_weight_must_be_named_together(make_model, tokens):
    model = make_model()
    model.out.weight = model.embed.weight
    with pytest.raises(ValueError, match=r"`method.modules_to_save` must include 'embed'"):
        adapt(model, modules_to_save=("out",))
    adapt(model, modules_to_save=("out", "embed"))
    assert model.out.weight is model.embed.weight
    step(model, tokens)

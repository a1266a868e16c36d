import copy

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from lorasweep.lora import LoraConfig, LoraLayer, inject_lora, lora_layers, merge_lora, split_lora_parameters
from lorasweep.lora.layers import draw_matrices, split_principal_part
from lorasweep.lora.targets import Target


def test_encoders_of_torch_apply_their_updates_in_evaluation_too_and_torchs_settings_stay():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, False], [False, False, True]])
    for encoder, arguments in ((layer, {}), (nn.TransformerEncoder(layer, 2), {"src_key_padding_mask": padding})):
        inject_lora(encoder, LoraConfig(targets=["linear1", "linear2"], rank=2))
        for adapted in lora_layers(encoder).values():
            nn.init.normal_(adapted.lora_b)
        expected = encoder(x, **arguments)
        with torch.no_grad():
            torch.testing.assert_close(encoder.eval()(x, **arguments), expected)
    assert torch.backends.mha.get_fastpath_enabled()


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


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("is_embedding", [True, False])
def test_the_change_starts_at_zero_and_can_learn(init, is_embedding):
    a, b = draw_matrices(d_out=6, d_in=10, rank=4, init=init, is_embedding=is_embedding)
    assert (a.shape, b.shape) == ((4, 10), (6, 4))
    torch.testing.assert_close(b @ a, torch.zeros(6, 10))  # orthogonal rows: zero up to rounding
    assert a.any() or b.any()


def draw(init, *, d_in=400):
    return draw_matrices(d_out=6, d_in=d_in, rank=8, init=init, generator=torch.Generator().manual_seed(0))


def test_how_each_way_starts():
    torch.manual_seed(0)
    assert torch.equal(draw("default")[0], nn.Linear(400, 8, bias=False).weight)
    assert draw("gaussian", d_in=10_000)[0].std().item() == pytest.approx(1 / 8, rel=0.02)  # 80,000 draws: 0.25 %
    assert all(matrix.any() for matrix in draw("orthogonal", d_in=10))
    assert torch.equal(draw("orthogonal")[0], draw("orthogonal")[0])


def test_pissa_takes_the_principal_part():
    matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    a, b = split_principal_part(matrix, rank=2, scaling=3.0)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(3.0 * b @ a, u[:, :2] * s[:2] @ vh[:2])
    torch.testing.assert_close((b.norm(dim=0), a.norm(dim=1)), ((s[:2] / 3).sqrt(),) * 2)  # shared evenly

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from transformers.pytorch_utils import Conv1D

from lorasweep.lora import LoraConfig, inject_lora, inject_packed_lora
from lorasweep.lora.packed.layers import packed_layers

SLOTS, ROWS = 3, 2


def tokens_of(vocabulary, *shape):
    return torch.randint(vocabulary, (SLOTS * ROWS, *shape), generator=torch.Generator().manual_seed(1))


def numbers(*shape):
    return torch.randn(SLOTS * ROWS, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def seeded(model):
    """The same model with values that depend on nothing but its shapes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def make_shared():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


class Head(nn.Module):
    """A head of several layers with dropout between, which takes a mask and gives more than one thing."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.dense = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(6, 3, bias=False)

    def forward(self, x, *, mask, scale):
        hidden = self.dropout(torch.tanh(self.dense(self.norm(x)))) * mask[:, None] * scale
        return {"logits": self.out(hidden), "kind": "head"}


class WithHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = head
        self.takes_mask = isinstance(head, Head)

    def forward(self, x):
        hidden = self.body(x)
        if self.takes_mask:
            output = self.head(hidden, mask=(x[:, 0] > 0).to(x), scale=torch.tensor(2.0).to(x))
            assert output["kind"] == "head"
            return output["logits"]
        return self.head(hidden)


def make_head(head=Head):
    return WithHead(head())


HEADED = [LoraConfig(rank=2, targets=("body",), modules_to_save=("head",))] * 2
CASES = {
    "groups of ranks": (
        lambda: nn.Sequential(nn.Linear(40, 36), nn.Tanh(), nn.Linear(36, 40)),
        [LoraConfig(rank=1, dropout=0.2), LoraConfig(rank=20), LoraConfig(rank=33, targets=("2",), dropout=0.4)],
        numbers(3, 40),
    ),
    "conv1d": (
        lambda: nn.Sequential(Conv1D(12, 6), nn.Tanh(), Conv1D(4, 12)),
        [LoraConfig(rank=2), LoraConfig(rank=3, targets=("2",), dropout=0.5), LoraConfig(rank=1, targets=("0",))],
        numbers(3, 6),
    ),
    "composite head of some": (make_head, [LoraConfig(rank=1, targets=("body",), dropout=0.2), *HEADED], numbers(4)),
    "linear head of some": (
        lambda: make_head(lambda: nn.Linear(6, 3)),
        [*HEADED, LoraConfig(rank=1, targets=("body",))],
        numbers(4),
    ),
    "two names": (
        make_shared,
        [LoraConfig(rank=2, dropout=0.2), LoraConfig(rank=1), LoraConfig(rank=3)],
        numbers(6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pack_of_mixed_slots_equals_packs_of_one_and_solo_models(make_packs, case):
    make, configs, inputs = CASES[case]
    make_packs(lambda: seeded(make()), configs).assert_equal(inputs)


def test_linear_layers_of_mixed_slots(make_model, make_packs):
    configs = [
        LoraConfig(rank=3, alpha=5, dropout=0.4),
        LoraConfig(rank=1, targets=("1.up",), scaling="alpha_over_sqrt_rank"),
        LoraConfig(
            rank=2, targets=("proj", "0.up"), rank_pattern={"0.proj": 4}, alpha_pattern={"0.up": 1.0}, dropout=0.1
        ),
    ]
    make_packs(make_model, configs).assert_equal(tokens_of(11, 5))


def test_a_base_with_hooks_computes_its_own_output(make_packs):
    def make():
        model = seeded(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)))
        model[0].register_forward_hook(lambda module, args, output: output * 2)
        return model

    configs = [
        LoraConfig(rank=2, dropout=0.3),
        LoraConfig(rank=1, targets=("0",)),
        LoraConfig(rank=3, targets=("0", "1")),
    ]
    both = make_packs(make, configs)
    assert packed_layers(both.pack.model)["0"].calls_base
    assert not packed_layers(both.pack.model)["1"].calls_base
    both.assert_equal(numbers(3, 6))


def test_gradients_of_a_whole_pack_by_finite_differences(make_packs):
    def make():
        return seeded(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3)))

    configs = [
        LoraConfig(rank=2, targets=("1",), dropout=0.4, modules_to_save=("4",)),
        LoraConfig(rank=1, targets=("1",), dropout=0.2),
        LoraConfig(rank=2, targets=("1",), modules_to_save=("4",)),
    ]
    pack = make_packs(make, configs).pack

    def run(*_):
        pack.slots.masks.begin(0)
        pack.slots.weights.forget()  # gradcheck moves the parameters in place without a new version
        return pack.model(tokens_of(7, 2)).pow(2)

    assert gradcheck(run, tuple(pack.slots.weights.parameters()))


def test_rows_that_slots_do_not_share_out_evenly_are_refused(make_model):
    model = make_model()
    inject_packed_lora(model, [LoraConfig(rank=1), LoraConfig(rank=2)])
    with pytest.raises(ValueError, match=r"must be a multiple of the 2 slots, but got shape \(3, 5, 8\)"):
        model(torch.zeros(3, 5, dtype=torch.long))


@pytest.mark.parametrize("head", [Head, lambda: nn.Linear(6, 3)], ids=["composite", "linear"])
def test_modules_that_train_in_full_are_fp32_beside_a_bf16_base(head):
    config = LoraConfig(rank=1, targets=("body",), modules_to_save=("head",))
    model = seeded(make_head(head)).bfloat16().eval()
    slots = inject_packed_lora(model, [config], generators=[torch.Generator().manual_seed(0)])
    solo = seeded(make_head(head)).bfloat16().eval()
    inject_lora(solo, config, generator=torch.Generator().manual_seed(0))
    x = numbers(4).bfloat16()
    output = model(x)
    assert output.dtype is torch.bfloat16
    # Sums in another order, rounded to bf16: one spacing of the largest output, since those near 0 are differences.
    torch.testing.assert_close(output, solo(x), rtol=0, atol=2**-7 * float(output.detach().abs().max()))
    output.float().sum().backward()
    assert {(p.dtype, p.grad.dtype) for p in slots.weights.parameters()} == {(torch.float32, torch.float32)}

import pytest
import torch
from torch import nn

from lorasweep.lora import LoraConfig, inject_lora, inject_packed_lora
from lorasweep.lora.packed.layers import packed_trained_modules

HEAD = ("head",)


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


class Model(nn.Module):
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


def make(head):
    torch.manual_seed(0)
    return Model(head())


HEADS = {"composite": Head, "linear": lambda: nn.Linear(6, 3), "without bias": lambda: nn.Linear(6, 3, bias=False)}


def rows(*, dtype=torch.float64):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("some", [True, False])
def test_heads_train_per_slot(make_pack, head, some):
    first = LoraConfig(rank=1, targets=("body",), dropout=0.2, modules_to_save=() if some else HEAD)
    both = make_pack(
        lambda: make(HEADS[head]), [first, *[LoraConfig(rank=2, targets=("body",), modules_to_save=HEAD)] * 2]
    )
    both.assert_equal(rows())


@pytest.mark.parametrize("head", ["composite", "linear"])
def test_copies_are_fp32_beside_a_bf16_base(head):
    config = LoraConfig(rank=1, targets=("body",), modules_to_save=HEAD)
    model = make(HEADS[head]).bfloat16().eval()
    inject_packed_lora(model, [config] * 2, generators=[torch.Generator().manual_seed(0)] * 2)
    solo = make(HEADS[head]).bfloat16().eval()
    inject_lora(solo, config, generator=torch.Generator().manual_seed(0))
    (packed,) = packed_trained_modules(model).values()
    assert {p.dtype for p in packed.trained} == {torch.float32}
    x = rows(dtype=torch.bfloat16)
    output = model(x)
    assert output.dtype is torch.bfloat16
    # Sums in another order, rounded to bf16: one spacing of the largest output, since those near 0 are differences.
    torch.testing.assert_close(output, solo(x), rtol=0, atol=2**-7 * float(output.detach().abs().max()))
    output.float().sum().backward()
    assert {p.grad.dtype for p in packed.trained} == {torch.float32}

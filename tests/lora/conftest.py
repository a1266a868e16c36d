"""A small model with the shapes of a language model, made anew for each test."""

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor, nn

from lorasweep.lora import functional, layers
from lorasweep.lora.packed import weights


class Block(nn.Module):
    """Two projections with a nonlinearity between; `proj` has a bias, `up` has none."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.act = nn.Tanh()
        self.proj = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.proj(self.act(self.up(x)))


class TinyLM(nn.Module):
    """Embedding, two blocks, and an output head that `get_output_embeddings` names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(8, 11, bias=False)

    def get_output_embeddings(self):
        return self.out

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.out(hidden)


def make_tiny_lm():
    torch.manual_seed(0)
    return TinyLM()


@pytest.fixture
def make_model():
    """Makes equal models: the same weights at each call."""
    return make_tiny_lm


@pytest.fixture
def model():
    return make_tiny_lm()


@pytest.fixture
def tokens():
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fill_b():
    """Gives every B of a model random values, so that the change is not zero."""

    def fill(adapted):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if name.endswith("lora_b"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))

    return fill


@pytest.fixture(autouse=True)
def check_shapes(monkeypatch, request):
    """Checks the shapes in the signatures of `lora.functional` at each call that a layer makes."""
    if "compiles" in request.node.name:  # the check itself would break the graph
        return
    for name in ("lora_linear", "linear_update"):
        checked = jaxtyped(typechecker=beartype)(getattr(functional, name))
        monkeypatch.setattr(layers, name, checked)
    monkeypatch.setattr(layers, "SlotGroup", make_checked_group)
    monkeypatch.setattr(weights, "SlotGroup", make_checked_group)


@jaxtyped(typechecker=beartype)
def make_checked_group(
    lora_a: Float[Tensor, "slots rank d_in"],
    lora_b: Float[Tensor, "slots d_out rank"],
) -> functional.SlotGroup:
    return functional.SlotGroup(lora_a, lora_b)

import copy
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from lorasweep.lora import LoraConfig, inject_lora
from lorasweep.lora.recompute import ActivationOutput, RecomputedActivation, restore_activations

WIDTH, HIDDEN, ROWS = 6, 10, 7


class Mlp(nn.Module):
    """`down(act(gate(x)) * up(x))` as in Llama, or `down(act(gate(x)))` as in BERT and GPT-2."""

    def __init__(self, activation, *, is_gated):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN) if is_gated else None
        self.act = ACT2FN[activation]
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        activated = self.act(self.gate(x))
        return self.down(activated if self.up is None else activated * self.up(x))


def make_mlp(activation="gelu_new", *, is_gated=False, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    model = Mlp(activation, is_gated=is_gated).to(dtype)
    inject_lora(model, LoraConfig(rank=2, dropout=dropout))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    return model


def make_plain(model):
    plain = copy.deepcopy(model)
    restore_activations(plain)
    return plain


def make_x(dtype=torch.float64):
    return torch.randn(ROWS, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model, x, compute=None):
    """Output, and gradients of everything that trains and of x."""
    torch.manual_seed(2)
    output = model(x) if compute is None else compute(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad(output.float().pow(2).sum(), [*trained, x])]


def assert_identical(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def count_kept(model, x):
    """Number of kept tensors of the size of an activation."""
    kept = set()

    def pack(tensor):
        if tensor.numel() == ROWS * HIDDEN:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return len(kept)


ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "silu", "swish", "mish", "relu2"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_and_gradients_are_bit_identical(activation, is_gated, dtype, dropout):
    model = make_mlp(activation, is_gated=is_gated, dtype=dtype, dropout=dropout)
    assert isinstance(model.act, RecomputedActivation)
    if dtype is torch.float64 and not dropout:
        assert gradcheck(model, make_x())
    assert_identical(gradients(model, make_x(dtype)), gradients(make_plain(model), make_x(dtype)))


def test_the_recomputation_runs_under_the_autocast_of_the_forward_pass():
    class GELU(nn.Module):
        """On a CPU, autocast changes only products of matrices."""

        def forward(self, z):
            return z @ torch.eye(HIDDEN)

    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), GELU(), nn.Linear(HIDDEN, WIDTH))
    inject_lora(model, LoraConfig(rank=2, targets=("2",)))
    z = torch.randn(ROWS, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        activated = model[1](z)
    assert isinstance(activated, ActivationOutput)
    assert activated.recomputation.compute(activated.inputs).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("activation", "is_gated", "kept", "kept_without"),
    [
        ("gelu", False, 1, 2),
        ("gelu_new", False, 1, 5),
        ("silu", True, 2, 4),
        ("gelu_new", True, 2, 7),
        ("relu", False, 1, 1),
    ],
)
def test_only_the_inputs_of_an_activation_are_kept(activation, is_gated, kept, kept_without):
    model = make_mlp(activation, is_gated=is_gated)
    assert count_kept(model, make_x()) == kept
    assert count_kept(make_plain(model), make_x()) == kept_without


@pytest.mark.parametrize("is_gated", [False, True])
def test_layers_that_share_an_activation_compute_it_once_in_the_backward_pass(is_gated):
    model = make_mlp(is_gated=is_gated)
    model.second = copy.deepcopy(model.down)
    calls = []
    model.act.base.forward = lambda z, forward=model.act.base.forward: calls.append("") or forward(z)
    activated = model.act(model.gate(make_x()))
    activated = activated if model.up is None else activated * model.up(make_x())
    output = model.down(activated) + model.second(activated)
    assert len(calls) == 1
    output.sum().backward()
    assert len(calls) == 2


def test_an_output_that_is_changed_in_place_is_kept():
    def compute(model, x):
        return model.down(model.act(model.gate(x)).mul_(3))

    model = make_mlp()
    found, expected = (gradients(m, make_x(), partial(compute, m)) for m in (model, make_plain(model)))
    assert_identical(found, expected)


@pytest.mark.parametrize("is_gated", [False, True])
def test_activation_checkpointing_keeps_nothing_and_gives_the_same_gradients(is_gated):
    model = make_mlp(is_gated=is_gated)

    def compute(x):
        return checkpoint(model, x, use_reentrant=False)

    assert_identical(gradients(model, make_x(), compute), gradients(make_plain(model), make_x()))
    outputs = []
    model.gate.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    output = compute(make_x())
    assert output.requires_grad
    assert [reference() for reference in outputs] == [None]

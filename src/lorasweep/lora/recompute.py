"""Activation functions that keep only their inputs for the backward pass and compute their output again there.

A LoRA layer needs its input for A's gradient. Behind an activation function, torch keeps this input beside the tensors
that the activation itself needs: GPT-2's GELU keeps 4 tensors, `silu(gate) * up` of Llama keeps 3. Here the activation
and the LoRA layer both keep the activation's inputs, which are the same tensors. The first of them that runs in the
backward pass computes the activation again, and the others use its result.

All tensors are kept with `save_for_backward`, so that checks of in-place changes, activation checkpointing and other
hooks of saved tensors work as without recomputation. The recomputation calls the same operations on the same values.
So outputs and gradients are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only  # see lora.fully_trained

RECOMPUTED_ACTIVATIONS = (
    *("GELU", "SiLU", "Mish"),  # torch
    *("GELUActivation", "GELUTanh", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation"),  # transformers
    *("ClippedGELUActivation", "AccurateGELUActivation", "SiLUActivation", "MishActivation", "ReLUSquaredActivation"),
)
"""Class names of activation functions whose backward pass needs their input. Names, so that this works without
transformers. ReLU, tanh and sigmoid are missing: their backward pass needs their output, which a LoRA layer shares."""


class Recomputation:
    """Computes an output again from the inputs that were kept. All users of the output share this object."""

    def __init__(self, function: Callable[..., Tensor], *, device_type: str) -> None:
        """Remembers `function` and the state of autocast, which is off in the backward pass."""
        self.function = function
        self._device_type = device_type
        self._autocast_dtype = torch.get_autocast_dtype(device_type)
        self._is_autocast = torch.is_autocast_enabled(device_type)
        self._result: tuple[list[Tensor], Tensor] | None = None

    def compute(self, inputs: Sequence[Tensor]) -> Tensor:
        """Returns the output for `inputs`. The result is kept until `differentiate` is called."""
        return self._run(inputs)[1].detach()

    def differentiate(self, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of `inputs` for the output's gradient `grad`."""
        leaves, output = self._run(inputs)
        self._result = None
        return torch.autograd.grad(output, leaves, grad)

    def _run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        if self._result is None:
            autocast = torch.autocast(self._device_type, dtype=self._autocast_dtype, enabled=self._is_autocast)
            with torch.enable_grad(), autocast:
                leaves = [tensor.detach().requires_grad_() for tensor in inputs]
                self._result = leaves, self.function(*leaves)
        return self._result


class ActivationOutput(Tensor):
    """Output of an activation function, which a LoRA layer can compute again from `inputs` instead of keeping it.

    The product with a tensor of the same shape, as in `silu(gate) * up`, is an `ActivationOutput` too. Any other
    operation works on `plain` and returns a plain tensor.

    Attributes:
        plain: The output as a plain tensor.
        inputs: The tensors from which `recomputation` computes the output.
        recomputation: How to compute the output again.
    """

    plain: Tensor
    inputs: tuple[Tensor, ...]
    recomputation: Recomputation
    _version_at_creation: int

    @property
    def is_unchanged(self) -> bool:
        """Whether the output still has the values that a recomputation gives: no in-place operation changed it."""
        return self.plain._version == self._version_at_creation

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (Tensor.mul, torch.mul) and len(args) == 2 and not kwargs:
            activated, factor = args if isinstance(args[0], cls) else args[::-1]
            if _can_recompute_product(activated, factor):
                activation, plain = activated.recomputation.function, activated.plain
                inputs = (*activated.inputs, factor)
                return _keep_inputs(lambda z, f: activation(z) * f, lambda: plain * factor, inputs)
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


class RecomputedActivation(nn.Module):
    """An activation function that keeps only its input for the backward pass.

    Attributes:
        base: The activation function that was replaced.
        widths: Input widths of the LoRA layers of the model. Outputs of another width can't be the input of a LoRA
            layer, so for them `base` is called as it is, and no time is spent on computing them again.
    """

    def __init__(self, base: nn.Module, *, widths: frozenset[int]) -> None:
        super().__init__()
        self.base = base
        self.widths = widths

    def forward(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        is_kept = input.requires_grad and torch.is_grad_enabled() and input.shape[-1] in self.widths
        # a compiler chooses itself what to recompute; distributed tensors and other subclasses stay as they are
        if not is_kept or torch.compiler.is_compiling() or type(input) is not Tensor:
            output: Tensor = self.base(input)
            return output
        return _keep_inputs(self.base, lambda: self.base(input), (input,))


def replace_activations(model: nn.Module, *, widths: frozenset[int]) -> None:
    """Replaces activation functions of `model` by `RecomputedActivation`, or updates the widths of those that exist."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, RecomputedActivation):
                child.widths = widths
            elif type(child).__name__ in RECOMPUTED_ACTIVATIONS and not isinstance(parent, RecomputedActivation):
                assert child is not None
                has_hooks = child._forward_hooks or child._forward_pre_hooks  # the backward pass would call them again
                if not has_hooks and not getattr(child, "inplace", False):
                    setattr(parent, name, RecomputedActivation(child, widths=widths).train(child.training))


def restore_activations(model: nn.Module) -> None:
    """Undoes `replace_activations`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, RecomputedActivation):
                setattr(parent, name, child.base)


def choose_kept_tensors(x: Tensor) -> tuple[Tensor, Recomputation | None, tuple[Tensor, ...]]:
    """Returns x as a plain tensor, and what an autograd function must keep so that `recall` returns x.

    The caller passes the third value to `save_for_backward`, and keeps the second one.
    """
    if not isinstance(x, ActivationOutput):
        return x, None, (x,)
    return (x.plain, x.recomputation, x.inputs) if x.is_unchanged else (x.plain, None, (x.plain,))


def recall(recomputation: Recomputation | None, kept: Sequence[Tensor]) -> Tensor:
    """Returns the tensor for which `choose_kept_tensors` returned `recomputation` and `kept`."""
    return kept[0] if recomputation is None else recomputation.compute(kept)


class _KeepInputs(torch.autograd.Function):
    """The value of `compute()`, whose gradients come from a recomputation from `inputs`."""

    @staticmethod
    def forward(ctx: Any, recomputation: Recomputation, compute: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.recomputation = recomputation
        return compute()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.recomputation.differentiate(ctx.saved_tensors, grad)


def _keep_inputs(
    function: Callable[..., Tensor], compute: Callable[[], Tensor], inputs: tuple[Tensor, ...]
) -> ActivationOutput:
    """Returns `function(*inputs)`, which `compute` computes for the forward pass."""
    recomputation = Recomputation(function, device_type=inputs[0].device.type)
    plain: Tensor = _KeepInputs.apply(recomputation, compute, *inputs)  # type: ignore[no-untyped-call]
    output = plain.as_subclass(ActivationOutput)
    output.plain, output.inputs, output.recomputation = plain, inputs, recomputation
    output._version_at_creation = plain._version
    return output


def _can_recompute_product(activated: ActivationOutput, factor: object) -> bool:
    return (
        type(factor) is Tensor
        and factor.requires_grad
        and torch.is_grad_enabled()
        and (factor.shape, factor.dtype, factor.device)
        == (activated.plain.shape, activated.plain.dtype, activated.plain.device)
        and len(activated.inputs) == 1  # not a product itself
        and activated.is_unchanged
    )

"""Losses of the scored tokens of a causal model, without the logits of the other tokens.

The decoder computes the hidden states of a batch once. Then the model's own forward pass computes the logits of one
chunk of scored tokens after another, while its decoder returns the hidden states of the chunk. So a soft cap, a scale,
a bias and an adapter of the head are the model's own. Backward keeps no logits. A head that trains computes all logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy

from lorasweep.data.rows import IGNORED, Batch, select_model_inputs

MAX_CHUNK_BYTES: Mapping[str, int] = {"cpu": 2**26, "cuda": 2**29}
"""Maximum size of a chunk's logits in fp32, by device. A chunk takes three times as much for a moment: logits,
their log-softmax and the gradient. It is larger on a GPU, which small products leave idle (not measured)."""
Project = Callable[[Tensor], Tensor]
"""Returns the logits (rows, length, vocabulary) of hidden states (rows, length, size)."""


@runtime_checkable
class RowGroups(Protocol):
    """A module that computes equal groups of rows with different trained weights, such as the head of several runs."""

    @property
    def num_groups(self) -> int: ...


def score_tokens(model: nn.Module, batch: Batch, *, by_chunk: bool) -> Float[Tensor, "rows length"]:
    """Returns the loss at each position in nats, in fp32 or wider; 0 at positions that are not scored.

    With `by_chunk`, the base model must be one for which `can_score_by_chunk` is True; it may be adapted or packed.
    """
    targets = batch["targets"]
    # calling the decoder alone would skip the compiled code, and FSDP would not gather the weights of the head
    must_call_whole = getattr(model, "_compiled_call_impl", None) is not None or isinstance(model, FSDPModule)
    head = _list_head(model) if by_chunk else []
    if not by_chunk or must_call_whole or (torch.is_grad_enabled() and have_trained_weights(head)):
        return _compute_losses(compute_logits(model, batch), targets)
    groups = next((module for module in head if isinstance(module, RowGroups)), None)
    num_groups = 1 if groups is None else groups.num_groups
    # each group's scored positions; groups with fewer are filled up with others, whose loss is 0
    scored = (targets != IGNORED).view(num_groups, -1)
    # counted on the CPU when the batch was moved, because reading a count from a GPU would wait for it
    num_scored = batch["num_scored"].view(num_groups, -1) if "num_scored" in batch else scored
    counts = num_scored.sum(1).tolist()
    width = max(1, *counts)
    places = scored.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    places = places + scored.shape[1] * torch.arange(num_groups, device=targets.device)[:, None]
    states, project = _compute_states(model, batch)
    hidden, targets_at_places = states[places], targets.flatten()[places]  # (groups, width, size), (groups, width)
    size = max(1, MAX_CHUNK_BYTES[hidden.device.type] // (4 * num_groups * _get_vocabulary_size(model)))
    chunks = zip(torch.split(hidden, size, 1), torch.split(targets_at_places, size, 1), strict=True)
    losses = []
    for part, chunk_targets in chunks:
        # a contiguous copy, because torch would copy the weight for a product with a strided view
        chunk = part.clone(memory_format=torch.contiguous_format)
        if torch.is_grad_enabled():
            losses.append(_ScoreFrozen.apply(chunk, chunk_targets, project))  # type: ignore[no-untyped-call]
        else:
            losses.append(_compute_losses(project(chunk), chunk_targets))
    joined = torch.cat(losses, 1).flatten()
    put_back: Tensor = joined.new_zeros(targets.numel()).index_copy(0, places.flatten(), joined)
    return put_back.view_as(targets)


def _list_head(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that are not part of the decoder."""
    return [module for _, module in model.named_modules(memo={model.get_decoder()})]  # type: ignore[operator]


def have_trained_weights(modules: Iterable[nn.Module]) -> bool:
    """Returns whether one of the modules trains, without those inside it. The weights of `RowGroups` are elsewhere."""
    return any(isinstance(one, RowGroups) or any(p.requires_grad for p in one.parameters(False)) for one in modules)


def can_score_by_chunk(model: nn.Module) -> bool:
    """Returns whether the model computes the logits of a token from the token's last hidden state alone.

    It computes the logits of a few tokens by `_compute_states` and by the whole model. They must be equal in half of
    the digits, because products of other shapes are rounded differently.
    """
    try:
        tokens = torch.arange(6).view(2, 3) % _get_vocabulary_size(model)
        batch = {"input_ids": tokens.to(next(model.parameters()).device)}
        with torch.no_grad():
            states, project = _compute_states(model, batch)
            expected = compute_logits(model, batch).flatten(0, 1)
            difference = project(states.flip(0)[None])[0].flip(0) - expected
        return bool(difference.abs().max() <= math.sqrt(torch.finfo(states.dtype).eps) * expected.abs().max())
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # the model has other parts or arguments than those that this module knows


def compute_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Returns a model's output for a batch in fp32, or in fp64 under `precision="64-true"`."""
    output = model(**select_model_inputs(batch))
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _compute_states(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "tokens size"], Project]:
    """Returns the last hidden state of each token, and a function that computes the logits of hidden states."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    output = decoder(**select_model_inputs(batch))

    def project(hidden: Tensor) -> Tensor:
        replaced = type(output)(**{**output, "last_hidden_state": hidden})
        own = vars(decoder).get("forward")  # quantising libraries may have set one
        decoder.forward = lambda *args, **kwargs: replaced
        try:
            return compute_logits(model, batch)
        finally:
            del decoder.forward
            if own is not None:
                decoder.forward = own

    return output.last_hidden_state.flatten(0, 1), project


def _get_vocabulary_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _compute_losses(logits: Float[Tensor, "rows length vocabulary"], targets: Tensor) -> Float[Tensor, "rows length"]:
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(targets.shape)


class _ScoreFrozen(torch.autograd.Function):
    """Losses of a head without trained parameters. Forward also computes the gradient, so that backward only scales it.

    Each loss depends on its own hidden state alone, so the gradient of the sum of all losses is enough.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, project: Project) -> Tensor:
        # hooks that do nothing hide these tensors, freed at once, from the hooks of `benchmarks/saved_bytes.py`
        no_hooks = torch.autograd.graph.saved_tensors_hooks(nn.Identity(), nn.Identity())
        with torch.enable_grad(), no_hooks:
            leaf = hidden.detach().requires_grad_()
            losses = _compute_losses(project(leaf), targets)
            ctx.save_for_backward(*torch.autograd.grad(losses.sum(), leaf))
        return losses.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[..., None].to(gradient.dtype), None, None

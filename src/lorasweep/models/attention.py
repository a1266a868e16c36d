"""`model.attention=auto`: which implementation of attention is faster at the lengths that the data has, by measurement.

On a CPU, sdpa's backward takes about half of a small encoder's step at 15 tokens, where eager is faster; at long
sequences it is the other way round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasweep.models.pretrained import own_stream, quiet_transformers

CANDIDATES = ("sdpa", "eager")
"""The first is taken unless another is faster by `LEAST_GAIN` or more, so that noise decides nothing."""
LEAST_GAIN = 0.05
ROUNDS = 3
MOST_TOKENS = 2048
"""Of one measured micro-batch; larger ones are measured on fewer rows, of which attention's share is the same."""
MOST_BATCHES = 4
TIME_LIMIT_S = 5.0
"""No further round starts after so many seconds."""


class AttentionChoice(NamedTuple):
    """What was chosen, and why."""

    name: str
    """`sdpa` or `eager`; `own` for a model that transformers did not make."""
    measured: Mapping[str, float]
    """Seconds of a forward and backward pass under each, the best of some; empty where there was no choice."""


def choose_attention(
    model: nn.Module, *, lengths: Sequence[int], rows: int, device: torch.device | None = None
) -> AttentionChoice:
    """Times forward and backward passes under each implementation, and leaves the model with the faster one.

    Only activations get gradients, as under LoRA; dropout is on. Nothing else of the model changes, and torch's stream
    is afterwards as it was.

    Args:
        model: A base model as `load_base` gives it.
        lengths: Tokens of each row of typical micro-batches, one after the other.
        rows: Rows of a micro-batch; of a pack, those of all slots.
        device: Where to measure; where the model is when None. It goes back to where it was.
    """
    if not isinstance(model, PreTrainedModel):
        return AttentionChoice("own", {})
    usable = [name for name in CANDIDATES if set_attention(model, name)]
    if len(usable) < 2:
        return AttentionChoice(str(model.config._attn_implementation), {})
    with own_stream(), _ready_to_measure(model, device):
        measured = _measure(model, _draw_batches(model, lengths, rows=rows), usable)
    first, *others = usable
    fastest = min(usable, key=measured.__getitem__)
    name = fastest if fastest in others and measured[fastest] <= (1 - LEAST_GAIN) * measured[first] else first
    set_attention(model, name)
    return AttentionChoice(name, measured)


def _measure(model: PreTrainedModel, batches: list[dict[str, Tensor]], names: Sequence[str]) -> dict[str, float]:
    """Seconds of the fastest round of each; they take turns, so that a disturbance meets all."""
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    while len(times[names[0]]) <= ROUNDS and (len(times[names[0]]) < 2 or time.perf_counter() - started < TIME_LIMIT_S):
        for name in names:
            set_attention(model, name)
            times[name].append(_time_step(model, batches))
    return {name: min(seconds[1:]) for name, seconds in times.items()}  # the first round warms up


def _time_step(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> float:
    device = batches[0]["input_ids"].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for batch in batches:
        model(**batch).logits.float().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _draw_batches(model: PreTrainedModel, lengths: Sequence[int], *, rows: int) -> list[dict[str, Tensor]]:
    """Micro-batches of random tokens, padded to their longest row."""
    embeddings = _embeddings(model)[0].weight
    most = max(1, min(rows, MOST_TOKENS // max(lengths)))
    batches = []
    for start in range(0, min(len(lengths), MOST_BATCHES * most), most):
        sizes = torch.tensor(lengths[start : start + most])
        tokens = torch.randint(len(embeddings), (len(sizes), int(sizes.max())))
        batch = {"input_ids": tokens, "attention_mask": (torch.arange(tokens.shape[1]) < sizes[:, None]).long()}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = tokens
        batches.append({key: tensor.to(model.device) for key, tensor in batch.items()})
    return batches


@contextmanager
def _ready_to_measure(model: PreTrainedModel, device: torch.device | None) -> Iterator[None]:
    """The model on the device, with dropout on, and gradients from the embeddings on."""
    modes = {module: module.training for module in model.modules()}
    place = model.device
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        for layer in _embeddings(model)
    ]
    try:
        nn.Module.to(model, device or place)
        model.train()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        nn.Module.to(model, place)
        for module, mode in modes.items():
            module.training = mode


def _embeddings(model: PreTrainedModel) -> list[nn.Embedding]:
    """The layers that look up tokens: an encoder and a decoder may have one each, on the same weight."""
    weight = model.get_input_embeddings().weight
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is weight]


def set_attention(model: PreTrainedModel, name: str) -> bool:
    """Sets an implementation where the model has it, and returns whether it has."""
    try:
        with quiet_transformers():
            model.set_attn_implementation(name)
    except (ValueError, ImportError, RuntimeError):
        return False
    return bool(model.config._attn_implementation == name)

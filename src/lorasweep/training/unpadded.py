"""Trains examples of different lengths without padding.

Between the embeddings and the head, the examples of a slot are one sequence. Linear layers, norms, activations and
dropout see only real tokens, and in a pack the padding to the longest slot. Attention works on rows again, in chunks of
similar lengths, with the model's own function and mask. So the outputs are those of the padded batch, apart from
rounding. Nothing in the model changes: the hooks and the attention function are there only inside `unpadded`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorasweep.data.split import Batch, move_tensor, select_model_inputs
from lorasweep.models.attention import IMPLEMENTATIONS, has_attention_dropout

ATTENTION_CHUNKS = 4
"""Number of chunks of similar lengths in which attention computes the rows of a slot. More chunks have less padding and
more calls."""
PREFIX = "lorasweep_"
"""Prefix of the names under which the attention functions of this module are registered in transformers."""
FLASH = "flash_attention_2"
MAX_DIFFERENCE = 0.05
"""Maximum difference of padded and unpadded outputs, divided by the largest output. Rounding in bf16 differs less, and
a model whose tokens see other examples differs much more."""

NoteLengths = Callable[[Sequence[int]], None]
"""Takes the number of real tokens of each slot, for modules that are called next with slots padded to the longest."""


class Chunk(NamedTuple):
    """Rows of similar lengths, slot after slot, with the same number of rows from each slot."""

    rows: Int[Tensor, " rows"]
    length: int
    slot_lengths: tuple[int, ...]
    """The longest row of each slot."""


class Layout:
    """Where each token of a padded batch is in the unpadded sequences, (slots, width), and in attention's chunks.

    Attributes:
        slot_lengths: Number of real tokens of each slot.
        width: The largest of them.
        row_lengths: The longest row of each slot.
        chunks: The rows in chunks of similar lengths.
        sequence_limits: Cumulative lengths of the rows and of the padding in the unpadded sequences.
        longest_sequence: The longest of them.
    """

    def __init__(self, lengths: Int[Tensor, " rows"], *, length: int, device: torch.device, slots: int) -> None:
        """Lays out rows of these lengths (on the CPU) that are padded to `length`, for a batch on `device`."""
        self.shape = torch.Size((len(lengths), length))
        by_slot = lengths.view(slots, -1)  # (slots, rows of a slot)
        self.slot_lengths: tuple[int, ...] = tuple(by_slot.sum(1).tolist())
        self.row_lengths: tuple[int, ...] = tuple(by_slot.amax(1).tolist())
        self.width = max(self.slot_lengths)
        # the first position of each row in the unpadded sequences, which are numbered as one
        starts = by_slot.cumsum(1) - by_slot + self.width * torch.arange(slots)[:, None]
        chunks = list(_iter_chunks(by_slot))
        order = torch.cat([chunk.rows for chunk in chunks])
        widths = torch.cat([chunk.rows.new_full((len(chunk.rows),), chunk.length) for chunk in chunks])
        num_positions = slots * self.width
        padded = torch.arange(len(lengths)) * length
        unpad = _Move.between(padded, starts.flatten(), lengths, sizes=(self.shape.numel(), num_positions))
        ends = widths.cumsum(0)
        to_chunks = _Move.between(
            starts.flatten()[order], ends - widths, lengths[order], sizes=(num_positions, int(ends[-1]))
        )
        # the rows of each slot and then its padding, as sequences that flash attention computes one by one
        sequences = torch.cat([by_slot, self.width - by_slot.sum(1, keepdim=True)], dim=1).flatten()
        self.longest_sequence = int(sequences.max())
        limits = nn.functional.pad(sequences[sequences > 0].cumsum(0), (1, 0))
        # one copy, because each costs a GPU more than its few numbers
        indices = (*unpad, *to_chunks, limits, *(chunk.rows for chunk in chunks))
        moved = torch.split(move_tensor(torch.cat(indices), device), [len(index) for index in indices])
        self.unpad, self.to_chunks, self.sequence_limits = _Move(*moved[:4]), _Move(*moved[4:8]), moved[8].int()
        self.chunks = [chunk._replace(rows=rows) for chunk, rows in zip(chunks, moved[9:], strict=True)]
        self.pad, self.from_chunks = self.unpad.reversed(), self.to_chunks.reversed()
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def num_positions(self) -> int:
        return len(self.slot_lengths) * self.width

    def unpad_rows(self, x: Tensor) -> Tensor:
        """Returns (rows, length, ...), or (1, length, ...) for values that all rows share, as (slots, width, ...)."""
        if x.shape[0] == 1:
            x = x.expand(self.shape[0], *x.shape[1:])
        return self.unpad(x.flatten(0, 1)).view(len(self.slot_lengths), self.width, *x.shape[2:])

    def unpad_once(self, x: Tensor) -> Tensor:
        """Returns `unpad_rows(x)`, computed once for the layers that get the same tensor."""
        if id(x) not in self._moved:
            self._moved[id(x)] = x, self.unpad_rows(x)  # with x, so that no other tensor gets its id
        return self._moved[id(x)][1]

    def pad_rows(self, x: Tensor) -> Tensor:
        """Returns (slots, width, ...) as (rows, length, ...). At padding it has the values of another token."""
        return self.pad(x.flatten(0, 1)).view(*self.shape, *x.shape[2:])

    def cut_mask(self, mask: Tensor | None, index: int) -> Tensor | None:
        """Returns the part of an attention mask (rows or 1, heads or 1, length, length) for a chunk."""
        if mask is None:
            return None
        if (id(mask), index) not in self._masks:
            chunk = self.chunks[index]
            rows = mask if mask.shape[0] == 1 else mask[chunk.rows]
            self._masks[id(mask), index] = mask, rows[:, :, : chunk.length, : chunk.length]
        return self._masks[id(mask), index][1]


def _iter_chunks(by_slot: Int[Tensor, "slots rows"]) -> Iterator[Chunk]:
    slots, num_rows = by_slot.shape
    first_rows = num_rows * torch.arange(slots)[:, None]
    for columns in by_slot.argsort(dim=1, stable=True).tensor_split(min(ATTENTION_CHUNKS, num_rows), dim=1):
        longest = by_slot.gather(1, columns).amax(1).tolist()
        yield Chunk((columns + first_rows).flatten(), max(longest), tuple(longest))


class _Move(NamedTuple):
    """Moves tokens between two arrangements. At padding the result has the first value, whose gradient must be 0."""

    take: Int[Tensor, " target"]
    """For each position of the result, the position from which its value comes."""
    back: Int[Tensor, " source"]
    """The same in the other direction."""
    padding: Int[Tensor, " padding"]
    """Positions of the result that are padding."""
    unused: Int[Tensor, " unused"]
    """Positions of the source that are padding."""

    @classmethod
    def between(cls, sources: Tensor, targets: Tensor, lengths: Tensor, *, sizes: tuple[int, int]) -> _Move:
        """Returns the move of rows with these first positions in source and target, and these lengths."""
        row = torch.arange(len(lengths)).repeat_interleave(lengths)
        within = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
        source, target = sources[row] + within, targets[row] + within
        take, back = row.new_full((sizes[1],), -1), row.new_full((sizes[0],), -1)
        take[target], back[source] = source, target
        padding, unused = ((positions < 0).nonzero().flatten() for positions in (take, back))
        return cls(take.clamp_(min=0), back.clamp_(min=0), padding, unused)

    def reversed(self) -> _Move:
        return _Move(self.back, self.take, self.unused, self.padding)

    def __call__(self, x: Tensor) -> Tensor:
        moved: Tensor = _Take.apply(x, self)  # type: ignore[no-untyped-call]
        return moved


class _Take(torch.autograd.Function):
    """Takes rows. Each is taken once, so backward takes rows too, which is faster than to add them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: _Move) -> Tensor:
        ctx.move = move
        return x.index_select(0, move.take)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.move.back).index_fill_(0, ctx.move.unused, 0), None


class _Pass(NamedTuple):
    """The arguments of `unpadded`, and the stack of layers that works without padding."""

    model: PreTrainedModel
    layers: nn.ModuleList
    layout: Layout
    note_lengths: NoteLengths


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)
"""The pass that a model computes now, inside `unpadded`."""


def lay_out(batch: Batch, *, slots: int = 1, in_chunks: bool = False) -> Layout | None:
    """Returns the layout of a batch; None if each slot has only one example.

    None also if no example is padded, unless attention must work `in_chunks` (`drops_attention`).
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if len(ids) == slots or (mask is None and not in_chunks):
        return None
    if mask is None:
        lengths = torch.full((len(ids),), ids.shape[1])
    else:
        lengths = batch["row_lengths"] if "row_lengths" in batch else mask.sum(1).cpu()
    return Layout(lengths, length=ids.shape[1], device=ids.device, slots=slots)


def drops_attention(model: nn.Module) -> bool:
    """Returns whether the model draws dropout masks for chunks of rows, and so for other rows than without a layout.

    A slot's rows may have one length while those of another slot do not, so such a model needs a layout for each batch.
    """
    settings: Any = model.config
    return settings._attn_implementation == "eager" and has_attention_dropout(model)


def ignore_lengths(lengths: Sequence[int]) -> None:
    """Is the `NoteLengths` of a run alone, which has one slot."""


@contextmanager
def unpadded(model: nn.Module, layout: Layout | None, *, note_lengths: NoteLengths = ignore_lengths) -> Iterator[None]:
    """Lets calls of the model inside the block compute a batch without padding.

    Args:
        model: A model for which `can_unpad` is True, perhaps with LoRA layers or packed.
        layout: Layout of the batch; None changes nothing.
        note_lengths: Called whenever slots are padded in another way, with the number of real tokens of each slot.
    """
    if layout is None:
        yield
        return
    assert isinstance(model, PreTrainedModel)
    layers = find_layers(model)
    assert layers is not None
    with _unpad(_Pass(model, layers, layout, note_lengths)):
        yield


def save_layout() -> AbstractContextManager[None]:
    """Returns a context in which activation checkpointing can compute a layer again as now, in `unpadded` or not."""
    current = _PASS.get()
    return nullcontext() if current is None else _unpad(current)


@contextmanager
def _unpad(current: _Pass) -> Iterator[None]:
    model, layers, layout, note_lengths = current

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = {name: _unpad_positions(layout, kwargs[name]) for name in kwargs if "position" in name}
        named = {**kwargs, **positions}
        if module is not layers[0]:
            return args, named
        note_lengths(layout.slot_lengths)
        if args:
            return (layout.unpad_rows(args[0]), *args[1:]), named
        return args, {**named, "hidden_states": layout.unpad_rows(named["hidden_states"])}

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        note_lengths(layout.row_lengths)
        return (layout.pad_rows(output[0]), *output[1:]) if isinstance(output, tuple) else layout.pad_rows(output)

    config, attention, hooks = model.config, model.config._attn_implementation, []
    if not attention.startswith(PREFIX):  # a backward pass inside `unpadded` computes a layer again, where hooks exist
        hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(leave))
    token = _PASS.set(current)
    try:
        config._attn_implementation = PREFIX + attention.removeprefix(PREFIX)
        yield
    finally:
        config._attn_implementation = attention
        _PASS.reset(token)
        for hook in hooks:
            hook.remove()


def _unpad_positions(layout: Layout, value: Any) -> Any:
    """Returns position ids, or the cosines and sines of rotary embeddings, without padding."""
    if isinstance(value, tuple):
        return tuple(_unpad_positions(layout, part) for part in value)
    is_by_token = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == layout.shape[1]
    return layout.unpad_once(value) if is_by_token else value


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Computes attention chunk by chunk with the model's own function, for unpadded (slots, heads, width, size)."""
    current = _PASS.get()
    assert current is not None
    layout, note_lengths = current.layout, current.note_lengths
    own_function = _find_attention(module)
    chunks = [_split_rows(layout, x) for x in (query, key, value)]
    outputs = []
    for index, (chunk, *inputs) in enumerate(zip(layout.chunks, *chunks, strict=True)):
        note_lengths(chunk.slot_lengths)
        output, _ = own_function(module, *inputs, layout.cut_mask(attention_mask, index), **kwargs)
        outputs.append(output.flatten(0, 1).flatten(1))  # (rows · length, heads · size)
    note_lengths(layout.slot_lengths)
    joined = layout.from_chunks(torch.cat(outputs))
    return joined.view(query.shape[0], query.shape[2], query.shape[1], -1), None


def _attend_flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Computes flash attention once for all sequences, as after transformers' `DataCollatorWithFlattening`."""
    current = _PASS.get()
    assert current is not None
    limits, longest = current.layout.sequence_limits, current.layout.longest_sequence
    lengths = {"cu_seq_lens_q": limits, "cu_seq_lens_k": limits, "max_length_q": longest, "max_length_k": longest}
    inputs = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value)]
    config: Any = module.config
    registered = config._attn_implementation
    config._attn_implementation = registered.removeprefix(PREFIX)  # transformers loads the kernel by this name
    try:
        output, _ = _find_attention(module)(module, *inputs, None, **kwargs | lengths)
    finally:
        config._attn_implementation = registered
    return output.view(query.shape[0], query.shape[2], query.shape[1], -1), None


def _split_rows(layout: Layout, x: Tensor) -> list[Tensor]:
    """Returns (slots, heads, width, size) as (rows, heads, length, size) of each chunk."""
    heads, size = x.shape[1], x.shape[3]
    tokens = layout.to_chunks(x.transpose(1, 2).flatten(2).flatten(0, 1))  # (positions of all chunks, heads · size)
    parts = torch.split(tokens, [len(chunk.rows) * chunk.length for chunk in layout.chunks])
    return [
        part.view(len(chunk.rows), chunk.length, heads, size).transpose(1, 2)
        for part, chunk in zip(parts, layout.chunks, strict=True)
    ]


def _find_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """Returns the function that the model would call without `unpadded`."""
    config: Any = module.config
    name = config._attn_implementation.removeprefix(PREFIX)
    # each architecture has its own eager attention
    own_function: Callable[..., tuple[Tensor, Any]]
    if name == "eager":
        own_function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        own_function = ALL_ATTENTION_FUNCTIONS[name]
    return own_function


def _build_mask(own_function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Returns the model's mask. transformers would look for padding first, which waits for a GPU: there is some."""
    return own_function(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


for _name in IMPLEMENTATIONS:
    AttentionInterface.register(PREFIX + _name, _attend)
    _build: Any = functools.partial(_build_mask, ALL_MASK_ATTENTION_FUNCTIONS[_name])
    AttentionMaskInterface.register(PREFIX + _name, _build)
AttentionInterface.register(PREFIX + FLASH, _attend_flash)
AttentionMaskInterface.register(PREFIX + FLASH, lambda *_, **__: None)


def can_unpad(model: nn.Module, batch: Batch) -> bool:
    """Returns whether `unpadded` gives the model's own outputs: it computes a small padded batch in both ways.

    The model must be one of transformers, with one stack of layers, whose attention is one of `IMPLEMENTATIONS` or
    flash attention. It is on the CPU, which has no flash attention, so eager attention takes its place here.
    """
    layout = lay_out(batch)
    if layout is None or not isinstance(model, PreTrainedModel) or find_layers(model) is None:
        return False
    attention = model.config._attn_implementation
    if attention not in (*IMPLEMENTATIONS, FLASH):
        return False
    inputs = select_model_inputs(batch)
    try:
        model.config._attn_implementation = "eager" if attention == FLASH else attention
        with torch.no_grad():
            expected = model.base_model(**inputs)[0]  # (rows, length, hidden size)
            with unpadded(model, layout):
                outputs = model.base_model(**inputs)[0]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # the layers take other arguments than those that this module knows
    finally:
        model.config._attn_implementation = attention
    is_real = batch["attention_mask"].bool()
    expected, outputs = expected[is_real].float(), outputs[is_real].float()
    return bool((outputs - expected).abs().max() <= MAX_DIFFERENCE * expected.abs().max())


def find_layers(model: nn.Module) -> nn.ModuleList | None:
    """Returns the model's stack of layers; None if it has none or several."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return stacks[0] if len(stacks) == 1 else None

"""Splits whose examples have different lengths: texts with labels, and conversations."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorasweep.data.split import IGNORED, Batch, Split


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Sequences of different lengths, stored end to end in one tensor."""

    values: Tensor
    """(all tokens,), int64."""
    ends: Tensor
    """(sequences,), int64: the index in `values` after the last token of each sequence."""

    @functools.cached_property
    def lengths(self) -> Tensor:
        """The length of each sequence, (sequences,), int64."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    def __getitem__(self, index: int) -> Tensor:
        """Returns one sequence as a view."""
        end = int(self.ends[index])
        return self.values[end - int(self.lengths[index]) : end]

    def select(self, mask: Tensor) -> Ragged:
        """Returns the sequences that a boolean mask, (sequences,), selects."""
        values = self.values[mask.repeat_interleave(self.lengths)]
        return Ragged(values=values, ends=self.lengths[mask].cumsum(0))

    def padded(self, indices: Sequence[int], *, fill: int) -> Tensor:
        """Returns the sequences at these indices, padded on the right to the longest: (sequences, longest)."""
        return pad_sequence([self[index] for index in indices], batch_first=True, padding_value=fill)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleSplit(Split):
    """Base of splits whose examples are token sequences of different lengths."""

    tokens: Ragged
    pad_token: int
    bytes: int
    """Number of UTF-8 bytes of all texts."""
    truncated: int = 0
    """Number of examples that were longer than `data.max_length` and were cut."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the run record, such as the number of examples of each class."""

    @property
    def lengths(self) -> Tensor:
        return self.tokens.lengths

    def describe(self) -> dict[str, Any]:
        return {
            "examples": len(self),
            "bytes": self.bytes,
            "truncated": self.truncated,
            "fingerprint": self.fingerprint,
            **self.facts,
        }

    def _inputs(self, indices: Sequence[int]) -> Batch:
        """Returns padded token ids. Adds a mask only if an example is padded: attention is faster without."""
        input_ids = self.tokens.padded(indices, fill=self.pad_token)
        lengths = self.lengths[torch.tensor(indices)]
        if int(lengths.min()) == input_ids.shape[1]:
            return {"input_ids": input_ids}
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()  # (batch, length)
        return {"input_ids": input_ids, "attention_mask": mask}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSplit(ExampleSplit):
    """Texts, each with its label: a class, several classes, or a number."""

    labels: Tensor
    """Class indices, (examples,) int64; 0 or 1 per class, (examples, classes) float; or numbers, (examples,) float."""
    token_types: Ragged | None = None
    """For pairs of texts: 0 at tokens of the first text, 1 at the second. None if the model has no token types."""
    class_weights: Tensor | None = None
    """Weight of each class in the training loss, (classes,); None weights all classes 1."""

    @functools.cached_property
    def weights(self) -> Tensor:
        return torch.ones(len(self.labels)) if self.class_weights is None else self.class_weights[self.labels]

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        rows = torch.tensor(indices)
        batch = {**self._inputs(indices), "targets": self.labels[rows]}
        if self.token_types is not None:
            batch["token_type_ids"] = self.token_types.padded(indices, fill=0)
        if self.class_weights is not None:
            batch["weights"] = self.weights[rows]
        return batch


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSplit(ExampleSplit):
    """Conversations. The model predicts the assistant's tokens, and only these are scored."""

    targets: Ragged
    """The token to predict at each position; `IGNORED` at positions that are not scored."""
    scored_bytes: int
    """Number of UTF-8 bytes of the scored text."""

    @functools.cached_property
    def weights(self) -> Tensor:
        """Number of scored tokens of each example."""
        scored = torch.cat([self.targets.values.new_zeros(1), (self.targets.values != IGNORED).cumsum(0)])
        ends = scored[self.targets.ends]
        return torch.diff(ends, prepend=ends.new_zeros(1)).float()

    @property
    def bytes_per_token(self) -> float:
        """Number of bytes per scored token."""
        return self.scored_bytes / max(float(self.weights.sum()), 1.0)

    def select(self, mask: Tensor) -> Self:
        """Returns the split with the examples that a boolean mask, (examples,), selects. Keeps the fingerprint."""
        return replace(
            self,
            tokens=self.tokens.select(mask),
            targets=self.targets.select(mask),
            groups=tuple(itertools.compress(self.groups, mask.tolist())),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompletionSplit(TextSplit):
    """Conversations for a causal model. `targets[i]` is the token after `tokens[i]`."""

    packing: bool = False
    """Whether several examples share one sequence. Positions restart at 0 in each example, so that none attends to
    another."""

    def drop_unscored(self) -> CompletionSplit:
        """Returns the split without examples that have no scored token, because their answers were cut off."""
        is_scored = self.weights > 0
        if is_scored.all():
            return self
        return replace(self.select(is_scored), facts={**self.facts, "left_out": int((~is_scored).sum())})

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns the examples: one per padded sequence, or several per sequence if `packing` is set."""
        if self.packing:
            return self._pack(indices, slots=slots)
        return {**self._inputs(indices), "targets": self.targets.padded(indices, fill=IGNORED)}

    def _pack(self, indices: Sequence[int], *, slots: int) -> Batch:
        num_per_slot = len(indices) // slots
        lengths = [int(self.lengths[index]) for index in indices]
        bins: list[list[list[int]]] = []  # bins[slot][sequence]: positions in `indices` that share this sequence
        for slot in range(slots):
            members = range(slot * num_per_slot, (slot + 1) * num_per_slot)
            bins.append(fill_bins({n: lengths[n] for n in members}, capacity=max(lengths)))
        # A pack divides a batch evenly among its slots. So slots with fewer sequences are filled with empty ones.
        num_sequences = max(map(len, bins))
        for slot_bins in bins:
            slot_bins += [[]] * (num_sequences - len(slot_bins))
        sequences = [members for slot_bins in bins for members in slot_bins]

        def join(values: list[list[Tensor]], fill: int) -> Tensor:
            joined = [torch.cat(row) if row else torch.full((1,), fill) for row in values]
            return pad_sequence(joined, batch_first=True, padding_value=fill)

        return {
            "input_ids": join([[self.tokens[indices[n]] for n in row] for row in sequences], self.pad_token),
            "position_ids": join([[torch.arange(lengths[n]) for n in row] for row in sequences], 0),
            "targets": join([[self.targets[indices[n]] for n in row] for row in sequences], IGNORED),
            "examples": join([[torch.full((lengths[n],), n) for n in row] for row in sequences], 0),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceSplit(TextSplit):
    """Conversations for an encoder-decoder: the encoder reads `tokens`, and the decoder predicts `targets`."""

    start_token: int
    """The decoder's first input token."""

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns the padded examples. The decoder's input is `start_token` and the targets without the last one."""
        targets = self.targets.padded(indices, fill=IGNORED)
        previous = targets.masked_fill(targets == IGNORED, self.pad_token)[:, :-1]
        start = previous.new_full((len(previous), 1), self.start_token)
        return {
            **self._inputs(indices),
            "decoder_input_ids": torch.cat([start, previous], dim=1),
            "targets": targets,
        }


def fill_bins(lengths: Mapping[int, int], *, capacity: int) -> list[list[int]]:
    """Returns the keys in bins. The lengths in a bin add up to at most `capacity`.

    The algorithm is first fit decreasing (Johnson 1973): the longest first, each into the first bin with enough room.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for key in sorted(lengths, key=lambda key: (-lengths[key], key)):
        index = next((n for n, room in enumerate(free) if room >= lengths[key]), len(bins))
        if index == len(bins):
            bins.append([])
            free.append(capacity)
        bins[index].append(key)
        free[index] -= lengths[key]
    return bins

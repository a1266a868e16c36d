"""Splits of examples of different lengths: texts with labels, prompts with completions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorasweep.data.split import IGNORED, Batch, Split


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Sequences of different lengths, end to end in one tensor."""

    values: Tensor
    """(all tokens,), int64."""
    ends: Tensor
    """(sequences,), int64: where each sequence ends."""

    @classmethod
    def from_lists(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        values = torch.tensor([value for sequence in sequences for value in sequence], dtype=torch.int64)
        return cls(values=values, ends=lengths.cumsum(0))

    @functools.cached_property
    def lengths(self) -> Tensor:
        """The length of each sequence, (sequences,), int64."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    def __getitem__(self, index: int) -> Tensor:
        """Returns one sequence as a view."""
        end = int(self.ends[index])
        return self.values[end - int(self.lengths[index]) : end]

    def select(self, mask: Tensor) -> Ragged:
        """Returns only the sequences for which a mask, (sequences,), is true."""
        values = self.values[mask.repeat_interleave(self.lengths)]
        return Ragged(values=values, ends=self.lengths[mask].cumsum(0))

    def padded(self, indices: Sequence[int], *, fill: int) -> Tensor:
        """Returns these sequences padded on the right to the longest, (sequences, longest)."""
        return pad_sequence([self[index] for index in indices], batch_first=True, padding_value=fill)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleSplit(Split):
    """Sequences of tokens, each with something to predict."""

    tokens: Ragged
    pad_token: int
    bytes: int
    """Number of UTF-8 bytes of all texts."""
    truncated: int = 0
    """Number of examples that were longer than `data.max_length` and were cut."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More entries for the record, such as the number of examples of each class."""

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
        """Returns padded token ids, with a mask only if an example is padded: attention is faster without a mask."""
        input_ids = self.tokens.padded(indices, fill=self.pad_token)
        lengths = self.lengths[torch.tensor(indices)]
        if int(lengths.min()) == input_ids.shape[1]:
            return {"input_ids": input_ids}
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()  # (batch, length)
        return {"input_ids": input_ids, "attention_mask": mask}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSplit(ExampleSplit):
    """Texts with a label each: a class, several classes, or a number."""

    labels: Tensor
    """(examples,) int64 classes, (examples, labels) float of 0 and 1, or (examples,) float."""
    token_types: Ragged | None = None
    """0 for the first text and 1 for the second, for models that tell them apart."""
    class_weights: Tensor | None = None
    """(labels,): weight of each class in the training loss; None for 1 each."""

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
    """Texts of which some tokens are predicted and scored."""

    targets: Ragged
    """The tokens to predict; `IGNORED` for positions that are not scored."""
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


@dataclass(frozen=True, kw_only=True, eq=False)
class CompletionSplit(TextSplit):
    """Conversations for a causal model. Position i of `targets` is the token after position i of `tokens`."""

    packing: bool = False
    """Whether several examples share one sequence. No example attends to another, because positions restart at 0."""

    def drop_unscored(self) -> CompletionSplit:
        """Returns the split without examples whose answers were cut off, so that nothing in them is scored."""
        is_scored = self.weights > 0
        if is_scored.all():
            return self
        return replace(
            self,
            tokens=self.tokens.select(is_scored),
            targets=self.targets.select(is_scored),
            groups=tuple(itertools.compress(self.groups, is_scored.tolist())),
            facts={**self.facts, "left_out": int((~is_scored).sum())},
        )

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns these examples, each in its own padded sequence, or several in one sequence if `packing` is set."""
        if self.packing:
            return self._pack(indices, slots=slots)
        return {**self._inputs(indices), "targets": self.targets.padded(indices, fill=IGNORED)}

    def _pack(self, indices: Sequence[int], *, slots: int) -> Batch:
        num_per_slot = len(indices) // slots
        lengths = [int(self.lengths[index]) for index in indices]
        bins: list[list[list[int]]] = []  # per slot and sequence: the positions in `indices` that share the sequence
        for slot in range(slots):
            members = range(slot * num_per_slot, (slot + 1) * num_per_slot)
            bins.append(fill_bins({n: lengths[n] for n in members}, capacity=max(lengths)))
        # A pack divides a batch evenly among its slots, so every slot gets equally many sequences. Some stay empty.
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
    """Pairs of texts for an encoder-decoder: the encoder reads `tokens`, the decoder predicts `targets`."""

    start_token: int
    """The decoder's first input token."""

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns these pairs, both sides padded; the decoder sees the target shifted by one."""
        targets = self.targets.padded(indices, fill=IGNORED)
        previous = targets.masked_fill(targets == IGNORED, self.pad_token)[:, :-1]
        start = previous.new_full((len(previous), 1), self.start_token)
        return {
            **self._inputs(indices),
            "decoder_input_ids": torch.cat([start, previous], dim=1),
            "targets": targets,
        }


def fill_bins(lengths: Mapping[int, int], *, capacity: int) -> list[list[int]]:
    """Returns keys in bins whose lengths add up to at most `capacity`, by first fit decreasing (Johnson 1973)."""
    bins: list[list[int]] = []
    free: list[int] = []
    for key in sorted(lengths, key=lambda key: (-lengths[key], key)):
        chosen = next((n for n, room in enumerate(free) if room >= lengths[key]), len(bins))
        if chosen == len(bins):
            bins.append([])
            free.append(capacity)
        bins[chosen].append(key)
        free[chosen] -= lengths[key]
    return bins

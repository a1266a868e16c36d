"""The rows of tokens of a split, and the batches that are made of them."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import ScoreMetric
from lorasweep.wording import Note

IGNORED = -100
"""Target at positions that are not scored. It is the `ignore_index` of torch's cross-entropy."""
MODEL_KEYS = ("input_ids", "attention_mask", "token_type_ids")
"""Keys of a batch that are arguments of the model. An objective may read any other key."""
MAX_CUT_SHARE = 0.01
"""Largest share of the examples that the default of `data.max_length` cuts off. A larger one gives a warning."""
HOST_KEYS = ("num_tokens", "num_scored")
"""Keys of a batch whose values stay on the CPU, which reads them. Reading them from a GPU would wait for it."""

Batch = dict[str, Tensor]
"""The model's arguments by name (`MODEL_KEYS`; an `attention_mask` only if an example is padded), and:

- `targets`: the next token at each position, (batch, length) int64, or `IGNORED`. For labels: one label per example.
- `weights`: the weight of each example's loss, (examples,) float. Only if weights differ.
- `reference`: the number of the frozen base for each row, (rows,). Only for an objective that `needs_reference`.
- a setting of the objective by its name, such as `beta`: one number for each row (`ObjectiveConfig.slot_keys`).
- `step_weight`: the number that divides the step's loss of each slot, (slots,). Only in training.
- `num_tokens`: number of positions without padding in each slot, (slots,). Only in batches of a loader.
- `num_scored`: number of scored tokens of each row. Only in moved batches of text.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitFacts(ABC):
    """Size, lengths and weights of one split of a data set: train, validation or test."""

    name: str
    """`train`, `validation` or `test`."""
    weights: Float[Tensor, " examples"]
    """Weight of each example in the loss: its number of scored tokens, or its class weight. The loss of a step is the
    sum over its examples divided by the sum of their weights."""
    fingerprint: str
    """First 16 hex digits of a SHA-256 over all examples in order."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the split was built."""
    groups: tuple[str, ...] = ()
    """The group of each example: its document, its prompt, or its value in the column `data.group`. Examples of a group
    depend on each other; the report takes groups as independent. Empty if each example is its own group."""

    @property
    @abstractmethod
    def lengths(self) -> Int[Tensor, " examples"]:
        """Number of tokens of each example."""

    @property
    def row_lengths(self) -> Int[Tensor, " examples"]:
        """Number of tokens of the longest row of each example."""
        return self.lengths

    @property
    def padded_lengths(self) -> Int[Tensor, " examples"]:
        """Number of positions of each example in a batch where no other example is longer."""
        return self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns the split's entry in a run record."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Sequences of different lengths in one tensor, where they may overlap."""

    values: Tensor
    """(tokens,), int64. Do not write to it: sequences may share values."""
    starts: Tensor
    """(sequences,), int64: the index in `values` of the first token of each sequence."""
    lengths: Tensor
    """(sequences,), int64: the number of tokens of each sequence."""

    @classmethod
    def join(cls, values: Tensor, *, lengths: Tensor) -> Ragged:
        """Returns sequences that are stored end to end."""
        return cls(values=values, starts=lengths.cumsum(0) - lengths, lengths=lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """Returns one sequence as a view."""
        start = int(self.starts[index])
        return self.values[start : start + int(self.lengths[index])]

    def select(self, chosen: Tensor) -> Ragged:
        """Returns the sequences of these indices, or those that a boolean mask selects."""
        return Ragged(values=self.values, starts=self.starts[chosen], lengths=self.lengths[chosen])

    def padded(self, rows: Int[Tensor, " rows"], *, fill: int, length: int = 0) -> Int[Tensor, "rows length"]:
        """Returns the sequences of these indices, padded on the right to `length`, or to the longest if it is 0."""
        lengths = self.lengths[rows]
        positions = torch.arange(length or int(lengths.max()))
        places = self.starts[rows][:, None] + positions
        if int(lengths.min()) == len(positions):  # nothing is padded
            return self.values[places]
        return torch.where(positions < lengths[:, None], self.values[places.clamp_(max=len(self.values) - 1)], fill)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The last answer of each example, with which a generated answer to the same prompt is compared."""

    starts: Int[Tensor, " examples"]
    """Number of tokens before the answer; 0 if the prompt is empty, or if the answer was cut off or is not scored."""
    table_rows: tuple[Mapping[str, Any] | None, ...]
    """The row of each example in the user's table by column; None if it was not kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows(SplitFacts):
    """The tokenised examples of a split, which make batches of any choice.

    An example has one row in a batch, or several that stay together, such as two answers to one prompt. All examples
    have the same number n of rows: those of example i are the rows i · n to i · n + n - 1.
    """

    sequences: Mapping[str, Ragged]
    """Keys of a batch with a value for each position of a row: `input_ids`, and others such as `targets`."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Keys of a batch with one value for each row, such as a label: (rows,)."""
    facts: Mapping[str, Any]
    """The split's entry in a run record, such as the number of examples of each class."""
    row_names: tuple[str, ...] = ("",)
    """A name for each row of an example, which is printed before its text."""
    pad_token: int = 0
    bytes_per_token: float = math.nan
    """Number of UTF-8 bytes of the scored text divided by its number of tokens, for the metric bits per byte."""
    answers: Answers | None = None
    """The answers that a model can be asked to generate: those of the first row of each example. None without any."""

    def by_example(self, values: Tensor) -> Tensor:
        """Returns a value of each row, (rows,), as (examples, n)."""
        return values.view(-1, len(self.row_names))

    @functools.cached_property
    def lengths(self) -> Tensor:
        """Number of tokens of all rows of each example."""
        return self.by_example(self.sequences["input_ids"].lengths).sum(1)

    @functools.cached_property
    def row_lengths(self) -> Tensor:
        return self.by_example(self.sequences["input_ids"].lengths).amax(1)

    @property
    def padded_lengths(self) -> Tensor:
        return len(self.row_names) * self.row_lengths

    def describe(self) -> dict[str, Any]:
        return dict(self.facts)

    def list_rows(self, indices: Sequence[int]) -> Int[Tensor, " rows"]:
        """Returns the indices of the rows of examples, one example after the other."""
        number = len(self.row_names)
        return (number * torch.tensor(indices)[:, None] + torch.arange(number)).flatten()

    def batch(self, indices: Sequence[int], *, length: int = 0) -> Batch:
        """Returns the rows of examples, padded to `length` positions, or to the longest row if it is 0.

        Adds a mask only if a row is padded: attention is faster without.
        """
        rows = self.list_rows(indices)
        fills = {"input_ids": self.pad_token, "targets": IGNORED}
        batch = {
            name: sequences.padded(rows, fill=fills.get(name, 0), length=length)
            for name, sequences in self.sequences.items()
        }
        batch |= {name: values[rows] for name, values in self.columns.items()}
        lengths, positions = self.sequences["input_ids"].lengths[rows], batch["input_ids"].shape[1]
        if int(lengths.min()) < positions:
            batch["attention_mask"] = (torch.arange(positions) < lengths[:, None]).long()  # (rows, length)
        return batch

    def split_last_answer(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the tokens of an example's last prompt, and those of its answer with the end-of-turn token."""
        assert self.answers is not None
        row, start = index * len(self.row_names), int(self.answers.starts[index])
        ids = torch.cat([self.sequences["input_ids"][row], self.sequences["targets"][row][-1:]])
        return ids[:start], ids[start:]

    def fill_reference(self, values: Float[Tensor, " rows"] | None = None) -> Rows:
        """Returns the split with the numbers of `Objective.compute_reference`, or with zeros, to measure time."""
        zeros = torch.zeros(len(self.sequences["input_ids"]), dtype=torch.float64)
        return replace(self, columns={**self.columns, "reference": zeros if values is None else values})


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """The splits of a data set, and the metric that scores a run on them."""

    train: SplitFacts
    validation: SplitFacts
    test: Callable[[], SplitFacts]
    """Returns the test split. The first call reads it, and later calls return the same object."""
    score_metric: ScoreMetric
    notes: tuple[str, ...] = ()
    """Notes for the user on how the splits were built."""

    @property
    def metric(self) -> str:
        """Name of the metric that scores a run."""
        return self.score_metric.name

    def describe(self, split: SplitFacts) -> dict[str, Any]:
        """Returns the entry of a scored split in a run record."""
        return split.describe()

    def score_constant_answer(self, split: SplitFacts, *, fraction: float = 1.0) -> dict[str, float]:
        """Returns every metric of an answer that needs no training; empty if there is none.

        With a `fraction`, only the examples of `choose_part` count, as in a run's evaluations.
        """
        return {}


def list_passages(split: Rows, index: int, *, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Returns the text of an example in passages, and whether each is scored. A label is the last passage."""
    passages: list[tuple[str, bool]] = []
    for row, name in zip(split.list_rows([index]).tolist(), split.row_names, strict=True):
        if name:
            passages.append((f"\n{name}: " if passages else f"{name}: ", False))
        ids = split.sequences["input_ids"][row].tolist()
        if "targets" in split.columns:
            passages += [(str(tokenizer.decode(ids)), False), (str(split.columns["targets"][row].item()), True)]
            continue
        if "targets" not in split.sequences:  # all texts are compared
            passages.append((str(tokenizer.decode(ids)), True))
            continue
        targets = split.sequences["targets"][row].tolist()
        tokens = zip([*ids, targets[-1]], [False, *(target != IGNORED for target in targets)], strict=True)
        runs = itertools.groupby((token for token in tokens if token[0] != IGNORED), key=lambda token: token[1])
        passages += [(str(tokenizer.decode([token for token, _ in run])), is_scored) for is_scored, run in runs]
    return passages


def describe_lost(splits: Sequence[SplitFacts], *, is_longest: bool) -> list[Note]:
    """Returns a note on what `data.max_length` cuts off, if it cuts anything: a warning above `MAX_CUT_SHARE`.

    It also warns of examples that are left out because no answer remains. `is_longest` says whether the model reads no
    longer examples.
    """
    facts = {split.name: split.describe() for split in splits}
    if not any(one.get("truncated") for one in facts.values()):
        return []
    cut = {name: one["truncated"] for name, one in facts.items()}
    sizes = {name: one["examples"] + one.get("left_out", 0) for name, one in facts.items()}
    listed = ", ".join(f"{cut[name]:,} of {sizes[name]:,} examples of {name}" for name in facts)
    left_out = [f"{one['left_out']:,} of {name}" for name, one in facts.items() if one.get("left_out")]
    dropped = f", and leaves out {', '.join(left_out)}, of which no answer remains" if left_out else ""
    remedy = "The model reads no more: shorten the examples." if is_longest else "A larger one keeps them."
    is_warning = bool(left_out) or sum(cut.values()) > MAX_CUT_SHARE * sum(sizes.values())
    text = f"`data.max_length` cuts off the end of {listed}{dropped}. {remedy}"
    return [Note(kind="warning" if is_warning else "sweep", text=text)]


def select_model_inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in MODEL_KEYS if name in batch}


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Moves a batch to `device`, except for what the CPU reads (`HOST_KEYS`). Counts the scored tokens before."""
    counted = dict(batch)
    if "targets" in batch and batch["targets"].dim() == 2:
        counted["num_scored"] = (batch["targets"] != IGNORED).sum(1)
    return {name: value if name in HOST_KEYS else move_tensor(value, device) for name, value in counted.items()}


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor of the CPU to `device`. A copy from pinned memory to a GPU does not wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def repeat_batch(batch: Batch, *, slots: int) -> Batch:
    """Returns a batch repeated for every slot, slot after slot."""
    return {name: x.repeat(slots, *[1] * (x.dim() - 1)) if x.dim() else x for name, x in batch.items()}

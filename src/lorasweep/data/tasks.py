"""What a run learns and is scored by: `Task` gives each row's loss and, from an evaluation's rows, every metric.

`training` knows a task and batches, and nothing of language models or classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
    multilabel_exact_match,
    multilabel_f1_score,
)
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from lorasweep.config.data import Direction
from lorasweep.data.split import IGNORED, NOT_INPUTS, Batch
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest

DIRECTIONS: Mapping[str, Direction] = {
    "bits_per_byte": "minimize",
    "loss": "minimize",
    "perplexity": "minimize",
    "mse": "minimize",
    "accuracy": "maximize",
    "f1": "maximize",
    "matthews": "maximize",
    "pearson": "maximize",
    "spearman": "maximize",
}
LANGUAGE_MODEL_METRICS = ("bits_per_byte", "loss", "perplexity")


def goal_direction(metric: str) -> Direction:
    """Returns whether a smaller or a larger value of a metric is better.

    Raises:
        ConfigError: There is no such metric.
    """
    check_metric(metric, tuple(DIRECTIONS))
    return DIRECTIONS[metric]


def check_metric(metric: str, metrics: Sequence[str]) -> None:
    """Refuses a metric that is not among these.

    Raises:
        ConfigError: It is not; the message names the nearest.
    """
    if metric not in metrics:
        raise ConfigError(
            f"`data.metric` must be one of {', '.join(metrics)}, but got {metric!r}.{nearest(metric, metrics)}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleScores:
    """What an evaluation says of each row."""

    loss: Tensor
    """(rows,): the sum over a row's scored items, in nats (squared error in regression)."""
    items: Tensor
    """(rows,): scored items: tokens of a text, 1 for an example."""
    prediction: Tensor | None = None
    """(rows,) class or number, or (rows, labels) of 0 and 1."""
    target: Tensor | None = None
    """As `prediction`."""

    def of_slot(self, slot: int, *, slots: int) -> ExampleScores:
        """Returns the rows of one slot of a slot-major batch."""
        return ExampleScores(
            loss=self.loss.chunk(slots)[slot],
            items=self.items.chunk(slots)[slot],
            prediction=None if self.prediction is None else self.prediction.chunk(slots)[slot],
            target=None if self.target is None else self.target.chunk(slots)[slot],
        )

    def of_examples(self, mask: Tensor) -> ExampleScores:
        """Returns the rows where the mask, (rows,) of bool, is true."""
        values = {name: getattr(self, name) for name in FIELDS}
        return ExampleScores(**{name: value[mask] for name, value in values.items() if value is not None})


FIELDS = ("loss", "items", "prediction", "target")


class Task(Protocol):
    """What is learned from batches of one kind of data."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it is scored by; the first one is what `data.metric: auto` means."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns each row's loss to train on, (rows,), fp32: the sum over its scored items, times its weight."""

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Returns what an evaluation keeps of each row."""

    def compute(self, rows: ExampleScores) -> dict[str, Tensor]:
        """Returns every metric of an evaluation's rows, scalars."""

    def per_example(self, metric: str, rows: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns (values, weights) whose weighted mean is the metric (its logarithm for perplexity), or None."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModelling:
    """Predicts the next token, in every text or only where it is scored; for encoder-decoders as well.

    - `loss`: nats per scored token, L = Σ nats / Σ tokens.
    - `perplexity`: exp(L), per token.
    - `bits_per_byte`: L / (ln 2 · bytes per token) (The Pile, arXiv 2101.00027, section 3.1); unlike the others it
      compares across tokenizers.
    """

    bytes_per_token: float | None
    """UTF-8 bytes per scored token of the text that is scored, > 0; None where they are unknown."""
    metrics: tuple[str, ...] = LANGUAGE_MODEL_METRICS

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns each row's sum of nats over its scored tokens, (rows,)."""
        return sum_by_row(self._token_losses(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Returns each row's nats and scored tokens."""
        losses = self._token_losses(model, batch)
        scored = (batch["targets"] != IGNORED).to(losses.dtype)
        return ExampleScores(loss=sum_by_row(losses.double(), batch), items=sum_by_row(scored.double(), batch))

    def compute(self, rows: ExampleScores) -> dict[str, Tensor]:
        """Returns each metric, float64. NaN without a token."""
        loss = rows.loss.double().sum() / rows.items.double().sum()
        values = {"loss": loss, "perplexity": loss.exp()}
        if self.bytes_per_token is None:
            return values
        return {"bits_per_byte": loss / (math.log(2) * self.bytes_per_token), **values}

    def per_example(self, metric: str, rows: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns nats (or bits per byte) per token and tokens of each row."""
        per_token = rows.loss.double() / rows.items.double().clamp(min=1)
        if metric == "bits_per_byte" and self.bytes_per_token is not None:
            per_token = per_token / (math.log(2) * self.bytes_per_token)
        return per_token, rows.items

    def _token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats of each position, 0 where it is not scored, fp32, (batch, length)."""
        logits, targets = logits_of(model, batch), batch["targets"]  # (batch, length, vocabulary)
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
        )
        return losses.view(targets.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification:
    """One class per row.

    - `accuracy`: share of rows whose class is right.
    - `f1`: of the second class where there are two (as GLUE scores MRPC and QQP), else the mean over classes.
    - `matthews`: Matthews' correlation coefficient.
    - `loss`: mean cross-entropy in nats, without class weights or smoothing.
    """

    num_classes: int
    label_smoothing: float = 0.0
    metrics: tuple[str, ...] = ("accuracy", "f1", "matthews", "loss")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns each row's cross-entropy times the weight of its class."""
        logits = logits_of(model, batch).float()
        smoothing = self.label_smoothing
        losses = nn.functional.cross_entropy(logits, batch["targets"], reduction="none", label_smoothing=smoothing)
        return losses * batch["weights"] if "weights" in batch else losses

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Returns each row's cross-entropy and likeliest class."""
        logits, targets = logits_of(model, batch).float(), batch["targets"]
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        return ExampleScores(loss=losses, items=torch.ones_like(losses), prediction=logits.argmax(-1), target=targets)

    def compute(self, rows: ExampleScores) -> dict[str, Tensor]:
        """Returns each metric."""
        predicted, target = _pair(rows)
        classes = self.num_classes
        f1 = multiclass_f1_score(predicted, target, classes, average=None if classes == 2 else "macro")
        return {
            "accuracy": multiclass_accuracy(predicted, target, classes, average="micro").double(),
            "f1": (f1[1] if classes == 2 else f1).double(),
            "matthews": multiclass_matthews_corrcoef(predicted, target, classes).double(),
            "loss": rows.loss.double().mean(),
        }

    def per_example(self, metric: str, rows: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns 1 where the class is right, or the row's loss."""
        predicted, target = _pair(rows)
        return _per_example({"accuracy": (predicted == target).double(), "loss": rows.loss.double()}, metric)


@dataclass(frozen=True, kw_only=True, eq=False)
class MultiLabel:
    """Any number of labels per row.

    - `f1`: over all pairs of row and label together (micro).
    - `accuracy`: share of rows all of whose labels are right.
    - `loss`: binary cross-entropy in nats, mean over labels and rows.
    """

    num_labels: int
    metrics: tuple[str, ...] = ("f1", "accuracy", "loss")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns each row's mean binary cross-entropy over the labels."""
        logits = logits_of(model, batch).float()
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="none").mean(-1)

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Returns each row's loss and the labels that are likelier than not."""
        logits, targets = logits_of(model, batch).float(), batch["targets"]
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
        predicted = (logits > 0).long()
        return ExampleScores(loss=losses, items=torch.ones_like(losses), prediction=predicted, target=targets.long())

    def compute(self, rows: ExampleScores) -> dict[str, Tensor]:
        """Returns each metric."""
        predicted, target = _pair(rows)
        return {
            "f1": multilabel_f1_score(predicted, target, self.num_labels, average="micro").double(),
            "accuracy": multilabel_exact_match(predicted, target, self.num_labels).double(),
            "loss": rows.loss.double().mean(),
        }

    def per_example(self, metric: str, rows: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns 1 where all labels are right, or the row's loss."""
        predicted, target = _pair(rows)
        return _per_example({"accuracy": (predicted == target).all(-1).double(), "loss": rows.loss.double()}, metric)


@dataclass(frozen=True, kw_only=True, eq=False)
class Regression:
    """One number per row. `mse` is also the loss; `pearson` and `spearman` are correlations."""

    metrics: tuple[str, ...] = ("pearson", "spearman", "mse", "loss")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns each row's squared error."""
        return (logits_of(model, batch).float().squeeze(-1) - batch["targets"]).square()

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Returns each row's squared error and prediction."""
        predicted = logits_of(model, batch).float().squeeze(-1)
        losses = (predicted - batch["targets"]).square()
        return ExampleScores(loss=losses, items=torch.ones_like(losses), prediction=predicted, target=batch["targets"])

    def compute(self, rows: ExampleScores) -> dict[str, Tensor]:
        """Returns each metric; a correlation is 0 where every prediction is the same."""
        predicted, target = (values.double() for values in _pair(rows))
        mse = rows.loss.double().mean()
        if predicted.std(correction=0) == 0 or target.std(correction=0) == 0:
            none = torch.zeros_like(mse)
            return {"pearson": none, "spearman": none, "mse": mse, "loss": mse}
        return {
            "pearson": pearson_corrcoef(predicted, target),
            "spearman": spearman_corrcoef(predicted, target),
            "mse": mse,
            "loss": mse,
        }

    def per_example(self, metric: str, rows: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns the squared errors; correlations have no value per row."""
        return _per_example({"mse": rows.loss.double(), "loss": rows.loss.double()}, metric)


class Evaluation(Metric):
    """Gathers what one evaluation says of each row; `compute` gives the task's metrics of those of all processes."""

    is_differentiable = False
    full_state_update = False
    loss: list[Tensor]
    items: list[Tensor]
    prediction: list[Tensor]
    target: list[Tensor]

    def __init__(self, task: Task, **settings: Any) -> None:
        """Starts with no rows; settings are those of `torchmetrics.Metric`."""
        super().__init__(**settings)
        self.task = task
        for name in FIELDS:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, rows: ExampleScores) -> None:
        """Adds the rows of a batch."""
        for name in FIELDS:
            value = getattr(rows, name)
            if value is not None:
                getattr(self, name).append(value.detach())

    @property
    def examples(self) -> ExampleScores:
        """Every row so far, in the order in which they came."""
        joined = {name: getattr(self, name) for name in FIELDS}
        joined = {
            name: torch.cat(value) if isinstance(value, list) and value else value for name, value in joined.items()
        }
        given = {name: value for name, value in joined.items() if isinstance(value, Tensor) and value.numel()}
        return ExampleScores(**given)

    def compute(self) -> dict[str, Tensor]:
        """Returns each metric of everything added so far."""
        return self.task.compute(self.examples)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Returns what the model says of a batch: its `.logits`, or its output where that is a tensor."""
    output = model(**{name: value for name, value in batch.items() if name not in NOT_INPUTS})
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def sum_by_row(values: Tensor, batch: Batch) -> Tensor:
    """Returns the sum of a value per position over each row, (rows,)."""
    if "examples" not in batch:
        return values.sum(-1)
    rows = batch["examples"]
    return values.new_zeros(int(rows.max()) + 1).index_add(0, rows.flatten(), values.flatten())


def _pair(rows: ExampleScores) -> tuple[Tensor, Tensor]:
    assert rows.prediction is not None
    assert rows.target is not None
    return rows.prediction, rows.target


def _per_example(values: Mapping[str, Tensor], metric: str) -> tuple[Tensor, Tensor] | None:
    found = values.get(metric)
    return None if found is None else (found, torch.ones_like(found))

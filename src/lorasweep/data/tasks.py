"""Tasks: each defines the loss and the metrics for one kind of data. `training` uses only `Task`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from lorasweep.config.components import instantiate
from lorasweep.config.data import MetricComponent, ScoreMetric
from lorasweep.data.scored_tokens import compute_logits, score_tokens
from lorasweep.data.split import IGNORED, Batch
from lorasweep.errors import ConfigError, describe_error

LANGUAGE_MODEL_METRICS = ("bits_per_byte", "loss", "perplexity")
EXAMPLE_FIELDS = ("loss", "items", "prediction", "target")
SCORE_FIELDS = (*EXAMPLE_FIELDS, "metric_input", "metric_target")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleScores:
    """Loss and prediction of each example of an evaluation."""

    loss: Tensor
    """Sum of the losses of an example's scored items, (examples,), in nats; for regression the squared error."""
    items: Tensor
    """Number of scored items of each example, (examples,): its scored tokens for text, 1 for labels."""
    prediction: Tensor | None = None
    """Predicted class or number, (examples,). None for text."""
    target: Tensor | None = None
    """The right answer, in the shape of `prediction`."""
    metric_input: Tensor | None = None
    """Predictions for the metric of `data.metric._target_`, (examples, ...); for text (scored tokens,)."""
    metric_target: Tensor | None = None
    """Targets for that metric, (examples, ...); for text (scored tokens,)."""

    def map(self, function: Callable[[Tensor], Tensor], *, names: Sequence[str] = SCORE_FIELDS) -> ExampleScores:
        """Returns the tensors of these names, with a function applied to each."""
        values = {name: getattr(self, name) for name in names}
        return ExampleScores(**{name: function(value) for name, value in values.items() if value is not None})

    def select_slot(self, slot: int, *, slots: int) -> ExampleScores:
        """Returns the scores of one slot, if the examples are stored slot after slot."""
        return self.map(lambda values: values.chunk(slots)[slot])  # all slots have the same number of scored tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnMetric:
    """A metric that each evaluation computes once, from all examples.

    It gets probabilities of classes (of the second of two classes if it is binary), predicted numbers, or the predicted
    token of each scored position. All probabilities of text would fill the memory.
    """

    score: ScoreMetric
    metric: Metric

    def compute(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Returns the metric as a scalar, float64."""
        metric = self.metric.to(predicted.device)
        metric.reset()
        try:
            metric.update(predicted, target)
            return torch.as_tensor(metric.compute(), device=predicted.device).double().reshape(())
        except Exception as error:  # the metric may be the user's
            raise ConfigError(
                f"`data.metric` must give one number from predictions of shape {tuple(predicted.shape)} and targets of "
                f"shape {tuple(target.shape)}, but fails: {describe_error(error)}."
            ) from error
        finally:
            metric.reset()


def build_own_metric(component: MetricComponent) -> OwnMetric:
    """Creates the metric of `data.metric._target_`.

    Raises:
        ConfigError: It is no torchmetrics metric, does not take the arguments, or its direction is not known.
    """
    expected: type[Metric] = Metric  # type: ignore[type-abstract]
    metric = instantiate(component, key="data.metric", expected=expected)
    # Lightning's processes have already gathered all predictions; a second gathering would count each one several times
    metric.distributed_available_fn = _never
    direction = component.direction
    if direction == "auto":
        if metric.higher_is_better is None:
            raise ConfigError(
                f"`data.metric.direction` must be minimize or maximize, because {component.name} does not say whether "
                "higher is better."
            )
        direction = "maximize" if metric.higher_is_better else "minimize"
    return OwnMetric(score=ScoreMetric(name=component.name, direction=direction), metric=metric)


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True, eq=False)
class Task(ABC):
    """Loss and metrics for one kind of data."""

    own_metric: OwnMetric | None = None
    """The metric of `data.metric._target_`, which `compute` adds to the task's metrics."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """The task's metrics; `data.metric: auto` means the first one."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " examples"]:
        """Returns each example's training loss, in fp32 or wider: the sum over its items, times its class weight."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Returns loss and prediction of each example of a batch."""

    @abstractmethod
    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        """Returns each of the task's metrics over all examples of an evaluation, as scalars."""

    def compute(self, scores: ExampleScores) -> dict[str, Tensor]:
        """Returns the task's metrics and the own metric over all examples of an evaluation, as scalars."""
        values = self.compute_metrics(scores)
        if self.own_metric is None or scores.metric_input is None or scores.metric_target is None:
            return values
        return {
            **values,
            self.own_metric.score.name: self.own_metric.compute(scores.metric_input, scores.metric_target),
        }

    @abstractmethod
    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns a value and a weight for each example. The weighted mean of the values is the metric.

        For perplexity, the weighted mean is its logarithm. Returns None for a metric that is not a mean over examples.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModelling(Task):
    """Predicts the next token.

    - `loss`: nats per scored token, L = Σ nats / Σ tokens.
    - `perplexity`: exp(L), per token.
    - `bits_per_byte`: L / (ln 2 · bytes per token) (The Pile, arXiv 2101.00027, section 3.1). Only this metric can be
      compared between models with different tokenizers.
    """

    bytes_per_token: float
    """Number of UTF-8 bytes of the scored text divided by its number of tokens, > 0."""
    by_chunk: bool = False
    """Whether the base model is one for which `can_score_by_chunk` is True."""
    metrics: tuple[str, ...] = LANGUAGE_MODEL_METRICS

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return score_tokens(model, batch, by_chunk=self.by_chunk)[0].sum(-1)

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        has_own_metric = self.own_metric is not None
        losses, predicted = score_tokens(model, batch, by_chunk=self.by_chunk, with_predicted=has_own_metric)
        targets, own_columns = batch["targets"], {}
        scored = targets != IGNORED
        if predicted is not None:
            own_columns = {"metric_input": predicted[scored], "metric_target": targets[scored]}
        # fp64, because the tokens of a whole evaluation are added up
        loss, items = (values.double().sum(-1) for values in (losses, scored))
        return ExampleScores(loss=loss, items=items, **own_columns)

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        loss = scores.loss.double().sum() / scores.items.double().sum()
        return {
            "bits_per_byte": loss / (math.log(2) * self.bytes_per_token),
            "loss": loss,
            "perplexity": loss.exp(),
        }

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns the loss per token of each example (in nats, or in bits per byte), and its number of tokens."""
        if metric not in LANGUAGE_MODEL_METRICS:
            return None
        per_token = scores.loss.double() / scores.items.double().clamp(min=1)
        if metric == "bits_per_byte":
            per_token = per_token / (math.log(2) * self.bytes_per_token)
        return per_token, scores.items


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelTask(Task):
    """Base of tasks with labels. Each example counts once, however long its text is."""

    @abstractmethod
    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns each example's loss, (examples,), without class weights."""

    @abstractmethod
    def fit_constant(self, labels: Tensor) -> Tensor:
        """Returns the logits of the best answer that is the same for all examples: (classes,), or (1,) for numbers."""

    @abstractmethod
    def _predict(self, logits: Tensor) -> Tensor:
        """Returns the predicted class or number of each example."""

    def _to_metric_input(self, logits: Tensor) -> Tensor:
        """Returns what the own metric gets as predictions."""
        return self._predict(logits)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = self._loss(compute_logits(model, batch), batch["targets"])
        return losses * batch["weights"] if "weights" in batch else losses

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        return self.score_logits(compute_logits(model, batch), batch)

    def score_logits(self, logits: Tensor, batch: Batch) -> ExampleScores:
        """Returns what `score` returns, for a model's output."""
        losses = self._loss(logits, batch["targets"])
        prediction = self._predict(logits)
        target = batch["targets"].to(prediction.dtype)
        own_columns = {}
        if self.own_metric is not None:
            own_columns = {"metric_input": self._to_metric_input(logits), "metric_target": target}
        return ExampleScores(
            loss=losses, items=torch.ones_like(losses), prediction=prediction, target=target, **own_columns
        )

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns the loss of each example, or for `accuracy` 1 if its class is right. All weights are 1."""
        if metric == "accuracy":
            predicted, target = _unpack(scores)
            values = (predicted == target).double()
        elif metric in ("loss", "mse"):
            values = scores.loss.double()
        else:
            return None
        return values, torch.ones_like(values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(LabelTask):
    """Predicts one class per example.

    - `accuracy`: fraction of examples whose class is right.
    - `f1`: for two classes, F1 of the second class (as GLUE scores MRPC and QQP). Otherwise the mean over classes.
    - `matthews`: Matthews' correlation coefficient; 0 if all predictions or all labels are equal.
    - `loss`: mean cross-entropy in nats, without class weights.
    """

    num_classes: int
    metrics: tuple[str, ...] = ("accuracy", "f1", "matthews", "loss")

    def fit_constant(self, labels: Tensor) -> Tensor:
        # One more example of each class, so that a class without examples has a finite loss.
        return (labels.long().bincount(minlength=self.num_classes) + 1.0).log()

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, reduction="none")

    def _predict(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def _to_metric_input(self, logits: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        assert self.own_metric is not None
        is_binary = any(base.__name__.startswith("Binary") for base in type(self.own_metric.metric).__mro__)
        return probabilities[:, 1] if is_binary and self.num_classes == 2 else probabilities

    def find_unpredicted(self, scores: ExampleScores) -> list[int]:
        """Returns the classes that examples have and that are never predicted."""
        predicted, target = (set(values.tolist()) for values in _unpack(scores))
        return sorted(target - predicted)

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        predicted, target = _unpack(scores)
        classes = self.num_classes
        f1 = multiclass_f1_score(predicted, target, classes, average=None if classes == 2 else "macro")
        matthews = multiclass_matthews_corrcoef(predicted, target, classes).double()
        # torchmetrics returns other values, such as -0.58, if all predictions are equal
        varies = (predicted != predicted[0]).any() & (target != target[0]).any()
        return {
            "accuracy": multiclass_accuracy(predicted, target, classes, average="micro").double(),
            "f1": (f1[1] if classes == 2 else f1).double(),
            "matthews": matthews.where(varies, 0.0),
            "loss": scores.loss.double().mean(),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Regression(LabelTask):
    """Predicts one number per example. `mse` is also the loss; `pearson` and `spearman` are correlations."""

    metrics: tuple[str, ...] = ("pearson", "spearman", "mse", "loss")

    def fit_constant(self, labels: Tensor) -> Tensor:
        return labels.double().mean(0, keepdim=True).float()

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (self._predict(logits) - targets).square()

    def _predict(self, logits: Tensor) -> Tensor:
        return logits.squeeze(-1)

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        """Returns each metric; a correlation is 0 if all predictions or all targets are equal."""
        predicted, target = (values.double() for values in _unpack(scores))
        mse = scores.loss.double().mean()
        pearson = spearman = torch.zeros_like(mse)
        if predicted.std(correction=0) != 0 and target.std(correction=0) != 0:
            pearson, spearman = pearson_corrcoef(predicted, target), spearman_corrcoef(predicted, target)
        return {"pearson": pearson, "spearman": spearman, "mse": mse, "loss": mse}


class Evaluation(Metric):
    """Collects the scores of one evaluation. `compute` returns the metrics over the examples of all processes."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, task: Task, **settings: Any) -> None:
        super().__init__(**settings)
        self.task = task
        for name in SCORE_FIELDS:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: ExampleScores) -> None:
        for name in SCORE_FIELDS:
            value = getattr(scores, name)
            if value is not None:
                getattr(self, name).append(value.detach())

    @property
    def examples(self) -> ExampleScores:
        """The scores of all examples so far, in the order of the updates."""
        # A state is a list until torchmetrics gathers it from all processes. Then it is one tensor.
        states = {name: getattr(self, name) for name in SCORE_FIELDS}
        joined = {name: torch.cat(x) if isinstance(x, list) and x else x for name, x in states.items()}
        return ExampleScores(**{name: x for name, x in joined.items() if isinstance(x, Tensor) and x.numel()})

    def compute(self) -> dict[str, Tensor]:
        return self.task.compute(self.examples)


def read_metrics(evaluations: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Returns the metrics of several evaluations as numbers. One read for all, because each waits for the GPU."""
    values = iter(torch.stack([x.double() for metrics in evaluations for x in metrics.values()]).cpu().tolist())
    return [{name: next(values) for name in metrics} for metrics in evaluations]


def _unpack(scores: ExampleScores) -> tuple[Tensor, Tensor]:
    assert scores.prediction is not None
    assert scores.target is not None
    return scores.prediction, scores.target

"""The prediction of labels: classes (`Classification`) and numbers (`Regression`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from lorasweep.config.data import Direction
from lorasweep.data.rows import Batch, Rows
from lorasweep.data.source import DataSource
from lorasweep.objectives.objective import ExampleScores, Objective
from lorasweep.objectives.scored_tokens import compute_logits


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelObjective(Objective):
    """Base of objectives with labels. Each example counts once, however long its text is."""

    @abstractmethod
    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns each example's loss, (examples,), without class weights."""

    @abstractmethod
    def fit_constant(self, train: Rows) -> Tensor:
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
        """Returns the scores of a batch from the model's logits."""
        losses = self._loss(logits, batch["targets"])
        prediction = self._predict(logits)
        target = batch["targets"].to(prediction.dtype)
        own_columns = {}
        if self.own_metric is not None:
            own_columns = {"metric_input": self._to_metric_input(logits), "metric_target": target}
        return ExampleScores(
            loss=losses, items=torch.ones_like(losses), prediction=prediction, target=target, **own_columns
        )

    def score_constant(self, train: Rows, split: Rows, indices: Sequence[int]) -> ExampleScores:
        """Returns the scores of examples if each gets the same answer.

        It is the most frequent class of the training split (the first of equally frequent classes), or the mean of its
        numbers. For the loss, the probabilities are the shares of the classes after one more example of each.
        """
        labels = split.columns["targets"][torch.tensor(indices)]
        return self.score_logits(self.fit_constant(train).expand(len(labels), -1), {"targets": labels})

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns the loss of each example, or for `accuracy` 1 if its class is right, else 0. All weights are 1."""
        if metric == "accuracy":
            predicted, target = _unpack(scores)
            values = (predicted == target).double()
        elif metric in ("loss", "mse"):
            values = scores.loss.double()
        else:
            return None
        return values, torch.ones_like(values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(LabelObjective):
    """Predicts one class per example.

    - `accuracy`: fraction of examples whose class is right.
    - `f1`: for two classes, F1 of the second class (as GLUE scores MRPC and QQP). Otherwise the mean over classes.
    - `matthews`: Matthews' correlation coefficient; 0 if all predictions or all labels are equal.
    - `loss`: mean cross-entropy in nats, without class weights.
    """

    metrics: ClassVar[Mapping[str, Direction]] = {
        **dict.fromkeys(("accuracy", "f1", "matthews"), "maximize"),
        "loss": "minimize",
    }

    num_classes: int

    @classmethod
    def find_facts(cls, source: DataSource, model: nn.Module) -> dict[str, Any]:
        return {"num_classes": len(source.label_names)}

    def fit_constant(self, train: Rows) -> Tensor:
        # One more example of each class, so that a class without examples has a finite loss.
        return (train.columns["targets"].long().bincount(minlength=self.num_classes) + 1.0).log()

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, reduction="none")

    def _predict(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def _to_metric_input(self, logits: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        assert self.own_metric is not None
        is_binary = any(base.__name__.startswith("Binary") for base in type(self.own_metric.metric).__mro__)
        return probabilities[:, 1] if is_binary and self.num_classes == 2 else probabilities

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
class Regression(LabelObjective):
    """Predicts one number per example. `mse` is also the loss; `pearson` and `spearman` are correlations."""

    metrics: ClassVar[Mapping[str, Direction]] = {
        **dict.fromkeys(("pearson", "spearman"), "maximize"),
        **dict.fromkeys(("mse", "loss"), "minimize"),
    }

    def fit_constant(self, train: Rows) -> Tensor:
        return train.columns["targets"].double().mean(0, keepdim=True).float()

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


def _unpack(scores: ExampleScores) -> tuple[Tensor, Tensor]:
    assert scores.prediction is not None
    assert scores.target is not None
    return scores.prediction, scores.target

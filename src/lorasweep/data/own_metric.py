"""A metric of torchmetrics, or of the user, that `data.metric` names by `_target_`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lorasweep.config.components import instantiate
from lorasweep.config.data import METRIC_RANGES, Direction, MetricComponent, ScoreMetric
from lorasweep.errors import ConfigError, describe_error

Predictions = Literal["probabilities", "second_class", "labels", "logits"]
"""Forms of the predictions that a metric gets. `second_class`: the probability of the second of two classes."""
RESERVED_NAMES = frozenset({*METRIC_RANGES, "step", "bleu", "rouge1", "rouge2", "rougeL"})
"""Names that other values of an evaluation have in the records."""
RANGES_BY_NAME: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("CohenKappa", "MatthewsCorrCoef", "KendallRankCorrCoef", "CosineSimilarity"), (-1.0, 1.0)),
    **dict.fromkeys(("HingeLoss", "CoverageError"), (0.0, math.inf)),
    "ExplainedVariance": (-math.inf, 1.0),
}
"""Ranges of metrics of torchmetrics by a part of their name, where the limits of their plots are narrower."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnMetric:
    """A metric and the form of its predictions. Each evaluation computes it once, from all examples."""

    score: ScoreMetric
    metric: Metric
    predictions: Predictions

    def compute(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Returns the metric as a scalar, float64.

        Raises:
            ConfigError: The metric does not take these predictions, or gives more than one number.
        """
        metric = self.metric.to(predicted.device)
        try:
            metric.reset()
            metric.update(predicted, target)
            value = metric.compute()
        except Exception as error:  # the class may be the user's
            raise ConfigError(
                f"`data.metric` must take {self.predictions.replace('_', ' ')} of shape {tuple(predicted.shape)} and "
                f"targets of shape {tuple(target.shape)}, but {self.score.name} fails: {describe_error(error)}. "
                "See `data.metric.predictions`."
            ) from error
        finally:
            metric.reset()
        if not isinstance(value, Tensor | float | int) or torch.as_tensor(value).numel() != 1:
            given = f"{value.numel()} numbers" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"`data.metric` must give one number, but {self.score.name} gives {given}. Set an argument such as "
                "`data.metric.average=macro`."
            )
        return torch.as_tensor(value, device=predicted.device).double().reshape(())

    def check(self, predicted: Tensor, target: Tensor) -> None:
        """Raises ConfigError if the metric does not take such predictions and targets, before anything trains."""
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # the predictions are made up, so a class may be missing
            self.compute(predicted, target)


def build_own_metric(component: MetricComponent, *, kind: str, num_labels: int) -> OwnMetric:
    """Creates the metric of `data.metric._target_`.

    Args:
        component: The class and its arguments.
        kind: The kind of the data, as in `DataSource`.
        num_labels: Number of classes or labels; 0 for numbers and text.

    Raises:
        ConfigError: It is no torchmetrics metric, does not take the arguments, its direction is not known, or it can't
            get these predictions for this data.
    """
    expected: type[Metric] = Metric  # type: ignore[type-abstract]
    metric = instantiate(component, key="data.metric", expected=expected)
    # Lightning's processes have already gathered all predictions; a second gathering would count each one several times
    metric.distributed_available_fn = _is_never_distributed
    if component.name in RESERVED_NAMES:
        raise ConfigError(
            f"`data.metric._target_` must be a class with another name than {component.name!r}, which is the name of a "
            "built-in metric. Rename the class."
        )
    return OwnMetric(
        score=ScoreMetric(
            name=component.name, direction=_find_direction(component, metric), range=_find_range(component, metric)
        ),
        metric=metric,
        predictions=_choose_predictions(component, metric, kind=kind, num_labels=num_labels),
    )


def _is_never_distributed() -> bool:
    return False


def _find_direction(component: MetricComponent, metric: Metric) -> Direction:
    if component.direction != "auto":
        return component.direction
    if metric.higher_is_better is None:
        raise ConfigError(
            f"`data.metric.direction` must be minimize or maximize, because {component.name} does not say whether "
            "higher is better. Add `data.metric.direction=maximize` or `data.metric.direction=minimize`."
        )
    return "maximize" if metric.higher_is_better else "minimize"


def _find_range(component: MetricComponent, metric: Metric) -> tuple[float, float]:
    if type(metric).__module__.startswith("torchmetrics."):
        for part, limits in RANGES_BY_NAME.items():
            if part in type(metric).__name__:
                return limits
    low, high = metric.plot_lower_bound, metric.plot_upper_bound
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _choose_predictions(component: MetricComponent, metric: Metric, *, kind: str, num_labels: int) -> Predictions:
    """Returns the form of the predictions.

    Text has predicted tokens only, because its probabilities would fill the memory.
    """
    wanted = component.predictions
    if kind in ("documents", "conversations", "regression"):
        allowed = "labels" if kind != "regression" else None
        if wanted not in ("auto", allowed):
            raise ConfigError(
                f"`data.metric.predictions` must be auto for this data, but got {wanted!r}. The metric gets "
                f"{'predicted numbers' if kind == 'regression' else 'the predicted token of each scored position'}."
            )
        return "labels"
    is_binary = any(
        base.__name__.startswith("Binary") and base.__module__.startswith("torchmetrics.")
        for base in type(metric).__mro__
    )
    if kind == "single_label" and is_binary and wanted != "labels":
        if num_labels != 2 or wanted == "logits":
            problem = f"the data has {num_labels} classes" if num_labels != 2 else "got 'logits'"
            raise ConfigError(
                f"`data.metric` must be a metric of several classes, unless there are two classes and "
                f"`data.metric.predictions` is auto, probabilities or labels, but {component.name} is binary and "
                f"{problem}. Use the metric's `Multiclass...` class."
            )
        return "second_class"
    return "probabilities" if wanted == "auto" else wanted

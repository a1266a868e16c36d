"""A metric of torchmetrics, or of the user, that `data.metric` names by `_target_`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from lorasweep.config.components import instantiate
from lorasweep.config.data import MetricComponent, ScoreMetric
from lorasweep.errors import ConfigError, describe_error


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnMetric:
    """A metric that each evaluation computes once, from all examples.

    It gets probabilities of classes (of the second of two classes if it is binary), predicted numbers, or the predicted
    token of each scored position. All probabilities of text would fill the memory.
    """

    score: ScoreMetric
    metric: Metric

    @property
    def is_binary(self) -> bool:
        return any(base.__name__.startswith("Binary") for base in type(self.metric).__mro__)

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
    metric.distributed_available_fn = _is_never_distributed
    direction = component.direction
    if direction == "auto":
        if metric.higher_is_better is None:
            raise ConfigError(
                f"`data.metric.direction` must be minimize or maximize, because {component.name} does not say whether "
                "higher is better."
            )
        direction = "maximize" if metric.higher_is_better else "minimize"
    return OwnMetric(score=ScoreMetric(name=component.name, direction=direction), metric=metric)


def _is_never_distributed() -> bool:
    return False

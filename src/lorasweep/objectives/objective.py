"""The base class of objectives, the metric of a user, and the scores that an evaluation collects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric

from lorasweep.config.components import instantiate
from lorasweep.config.data import Direction, MetricComponent, ScoreMetric
from lorasweep.config.objective import ObjectiveComponent, ObjectiveConfig
from lorasweep.data.rows import Batch, Rows
from lorasweep.data.source import DataSource
from lorasweep.errors import ConfigError, describe_error

EXAMPLE_FIELDS = ("loss", "items", "prediction", "target", "details")
SCORE_FIELDS = (*EXAMPLE_FIELDS, "metric_input", "metric_target")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleScores:
    """Loss and prediction of each example of an evaluation."""

    loss: Tensor
    """Sum of the losses of an example's scored items, (examples,), in nats; for regression the squared error."""
    items: Tensor
    """Number of scored items of each example, (examples,): its scored tokens for text, 1 for labels and pairs."""
    prediction: Tensor | None = None
    """Predicted class or number, or the margin of a pair, (examples,). None for text."""
    target: Tensor | None = None
    """The right answer, in the shape of `prediction`. None for text and pairs."""
    details: Tensor | None = None
    """Further numbers of each example, (examples, numbers), from which an objective computes metrics."""
    metric_input: Tensor | None = None
    """Predictions for the metric of `data.metric._target_`, (examples, ...)."""
    metric_target: Tensor | None = None
    """Targets for that metric, (examples, ...)."""

    def map(self, function: Callable[[Tensor], Tensor], *, names: Sequence[str] = SCORE_FIELDS) -> ExampleScores:
        """Returns the tensors of these names, with a function applied to each."""
        values = {name: getattr(self, name) for name in names}
        return ExampleScores(**{name: function(value) for name, value in values.items() if value is not None})

    def select_slot(self, slot: int, *, slots: int) -> ExampleScores:
        """Returns the scores of one slot, if the examples are stored slot after slot."""
        return self.map(lambda values: values.chunk(slots)[slot])  # all slots score the same examples


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnMetric:
    """A metric that each evaluation computes once, from all examples.

    It gets probabilities of classes (a binary metric: of the second class), or predicted numbers.
    """

    score: ScoreMetric
    metric: Metric

    def compute(self, predicted: Tensor, target: Tensor, **more: Tensor) -> Tensor:
        """Returns the metric as a scalar, float64. `more` are further arguments of its `update`."""
        metric = self.metric.to(predicted.device)
        metric.reset()
        try:
            metric.update(predicted, target, **more)
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
class Objective(ABC):
    """What is learned from examples: the loss, the metrics, and the value of each example.

    The fields of a subclass are what `find_facts` returns, and for a class of `objective._target_` also the other keys
    of `objective`. One object serves all runs on the same data, also those in the slots of a pack.
    """

    metrics: ClassVar[Mapping[str, Direction]]
    """The objective's metrics, and whether a lower or a higher value is better. `auto` means the first one."""
    settings_type: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    """The settings of an objective of a task. Its `slot_keys` may differ between the slots of a pack."""
    needs_reference: ClassVar[bool] = False
    """Whether each row of a batch needs a number of the frozen base, which `compute_reference` returns. It is computed
    once for all runs, and a batch has it as `reference`."""

    settings: ObjectiveConfig | ObjectiveComponent = field(default_factory=ObjectiveConfig)
    """The settings of one of the runs. Other runs may have other numbers for the slots (`get_slot_numbers`)."""
    own_metric: OwnMetric | None = None
    """The metric of `data.metric._target_`, which `compute` adds to the objective's metrics."""

    @classmethod
    def find_facts(cls, source: DataSource, model: nn.Module) -> dict[str, Any]:
        """Returns fields that follow from the data and the base model, such as the number of classes."""
        return {}

    def get_slot_numbers(self, config: ObjectiveConfig | ObjectiveComponent) -> Mapping[str, float]:
        """Returns the numbers that a batch has for each row of a run.

        A run that learns by another objective, and is only scored by this one, has the numbers of `settings`.
        """
        return (config if type(config) is type(self.settings) else self.settings).slot_numbers

    def for_split(self, split: Rows) -> Objective:
        """Returns the objective that scores a split. It differs if a metric needs a fact of the split."""
        return self

    def compute_reference(self, model: nn.Module, batch: Batch) -> Float[Tensor, " rows"]:
        """Returns the number of the frozen base for each row. Only for an objective that `needs_reference`."""
        raise NotImplementedError

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " examples"]:
        """Returns each example's training loss, in fp32 or wider: the sum over its items, times its class weight."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Returns loss and prediction of each example of a batch."""

    @abstractmethod
    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        """Returns each of the objective's metrics over all examples of an evaluation, as scalars."""

    def compute(self, scores: ExampleScores) -> dict[str, Tensor]:
        """Returns the objective's metrics and the own metric over all examples of an evaluation, as scalars."""
        values = self.compute_metrics(scores)
        if self.own_metric is None or scores.metric_input is None or scores.metric_target is None:
            return values
        return {
            **values,
            self.own_metric.score.name: self.own_metric.compute(scores.metric_input, scores.metric_target),
        }

    @abstractmethod
    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns a value and a weight for each example, whose weighted mean is the metric (see `from_mean`).

        Verdicts need them. Returns None for a metric without such a mean.
        """

    def from_mean(self, metric: str, mean: Tensor) -> Tensor:
        """Returns the metric from the weighted mean of the values of `per_example`."""
        return mean

    def fit_constant(self, train: Rows) -> Tensor | None:
        """Returns the model output that is the best one answer for all examples; None if there is none."""
        return None

    def score_constant(self, train: Rows, split: Rows, indices: Sequence[int]) -> ExampleScores | None:
        """Returns a split's scores if all examples get the answer of `fit_constant`; None without such an answer."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on how the base model is scored."""
        return ()


class Evaluation(Metric):
    """Collects the scores of one evaluation. `compute` returns the metrics over the examples of all processes."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, objective: Objective, **settings: Any) -> None:
        super().__init__(**settings)
        self.objective = objective
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
        return self.objective.compute(self.examples)


def read_metrics(evaluations: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Returns the metrics of several evaluations as numbers. Reads all at once, because each read waits for the GPU."""
    values = iter(torch.stack([x.double() for metrics in evaluations for x in metrics.values()]).cpu().tolist())
    return [{name: next(values) for name in metrics} for metrics in evaluations]

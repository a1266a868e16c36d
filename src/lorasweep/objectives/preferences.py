"""Preferences: of two answers to a prompt, the chosen one must become more probable than the rejected one (DPO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from lorasweep.config.build import PositiveFloat, convert
from lorasweep.config.data import Direction
from lorasweep.data.split import Batch
from lorasweep.objectives.next_tokens import TokenObjective
from lorasweep.objectives.objective import ExampleScores
from lorasweep.objectives.scored_tokens import score_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Preferences(TokenObjective):
    """Prefers chosen answers to rejected ones, as DPO does (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    The reward of an answer y to a prompt x is β · (log π(y|x) - log π₀(y|x)), where π₀ is the frozen base, and the
    margin m of a pair is the reward of the chosen answer minus that of the rejected one.

    - `preference_accuracy`: share of pairs with m > 0. A pair with m = 0 counts half, so the base has 0.5.
    - `reward_margin`: mean of m; 0 for the base.
    - `loss`: mean of -(1 - ε) · log σ(m) - ε · log σ(-m) with ε = `label_smoothing` (conservative DPO, Mitchell 2023);
      ln 2 for the base.

    Accuracy is the first metric, because β does not change it. The loss of the same weights depends on β, so it would
    compare values of β, and arms that search β, by more than what they learned.
    """

    metrics: ClassVar[Mapping[str, Direction]] = {
        **dict.fromkeys(("preference_accuracy", "reward_margin"), "maximize"),
        "loss": "minimize",
    }
    slot_settings: ClassVar[Mapping[str, Any]] = {"beta": PositiveFloat}
    slot_defaults: ClassVar[Mapping[str, float]] = {"beta": 0.1}
    """0.1 is what the authors used unless they say otherwise (arXiv 2305.18290, appendix B), and TRL's default."""
    needs_reference: ClassVar[bool] = True

    label_smoothing: float = 0.0
    """Probability ε that the answers of a pair are swapped, 0 <= ε < 0.5."""

    def __post_init__(self) -> None:
        convert(Annotated[float, Field(ge=0, lt=0.5)], self.label_smoothing, key="objective.label_smoothing")

    def compute_reference(self, model: nn.Module, batch: Batch) -> Float[Tensor, " rows"]:
        """Returns the log probability of each row's answer.

        The losses of tokens are added up in fp64: a sum has hundreds of nats, and the margin is a small difference.
        """
        return -score_tokens(model, batch, by_chunk=self.by_chunk)[0].double().sum(-1)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss(self._margins(model, batch))

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        if any(parameter.requires_grad for parameter in model.parameters()):
            margins = self._margins(model, batch)
        else:  # the base: two batches of other shapes would differ by rounding, which must not decide who is preferred
            margins = batch["reference"].new_zeros(len(batch["reference"]) // 2)
        own_columns = {}
        if self.own_metric is not None:
            own_columns = {"metric_input": margins.sigmoid(), "metric_target": torch.ones_like(margins).long()}
        loss, items = self._loss(margins), torch.ones_like(margins)
        return ExampleScores(loss=loss, items=items, prediction=margins, **own_columns)

    def _margins(self, model: nn.Module, batch: Batch) -> Float[Tensor, " pairs"]:
        ratios = self.compute_reference(model, batch) - batch["reference"]
        return batch["beta"][::2] * (ratios[::2] - ratios[1::2])

    def _loss(self, margins: Tensor) -> Tensor:
        return softplus(-margins) + self.label_smoothing * margins  # log σ(m) - log σ(-m) = m

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        return {name: self._values(name, scores).mean() for name in self.metrics}

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns the metric's value of each pair. All weights are 1."""
        return (self._values(metric, scores), scores.items) if metric in self.metrics else None

    def _values(self, metric: str, scores: ExampleScores) -> Tensor:
        assert scores.prediction is not None
        margins = scores.prediction.double()
        by_metric = {"preference_accuracy": (margins.sign() + 1) / 2, "reward_margin": margins}
        return by_metric.get(metric, scores.loss.double())

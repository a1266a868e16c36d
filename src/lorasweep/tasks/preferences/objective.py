"""The base of objectives that learn which of two answers to a prompt is chosen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorasweep.config.data import Direction
from lorasweep.data.rows import IGNORED, Batch
from lorasweep.objectives.next_tokens import TokenObjective
from lorasweep.objectives.objective import ExampleScores
from lorasweep.objectives.scored_tokens import score_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class PairObjective(TokenObjective):
    """Learns from pairs of answers. A subclass computes the margin m of each pair, and its loss.

    - `preference_accuracy`: share of pairs with m > 0. A pair with m = 0 counts half.
    - `reward_margin`: mean of m.
    - `chosen_log_probability`, `rejected_log_probability`: means over the answers of the sum over their tokens.
    - `loss`: mean of the loss.

    Accuracy is the first metric, because the weight β does not change it. The loss of the same weights depends on β, so
    it would compare values of β, and arms that search β, by more than what they learned.
    """

    metrics: ClassVar[Mapping[str, Direction]] = {
        **dict.fromkeys(("preference_accuracy", "reward_margin"), "maximize"),
        "loss": "minimize",
        **dict.fromkeys(("chosen_log_probability", "rejected_log_probability"), "maximize"),
    }
    detail_names: ClassVar[tuple[str, ...]] = ("chosen_log_probability", "rejected_log_probability")
    """The metrics that are means of the further numbers of `compare`."""

    @abstractmethod
    def compare(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the margin and the loss of each pair, (pairs,), and the numbers of `detail_names`, (pairs, names)."""

    def sum_log_probabilities(self, model: nn.Module, batch: Batch) -> Float[Tensor, " rows"]:
        """Returns the log probability of each row's answer.

        The losses of tokens are added up in fp64: a sum has hundreds of nats, and a margin is a small difference.
        """
        return -score_tokens(model, batch, by_chunk=self.by_chunk).double().sum(-1)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.compare(model, batch)[1]

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        margins, losses, details = self.compare(model, batch)
        return ExampleScores(loss=losses, items=torch.ones_like(margins), prediction=margins, details=details)

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        return {name: self._values(name, scores).mean() for name in self.metrics}

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns the metric's value of each pair. All weights are 1."""
        return (self._values(metric, scores), scores.items) if metric in self.metrics else None

    def _values(self, metric: str, scores: ExampleScores) -> Tensor:
        assert scores.prediction is not None
        assert scores.details is not None
        margins = scores.prediction.double()
        by_metric = {"preference_accuracy": (margins.sign() + 1) / 2, "reward_margin": margins}
        by_metric |= dict(zip(self.detail_names, scores.details.double().unbind(1), strict=True))
        return by_metric.get(metric, scores.loss.double())


def split_pairs(values: Float[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
    """Returns the values of the chosen and those of the rejected answers, (pairs,)."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def count_answer_tokens(batch: Batch) -> Float[Tensor, " rows"]:
    """Returns the number of tokens of each answer."""
    return (batch["targets"] != IGNORED).sum(1)

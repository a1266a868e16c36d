"""Next-token prediction: the objective of running text and conversations; and the base of objectives of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lorasweep.config.data import Direction
from lorasweep.data.rows import IGNORED, Batch, Rows
from lorasweep.data.source import DataSource
from lorasweep.objectives.objective import ExampleScores, Objective
from lorasweep.objectives.scored_tokens import can_score_by_chunk, score_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenObjective(Objective):
    """Base of objectives that score tokens of a causal model."""

    by_chunk: bool = False
    """Whether the base model is one for which `can_score_by_chunk` is True."""

    @classmethod
    def find_facts(cls, source: DataSource, model: nn.Module) -> dict[str, Any]:
        return {"by_chunk": can_score_by_chunk(model)}

    @property
    def notes(self) -> tuple[str, ...]:
        if self.by_chunk:
            return ()
        return (
            "The logits of all tokens are computed, which needs more memory, because this model does not compute the "
            "logits of a token from its last hidden state alone.",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class NextTokens(TokenObjective):
    """Predicts the next token.

    - `loss`: nats per scored token, L = Σ nats / Σ tokens.
    - `perplexity`: exp(L), per token.
    - `bits_per_byte`: L / (ln 2 · bytes per token) (The Pile, arXiv 2101.00027, section 3.1). Only this metric can be
      compared between models with different tokenizers.
    """

    metrics: ClassVar[Mapping[str, Direction]] = dict.fromkeys(("bits_per_byte", "loss", "perplexity"), "minimize")

    bytes_per_token: float = math.nan
    """Number of UTF-8 bytes of the scored text divided by its number of tokens, > 0. `for_split` sets it."""

    def for_split(self, split: Rows) -> NextTokens:
        return replace(self, bytes_per_token=split.bytes_per_token)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return score_tokens(model, batch, by_chunk=self.by_chunk).sum(-1)

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        losses = score_tokens(model, batch, by_chunk=self.by_chunk)
        # fp64, because the tokens of a whole evaluation are added up
        loss, items = (values.double().sum(-1) for values in (losses, batch["targets"] != IGNORED))
        return ExampleScores(loss=loss, items=items)

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        loss = scores.loss.double().sum() / scores.items.double().sum()
        return {
            "bits_per_byte": loss / (math.log(2) * self.bytes_per_token),
            "loss": loss,
            "perplexity": loss.exp(),
        }

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns the loss per token of each example (in nats, or in bits per byte), and its number of tokens."""
        if metric not in self.metrics:
            return None
        per_token = scores.loss.double() / scores.items.double().clamp(min=1)
        if metric == "bits_per_byte":
            per_token = per_token / (math.log(2) * self.bytes_per_token)
        return per_token, scores.items

    def from_mean(self, metric: str, mean: Tensor) -> Tensor:
        return mean.exp() if metric == "perplexity" else mean

"""What a run is scored by: the metrics of language modelling. `training` feeds it one evaluation's losses."""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lorasweep.errors import ConfigError

LANGUAGE_MODEL_METRICS = ("bits_per_byte", "loss", "perplexity")


def goal_direction(metric: str) -> Literal["minimize", "maximize"]:
    """Returns whether a smaller or a larger value of a metric is better.

    Raises:
        ConfigError: There is no such metric.
    """
    if metric not in LANGUAGE_MODEL_METRICS:
        near = difflib.get_close_matches(metric, LANGUAGE_MODEL_METRICS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        choices = ", ".join(LANGUAGE_MODEL_METRICS)
        raise ConfigError(f"`data.metric` must be one of {choices}, but got {metric!r}.{hint}")
    return "minimize"


class LanguageModelMetrics(Metric):
    """Bits per byte, loss and perplexity of a text, from sums over its tokens.

    - `loss`: nats per token, L = Σ nats / Σ tokens.
    - `perplexity`: exp(L), per token.
    - `bits_per_byte`: L / (ln 2 · bytes per token) (The Pile, arXiv 2101.00027, section 3.1); unlike the others it
      compares across tokenizers.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self, *, bytes_per_token: float, **settings: Any) -> None:
        """Starts with no tokens.

        Args:
            bytes_per_token: UTF-8 bytes per token of the text that is scored, > 0.
            settings: Those of `torchmetrics.Metric`.
        """
        super().__init__(**settings)
        self.bytes_per_token = bytes_per_token
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, *, nats: Tensor, tokens: Tensor | int) -> None:
        """Adds a batch.

        Args:
            nats: Sum of the negative log-likelihoods of its scored tokens, a scalar.
            tokens: Number of those tokens.
        """
        self.nats += nats.detach().to(torch.float64)
        self.tokens += tokens

    def compute(self) -> dict[str, Tensor]:
        """Returns each metric of everything added so far, float64 scalars. NaN before the first token."""
        loss = self.nats / self.tokens
        return {
            "bits_per_byte": loss / (math.log(2) * self.bytes_per_token),
            "loss": loss,
            "perplexity": loss.exp(),
        }

"""ORPO: learns the chosen answer, and raises its odds over those of the rejected one. It needs no frozen base."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lorasweep.data.rows import Batch
from lorasweep.tasks.preferences.objective import PairObjective, count_answer_tokens, split_pairs
from lorasweep.tasks.preferences.settings import OrpoConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Orpo(PairObjective):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).

    p is the geometric mean of the probabilities of an answer's tokens, and odds = p / (1 - p). The margin m of a pair
    is the log of the chosen answer's odds minus that of the rejected one. The loss is -log p(chosen) - β · log σ(m).

    *Differs* from TRL, whose first term is the mean over the tokens of all prompts and chosen answers of a batch.
    """

    settings_type = OrpoConfig

    settings: OrpoConfig = field(default_factory=OrpoConfig)

    def compare(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        log_p = self.sum_log_probabilities(model, batch)
        mean_log_p = log_p / count_answer_tokens(batch)
        log_odds = mean_log_p - (-mean_log_p.expm1()).log()
        margins = torch.sub(*split_pairs(log_odds))
        beta, _ = split_pairs(batch["beta"])
        return margins, beta * softplus(-margins) - split_pairs(mean_log_p)[0], log_p.view(-1, 2)

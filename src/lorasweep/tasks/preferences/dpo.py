"""DPO: the chosen answer must gain more probability over the frozen base than the rejected one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from lorasweep.data.rows import Batch
from lorasweep.objectives.scored_tokens import have_trained_weights
from lorasweep.tasks.preferences.objective import PairObjective, split_pairs
from lorasweep.tasks.preferences.settings import DpoConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Dpo(PairObjective):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    The reward of an answer y to a prompt x is β · (log π(y|x) - log π₀(y|x)), where π₀ is the frozen base, and the
    margin m of a pair is the reward of the chosen answer minus that of the rejected one: 0 for the base, whose
    accuracy is 0.5. The loss is -(1 - ε) · log σ(m) - ε · log σ(-m) with ε = `label_smoothing`; ln 2 for the base.
    `chosen_shift` and `rejected_shift` are the means of log π(y|x) - log π₀(y|x).
    """

    settings_type = DpoConfig
    needs_reference: ClassVar[bool] = True
    metrics = {**PairObjective.metrics, "chosen_shift": "maximize", "rejected_shift": "maximize"}  # noqa: RUF012
    detail_names = (*PairObjective.detail_names, "chosen_shift", "rejected_shift")

    settings: DpoConfig = field(default_factory=DpoConfig)

    def compute_reference(self, model: nn.Module, batch: Batch) -> Float[Tensor, " rows"]:
        return self.sum_log_probabilities(model, batch)

    def compare(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        beta, _ = split_pairs(batch["beta"])
        if have_trained_weights(model.modules()):
            shifts = self.sum_log_probabilities(model, batch) - batch["reference"]
        else:  # the base: rounding in batches of other shapes must not decide which answer is preferred
            shifts = torch.zeros_like(batch["reference"])
        chosen, rejected = split_pairs(shifts)
        margins = beta * (chosen - rejected)
        details = torch.cat([(batch["reference"] + shifts).view(-1, 2), shifts.view(-1, 2)], dim=1)
        # log σ(m) - log σ(-m) = m
        return margins, softplus(-margins) + self.settings.label_smoothing * margins, details

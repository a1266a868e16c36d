"""The rate law: in the coordinate u = lr · √(s · r · λ), LoRA's best learning rate is about the same at every rank.

s is the factor on B A (α/r, or α/√r), r the rank, and λ the ratio of the learning rates of B and A (LoRA+). With α/r
the coordinate is lr · √α. Under Adam both A and B move by about lr a step, so after t steps the update has grown like
s · r · (lr · t)². docs/benchmarks.md compares other powers on stored results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasweep.config.method import ALPHA_OVER_RANK, LoraConfig
from lorasweep.config.run import ALPHA, LR, RANK, follows_rate_law
from lorasweep.sweep.definition.arms import Arm

SCALING = "method.scaling"
RATIO_B = "optim.lr_ratio_b"
LAW_KEYS = (RANK, ALPHA, ALPHA_OVER_RANK, SCALING, RATIO_B)
"""The swept keys that change the factor between the learning rate and u."""
SAMPLERS_IN_U = ("qmc", "tpe", "gp")
"""The samplers that see u in place of the learning rate, because they cover the space or model the scores.

`random` draws learning rates. The arguments of a sampler by `_target_`, such as `fixed_params`, have learning rates."""


@dataclass(frozen=True, kw_only=True)
class RateLaw:
    """Computes the factor u / lr of a trial's parameters. Without LoRA it is 1, so that u is the learning rate."""

    defaults: Mapping[str, Any]
    """The values of `LAW_KEYS` that an arm does not sweep; empty for a method without a scaling."""

    def factor(self, params: Mapping[str, Any]) -> float:
        """Returns √(s · r · λ). It is 1 at α = 0, where the learning rate has no effect."""
        if not self.defaults:
            return 1.0
        found = {**self.defaults, **{key: params[key] for key in LAW_KEYS if key in params}}
        rank = found[RANK]
        alpha = (
            found[ALPHA_OVER_RANK] * rank
            if found.get(ALPHA_OVER_RANK) is not None and ALPHA not in params
            else found[ALPHA]
        )
        strength = alpha if found[SCALING] == "alpha_over_rank" else alpha * math.sqrt(rank)  # s · r
        return math.sqrt(strength * found[RATIO_B]) or 1.0


def build_rate_law(arm: Arm) -> RateLaw:
    """Returns the rate law of an arm, whose settings may fix α/r; none without LoRA, Adam or a searched rate."""
    if LR not in arm.space or not isinstance(method := (config := arm.corner_configs[0]).method, LoraConfig):
        return RateLaw(defaults={})
    if not follows_rate_law("lora", config.optim.name):
        return RateLaw(defaults={})
    return RateLaw(
        defaults={
            RANK: method.rank,
            ALPHA: method.alpha,
            ALPHA_OVER_RANK: arm.settings.get(ALPHA_OVER_RANK),
            SCALING: method.scaling,
            RATIO_B: getattr(config.optim, "lr_ratio_b", 1.0),
        }
    )

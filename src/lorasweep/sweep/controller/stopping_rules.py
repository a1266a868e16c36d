"""Stopping rules: which of an arm's trials may train beyond a rung.

A rung is a step at which trials are compared. A rule is a pure function of values, losses and trial numbers: neither
the order in which values arrive nor a clock changes its answer. The controller pauses a trial that may not train beyond
its rung. It resumes the trial if the rule later allows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.config.data import Direction, get_sign
from lorasweep.config.sweep import HalvingPruner
from lorasweep.record import Trial
from lorasweep.sweep.definition.arms import Arm

Row = tuple[float, float, int]
"""How a rung ranks a trial: its cost (lower is better), its validation loss and its number.

The loss orders trials of equal cost. The number only breaks exact ties of both.
"""
SCORE_ROUNDING = 1e-6
"""Relative difference up to which a score equals that of the constant answer.

Both are computed in fp32 (eps = 1.2e-7), perhaps on different devices, which may add in different orders."""


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """Decides how many trials continue after each rung. This base class has no rungs: every trial runs to its end."""

    rungs: tuple[int, ...] = ()
    """Optimizer steps at which trials are compared, ascending; each is a step with an evaluation."""

    def count_kept(self, ranked: Sequence[Row], *, all_arrived: bool) -> int:
        """Returns how many of the trials at a rung, best first, may train beyond it.

        `all_arrived` is whether no further trial of the arm can reach the rung.
        """
        return len(ranked)


@dataclass(frozen=True, kw_only=True)
class Halving(StoppingRule):
    """Promotion-type successive halving (Li et al. 2018, arXiv 1810.05934, algorithm 2).

    Of m trials at a rung the best floor(m / reduction_factor) may continue. Once no further trial can reach the rung,
    the best ceil(m / reduction_factor) may continue, but at least `min_survivors`, because the ranking of few trials
    at an early rung is unreliable. *Differs:* the paper's rule has neither the second count nor the minimum, because
    it does not know how many trials will come.
    """

    reduction_factor: int
    min_survivors: int = 1

    def count_kept(self, ranked: Sequence[Row], *, all_arrived: bool) -> int:
        quotient = len(ranked) / self.reduction_factor
        count = max(math.ceil(quotient), self.min_survivors) if all_arrived else math.floor(quotient)
        return min(count, len(ranked))


def build_rule(arm: Arm) -> StoppingRule:
    """Returns the rule that decides which trials of an arm are paused."""
    pruner, config = arm.sweep_config.pruner, arm.corner_configs[0]
    if not config.num_steps or not isinstance(pruner, HalvingPruner):
        return StoppingRule()
    every, max_steps = config.trainer.eval_every_steps, config.trainer.max_steps
    steps = range(every, max_steps, every)
    # A rung that is nearer to the end of the run than to the last evaluation before the end is dropped.
    latest = steps[-1] + every / 2 if steps else 0
    wanted = [fraction * max_steps for fraction in pruner.rungs if fraction * max_steps <= latest]
    rungs = {min(steps, key=lambda step: (abs(step - rung), step)) for rung in wanted}
    return Halving(
        rungs=tuple(sorted(rungs)), reduction_factor=pruner.reduction_factor, min_survivors=pruner.min_survivors
    )


@dataclass(frozen=True, kw_only=True)
class RungOrder:
    """The order of an arm's trials at a rung. It depends neither on the order of slots nor on that of reports."""

    direction: Direction
    constant_answer: float | None = None
    """Validation score of the constant answer (`DataSplits.score_constant_answer`); None if there is none."""

    def get_row(self, trial: Trial, rung: int) -> Row:
        """Returns how a rung ranks a trial. A NaN value and a missing or NaN loss count as infinite."""
        sign = get_sign(self.direction)
        cost, loss = sign * trial.values[rung], trial.losses.get(rung, math.inf)
        cost, loss = (math.inf if math.isnan(number) else number for number in (cost, loss))
        if self.constant_answer is not None and cost < math.inf and self.has_learned_nothing(trial, rung):
            # The metric does not say which of these trials begins to learn, but the loss does.
            cost = sign * self.constant_answer
        return cost, loss, trial.number

    def has_learned_nothing(self, trial: Trial, rung: int) -> bool:
        """Returns whether a trial's value is no better than that of the constant answer."""
        if self.constant_answer is None:
            return False
        gain = get_sign(self.direction) * (self.constant_answer - trial.values[rung])
        return not gain > SCORE_ROUNDING * abs(self.constant_answer)  # true for NaN too

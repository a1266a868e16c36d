"""The one reason for which the search stops a run: at half of its steps it is no better than an untrained answer."""

from __future__ import annotations

from collections.abc import Mapping

from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import MIN_STEPS, RunConfig
from lorasweep.wording import format_metric, format_score

LOSS_METRIC = "loss"
"""Metric that every task reports, also if another metric is its score. A module of the user may not log it."""
SCORE_ROUNDING = 1e-6
"""Relative difference up to which a score equals that of the untrained answer.

Both are computed in fp32 (eps = 1.2e-7), perhaps on different devices, which may add in different orders."""


def find_half_step(config: RunConfig) -> int | None:
    """Returns the step of a run's first evaluation at or after half of its steps.

    Returns None if that is the last step, or if the run has fewer than `MIN_STEPS`.
    """
    every, steps = config.trainer.eval_every_steps, config.num_steps
    half = -(-steps // (2 * every)) * every
    return half if steps >= MIN_STEPS and half < steps else None


def is_better(score: float, untrained: float, sign: int) -> bool:
    """Returns whether a score is better than that of the untrained answer by more than rounding; see `metric.sign`."""
    return sign * (untrained - score) > SCORE_ROUNDING * abs(untrained)


def explain_stop(
    config: RunConfig, step: int, scores: Mapping[str, float], *, untrained: Mapping[str, float], metric: ScoreMetric
) -> str | None:
    """Returns why a run is stopped after an evaluation at `step`; None if it continues.

    A run that is better in the sweep's `metric` or in the loss than an answer that needs no training (`untrained`,
    empty if none is known) continues: the metric alone does not say which of several runs that still give the most
    frequent label has begun to learn. Nothing depends on other runs, so their order does not matter.
    """
    if step != find_half_step(config) or metric.name not in untrained:
        return None
    for name in {metric.name, LOSS_METRIC} & untrained.keys() & scores.keys():
        sign = metric.sign if name == metric.name else 1
        if is_better(scores[name], untrained[name], sign):
            return None
    score, answer = (format_score(values[metric.name]) for values in (scores, untrained))
    return (
        f"has learned nothing at step {step}: {format_metric(metric.name)} {score}, and {answer} without any training"
    )

"""The one reason for which the search stops a run: at half of its steps it is no better than an untrained answer."""

from __future__ import annotations

from collections.abc import Mapping

from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import MIN_STEPS, RunConfig
from lorasweep.wording import format_metric, format_score

LOSS_METRIC = ScoreMetric(name="loss", direction="minimize")
"""Metric that every task reports, also if another metric is its score. A module of the user may not log it."""


def find_half_step(config: RunConfig) -> int | None:
    """Returns the step of a run's first evaluation at or after half of its steps.

    Returns None if that is the last step, or if the run has fewer than `MIN_STEPS`.
    """
    every, steps = config.trainer.eval_every_steps, config.num_steps
    half = -(-steps // (2 * every)) * every
    return half if steps >= MIN_STEPS and half < steps else None


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
    for one in (metric, LOSS_METRIC):
        if one.name in untrained.keys() & scores.keys() and one.is_better(scores[one.name], untrained[one.name]):
            return None
    score, answer = (format_score(values[metric.name]) for values in (scores, untrained))
    return (
        f"has learned nothing at step {step}: {format_metric(metric.name)} {score}, and {answer} without any training"
    )

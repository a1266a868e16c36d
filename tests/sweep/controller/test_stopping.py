"""A run is stopped at half of its steps only if it is no better than an answer that needs no training."""

import math

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.config.data import SCORE_ROUNDING, ScoreMetric
from lorasweep.sweep.controller.stopping import explain_stop, find_half_step

ACCURACY = ScoreMetric(name="accuracy", direction="maximize")
UNTRAINED = {"accuracy": 0.5, "loss": 0.69}


@pytest.fixture(autouse=True)
def stop_short_runs():
    """Keeps the rule's own minimum of steps."""


def make_config(*, steps=120, every=60):
    return compose_run({"trainer.max_steps": steps, "trainer.eval_every_steps": every})


def explain(scores, *, step=60, config=None, untrained=UNTRAINED, metric=ACCURACY):
    return explain_stop(config or make_config(), step, scores, untrained=untrained, metric=metric)


@pytest.mark.parametrize(
    ("steps", "every", "half"),
    [
        (60, 30, 30),
        (120, 20, 60),
        (84, 42, 42),
        (100, 30, 60),
        (60, 60, None),
        (60, 35, 35),
        (120, 50, 100),
        (58, 29, None),
    ],
)
def test_half_is_the_first_evaluation_at_or_after_half_of_the_steps(steps, every, half):
    assert find_half_step(make_config(steps=steps, every=every)) == half


@pytest.mark.parametrize(
    ("scores", "stops"),
    [
        ({"accuracy": 0.5, "loss": 0.7}, True),
        ({"accuracy": 0.4, "loss": 0.69}, True),
        ({"accuracy": 0.51, "loss": 0.9}, False),  # better in the metric
        ({"accuracy": 0.5, "loss": 0.68}, False),  # has begun to learn: better in the loss
        ({"accuracy": 0.5, "loss": 0.69 * (1 - SCORE_ROUNDING / 2)}, True),  # equal up to rounding
        ({"accuracy": math.nan, "loss": math.nan}, True),
        ({"accuracy": 0.5}, True),  # a module that logs no loss
    ],
)
def test_a_run_stops_if_neither_metric_nor_loss_is_better(scores, stops):
    reason = explain(scores)
    assert (reason is not None) == stops
    if reason:
        assert all(part in reason for part in ("step 60", "accuracy", "0.500"))


@pytest.mark.parametrize("step", [20, 40, 80, 100, 120])
def test_a_run_is_stopped_at_half_alone(step):
    assert explain({"accuracy": 0.1, "loss": 9.0}, step=step, config=make_config(every=20)) is None


def test_nothing_is_stopped_without_an_untrained_score_of_the_metric():
    scores = {"accuracy": 0.1, "loss": 9.0}
    assert explain(scores, untrained={}) is None
    assert explain(scores, untrained={"loss": 0.1}) is None

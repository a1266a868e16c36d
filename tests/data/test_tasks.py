"""Scores of a text from sums over its tokens."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lorasweep.data.tasks import LANGUAGE_MODEL_METRICS, LanguageModelMetrics, goal_direction
from lorasweep.errors import ConfigError


def test_metrics_are_those_of_all_tokens_together():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    metrics = LanguageModelMetrics(bytes_per_token=4.5)
    for rows in (slice(0, 5), slice(5, 7)):  # batches of different size must not be averaged
        nats = cross_entropy(logits[rows], targets[rows], reduction="sum")
        metrics.update(nats=nats, tokens=len(targets[rows]))
    values = {name: value.item() for name, value in metrics.compute().items()}
    loss = cross_entropy(logits.double(), targets).item()
    # fp32 losses of 11 classes: 1e-6
    assert values == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / 4.5}, rel=1e-6
    )
    assert tuple(values) == LANGUAGE_MODEL_METRICS


def test_uniform_guess_over_bytes_costs_eight_bits():
    metrics = LanguageModelMetrics(bytes_per_token=1.0)
    metrics.update(nats=torch.tensor(1000 * math.log(256)), tokens=torch.tensor(1000))
    assert metrics.compute()["bits_per_byte"].item() == pytest.approx(8, rel=1e-6)  # the sum came in fp32


def test_sum_of_many_batches_keeps_its_digits():
    metrics = LanguageModelMetrics(bytes_per_token=1.0)
    for _ in range(3):
        metrics.update(nats=torch.tensor(2.0**24), tokens=1)
        metrics.update(nats=torch.tensor(1.0), tokens=1)  # fp32 sums would drop it
    assert metrics.nats.item() == 3 * (2**24 + 1)


def test_reset_starts_anew():
    metrics = LanguageModelMetrics(bytes_per_token=1.0)
    metrics.update(nats=torch.tensor(5.0), tokens=2)
    metrics.compute()
    metrics.reset()
    metrics.update(nats=torch.tensor(3.0), tokens=2)
    assert metrics.compute()["loss"].item() == 1.5


def test_nan_is_not_hidden():
    metrics = LanguageModelMetrics(bytes_per_token=1.0)
    metrics.update(nats=torch.tensor(float("nan")), tokens=2)
    assert all(value.isnan() for value in metrics.compute().values())


@pytest.mark.parametrize("metric", LANGUAGE_MODEL_METRICS)
def test_lower_is_better(metric):
    assert goal_direction(metric) == "minimize"


def test_unknown_metric_gets_the_nearest_name():
    with pytest.raises(
        ConfigError, match=r"`data.metric` must be one of .*, but got 'perplexty'. Did you mean 'perplexity'"
    ):
        goal_direction("perplexty")

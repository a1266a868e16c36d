"""The Gaussian process of an arm: it goes through exact data, and diverged trials do not mislead it."""

import math

import numpy as np
import pytest

import lorasweep.sweep.controller.predictions as surrogate_file
from lorasweep.sweep.controller.predictions import fit_surrogate

POINTS = np.linspace(-2, 2, 9)[:, None]
COSTS = 1 + 0.1 * POINTS[:, 0] ** 2


def fit(costs=COSTS, *, points=POINTS):
    return fit_surrogate(points, costs)


def test_it_goes_through_data_without_noise(monkeypatch):
    monkeypatch.setattr(surrogate_file, "NOISE_VARIANCES", (1e-8,))
    mean, deviation = fit().predict(POINTS)
    inside = np.minimum(COSTS, np.median(COSTS) + 1.4826 * np.median(np.abs(COSTS - np.median(COSTS))))
    # the noise, times the condition of nine points that lie half a length scale apart
    assert mean == pytest.approx(inside, abs=1e-5)
    assert (deviation < 1e-3 * np.ptp(COSTS)).all()


def test_the_size_of_a_diverged_value_changes_nothing():
    means = [fit([*COSTS[:-1], worst]).predict(POINTS)[0] for worst in (3.0, 1e6, 1e300)]
    assert (means[0] == means[1]).all()
    assert (means[0] == means[2]).all()


def test_draws_have_the_mean_and_the_deviation_of_the_prediction():
    model, places = fit(), np.array([[0.3], [3.0]])
    mean, deviation = model.predict(places)
    draws = model.draw(places, num_draws=4000)
    assert np.abs(draws.mean(axis=0) - mean).max() < 4 * deviation.max() / math.sqrt(4000)
    # the jitter of 1e-6 on the diagonal is 1e-3 of the scale
    assert draws.std(axis=0) == pytest.approx(deviation, rel=0.05, abs=2e-3 * model.scale)


@pytest.mark.parametrize("costs", [[1.0] * 5, [1.0], [1.0, 1.0, 1.0, 0.5, 1.0], [-3.0, 7.0]])
def test_equal_and_few_costs_are_no_error(costs):
    mean, deviation = fit(costs, points=np.arange(float(len(costs)))[:, None]).predict(POINTS)
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()
    assert mean.min() >= min(costs) - 1
    assert mean.max() <= max(costs) + 1

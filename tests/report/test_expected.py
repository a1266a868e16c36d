"""The expected best score of n trials."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from lorasweep.report.figures.expected import estimate_expected_best


@pytest.mark.parametrize(("sign", "best"), [(1, min), (-1, max)])
def test_expected_best_is_the_mean_over_all_draws(sign: int, best) -> None:  # type: ignore[no-untyped-def]
    scores = [0.3, 0.1, 0.7, 0.2]
    expected, low, high = estimate_expected_best(scores, sign=sign)
    by_hand = [np.mean([best(draw) for draw in product(scores, repeat=n)]) for n in (1, 2, 3, 4)]
    assert expected == pytest.approx(by_hand)
    assert (low <= expected).all()
    assert (expected <= high).all()

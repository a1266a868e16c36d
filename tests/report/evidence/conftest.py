"""Planted confirm stages: arms whose true scores, spread over seeds and spread over examples are known."""

import numpy as np

from lorasweep.report.evidence.scores import ExampleScores, build_scores


def plant(
    means,
    *,
    seeds=5,
    examples=0,
    seed_spread=0.01,
    example_spread=0.1,
    own_spread=0.02,
    deterministic=frozenset(),
    rng=None,
):
    """Returns scores of arms with true `means`: seed noise, hardness of examples common to all, and noise of each run.

    Without examples the score has seed noise alone.
    """
    rng = rng or np.random.default_rng(0)
    hardness = rng.normal(0, example_spread, examples)
    values, found = {}, {}
    for arm, mean in means.items():
        for seed in range(1 if arm in deterministic else seeds):
            value = mean + (0 if arm in deterministic else rng.normal(0, seed_spread))
            if examples:
                scores = value + hardness + rng.normal(0, own_spread, examples)
                value = float(scores.mean())
                rows = tuple(map(str, range(examples)))
                found[arm, seed] = ExampleScores(rows=rows, scores=scores, weights=np.ones(examples), groups=rows)
            values[arm, seed] = value
    return build_scores(values, found, deterministic=deterministic)

"""The seeds of the confirm stage."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import astuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from lorasweep.config.run import SEED_KEYS
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import Arm, Definition

SEED_LIMIT = 1_000_000
"""Seeds are below this number, so that a person can read and type them."""
MAX_DRAWS_PER_SEED = 10
"""Maximum number of draws per seed. If too few of the drawn seeds are unused, the search may use nearly all seeds."""


def draw_confirm_seeds(definition: Definition) -> list[int]:
    """Returns the seeds of the confirm stage: the same for every arm, and unused by the search.

    The seeds depend on `sweep.seed`. A larger number of seeds begins with the same seeds, so that a stage can grow.

    Raises:
        ConfigError: The search may use so many seeds that too few are left.
    """
    count = max(definition.sweep_config.confirm.list_looks(), default=0)
    configs = [arm.corner_configs[0] for arm in definition.arms] if count else []
    fixed = {seed for config in configs for seed in (config.seed, *astuple(config.seeds))}
    ranges = [arm.space[name] for arm in definition.arms for name in SEED_KEYS if name in arm.space]
    # crc32 is the same in every process, unlike Python's hash of a text
    texts = (f"{definition.sweep_config.sweep.seed}/confirm/{n}" for n in range(MAX_DRAWS_PER_SEED * count))
    draws = dict.fromkeys(zlib.crc32(text.encode()) % SEED_LIMIT for text in texts)
    unused = (n for n in draws if n not in fixed and not any(_contains(range_, n) for range_ in ranges))
    seeds = list(itertools.islice(unused, count))
    if len(seeds) < count:
        raise ConfigError(
            f"`confirm.seeds` needs {count} seeds below {SEED_LIMIT:,} that the search does not use, but only "
            f"{len(seeds)} are free. Narrow the range of `seed`."
        )
    return seeds


def has_fixed_score(arm: Arm) -> bool:
    """Returns whether the seed surely makes no difference to an arm: the frozen base, unless it may have a new head."""
    config = arm.corner_configs[0]
    return config.method.name == "frozen" and config.model.kind != "classifier"


def count_confirm_runs(definition: Definition, *, look: int = 0) -> dict[str, int]:
    """Returns the number of confirm runs of each arm, if the questions are settled at the look with this index."""
    looks = definition.sweep_config.confirm.list_looks()
    seeds = looks[look] if looks else 0
    return {arm.name: min(seeds, 1) if has_fixed_score(arm) else seeds * len(arm.subjects) for arm in definition.arms}


def _contains(range_: BaseDistribution, seed: int) -> bool:
    if isinstance(range_, CategoricalDistribution):
        return seed in range_.choices
    return isinstance(range_, IntDistribution) and range_.low <= seed <= range_.high

"""The seeds on which the confirm stage trains the best settings of each arm again."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import astuple, fields

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from lorasweep.config.run import SeedsConfig
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import Arm, Definition

SEED_KEYS = ("seed", *(f"seeds.{f.name}" for f in fields(SeedsConfig)))
"""The settings that together decide the initial values, the data order and the dropout of a run."""
SEED_LIMIT = 1_000_000
"""Seeds are below this number, so that a person can read and type them."""
MAX_DRAWS_PER_SEED = 10
"""If more draws are needed per seed, the search leaves too few seeds unused."""


def draw_seeds(definition: Definition) -> list[int]:
    """Returns the seeds of the confirm stage: the same for every arm, and unused by the search.

    The seeds depend on `sweep.seed`. More seeds begin with the same seeds, so that the stage can grow.

    Raises:
        ConfigError: The search may use so many seeds that too few are left.
    """
    count, sweep_seed = definition.sweep_config.confirm.seeds, definition.sweep_config.sweep.seed
    configs = [arm.corners[0] for arm in definition.arms] if count else []
    fixed = {seed for config in configs for seed in (config.seed, *astuple(config.seeds))}
    ranges = [arm.space[key] for arm in definition.arms for key in SEED_KEYS if key in arm.space]
    # crc32 is the same in every process, unlike Python's hash of a text
    draws = (zlib.crc32(f"{sweep_seed}/confirm/{n}".encode()) % SEED_LIMIT for n in range(MAX_DRAWS_PER_SEED * count))
    unused = (n for n in dict.fromkeys(draws) if n not in fixed and not any(_contains(range_, n) for range_ in ranges))
    seeds = list(itertools.islice(unused, count))
    if len(seeds) < count:
        raise ConfigError(
            f"`confirm.seeds` must find {count} seeds below {SEED_LIMIT:,} that the search does not use, but finds "
            f"{len(seeds)}. Narrow the range of `seed`."
        )
    return seeds


def arm_seeds(arm: Arm, seeds: list[int]) -> list[int]:
    """Returns the seeds of one arm: all, or one under `method=frozen`, whose score does not depend on a seed."""
    return seeds[:1] if arm.corners[0].method.name == "frozen" else seeds


def describe_confirm(num_seeds: int) -> str:
    """Returns a phrase that says what the confirm stage does."""
    fresh = "1 fresh seed" if num_seeds == 1 else f"{num_seeds} fresh seeds"
    return f"the best settings of each arm again on {fresh}, scored once on test data"


def _contains(range_: BaseDistribution, seed: int) -> bool:
    if isinstance(range_, CategoricalDistribution):
        return seed in range_.choices
    return isinstance(range_, IntDistribution) and range_.low <= seed <= range_.high

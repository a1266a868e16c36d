"""The seeds of further searches, of the select and of the confirm stage, and phrases that say what the stages do."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Collection
from dataclasses import astuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from lorasweep.config.run import SEED_KEYS
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import Arm, Definition

SEED_LIMIT = 1_000_000
"""Seeds are below this number, so that a person can read and type them."""
MAX_DRAWS_PER_SEED = 10
"""Maximum number of draws per seed. If too few of the drawn seeds are unused, the search may use nearly all seeds."""


def draw_search_seeds(definition: Definition) -> list[int]:
    """Returns the seeds of the second and every further search; errors as in `draw_confirm_seeds`."""
    return _draw_seeds(definition, "search", key="sweep.searches", count=definition.sweep_config.sweep.searches - 1)


def draw_select_seeds(definition: Definition) -> list[int]:
    """Returns the seeds of the select stage; errors as in `draw_confirm_seeds`."""
    confirm = definition.sweep_config.confirm
    is_skipped = not confirm.seeds or confirm.candidates == 1
    count = 0 if is_skipped else confirm.select_seeds
    used = draw_search_seeds(definition)
    return _draw_seeds(definition, "select", key="confirm.select_seeds", count=count, used=used)


def draw_confirm_seeds(definition: Definition) -> list[int]:
    """Returns the seeds of the confirm stage: the same for every arm, and unused by the earlier stages.

    The seeds depend on `sweep.seed`. A larger number of seeds begins with the same seeds, so that a stage can grow.

    Raises:
        ConfigError: The search may use so many seeds that too few are left.
    """
    count = definition.sweep_config.confirm.seeds
    used = [*draw_search_seeds(definition), *draw_select_seeds(definition)]
    return _draw_seeds(definition, "confirm", key="confirm.seeds", count=count, used=used)


def _draw_seeds(definition: Definition, stage: str, *, key: str, count: int, used: Collection[int] = ()) -> list[int]:
    configs = [arm.corners[0] for arm in definition.arms] if count else []
    fixed = {*used, *(seed for config in configs for seed in (config.seed, *astuple(config.seeds)))}
    ranges = [arm.space[name] for arm in definition.arms for name in SEED_KEYS if name in arm.space]
    # crc32 is the same in every process, unlike Python's hash of a text
    texts = (f"{definition.sweep_config.sweep.seed}/{stage}/{n}" for n in range(MAX_DRAWS_PER_SEED * count))
    draws = dict.fromkeys(zlib.crc32(text.encode()) % SEED_LIMIT for text in texts)
    unused = (n for n in draws if n not in fixed and not any(_contains(range_, n) for range_ in ranges))
    seeds = list(itertools.islice(unused, count))
    if len(seeds) < count:
        raise ConfigError(
            f"`{key}` needs {count} seeds below {SEED_LIMIT:,} that the search does not use, but only {len(seeds)} are "
            "free. Narrow the range of `seed`."
        )
    return seeds


def arm_seeds(arm: Arm, seeds: list[int]) -> list[int]:
    """Returns the seeds of one arm: all, or one under `method=frozen`, whose score does not depend on a seed."""
    return seeds[:1] if arm.corners[0].method.name == "frozen" else seeds


def count_reruns(arm: Arm, definition: Definition, *, num_complete: int | None = None) -> tuple[int, int]:
    """Returns the number of an arm's runs in the select stage and in the confirm stage.

    `num_complete` is the number of complete trials of all searches. None: all trials.
    """
    candidates = min(
        arm.all_trials if num_complete is None else num_complete, definition.sweep_config.confirm.candidates
    )
    select_runs = candidates * len(draw_select_seeds(definition)) if candidates > 1 else 0
    return select_runs, len(arm_seeds(arm, draw_confirm_seeds(definition)))


def _contains(range_: BaseDistribution, seed: int) -> bool:
    if isinstance(range_, CategoricalDistribution):
        return seed in range_.choices
    return isinstance(range_, IntDistribution) and range_.low <= seed <= range_.high

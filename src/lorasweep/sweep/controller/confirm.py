"""The confirm stage's seeds and winners: which configuration of each arm runs again, and on what seeds."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import fields

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from lorasweep.config.run import RunConfig, SeedsConfig
from lorasweep.errors import ConfigError
from lorasweep.sweep.controller.rows import TURN_ATTRIBUTE
from lorasweep.sweep.definition.arms import Arm, Definition

SEEDS_BELOW = 1_000_000
"""Short enough to be read and typed."""
SEED_KEYS = ("seed", *(f"seeds.{f.name}" for f in fields(SeedsConfig)))


def draw_seeds(definition: Definition) -> list[int]:
    """Returns the seeds of the confirm stage: drawn from `sweep.seed`, the same for every arm, in no arm's search.

    More seeds begin with the fewer ones, so that a stage can grow.

    Raises:
        ConfigError: The search leaves no seed fresh.
    """
    drawn: list[int] = []
    most, sweep_seed = definition.driver.confirm.seeds, definition.driver.sweep.seed
    fixed = {seed for arm in definition.arms for seed in _fixed_seeds(arm)} if most else set()
    ranges = [arm.space[key] for arm in definition.arms for key in SEED_KEYS if key in arm.space]
    for attempt in range(10 * most):
        seed = zlib.crc32(f"{sweep_seed}/confirm/{attempt}".encode()) % SEEDS_BELOW
        if seed not in fixed and seed not in drawn and not any(_may_be(seed, searched) for searched in ranges):
            drawn.append(seed)
        if len(drawn) == most:
            return drawn
    if most:
        raise ConfigError(
            f"the search must leave {most} seeds below {SEEDS_BELOW:,} fresh for `confirm.seeds`, but does not. "
            "Narrow the range of `seed`."
        )
    return drawn


def arm_seeds(arm: Arm, seeds: list[int]) -> list[int]:
    """Returns the seeds of one arm: one where nothing is drawn, as under `frozen`, whose score no seed changes."""
    return seeds[:1] if is_deterministic(next(arm.corners())) else seeds


def is_deterministic(config: RunConfig) -> bool:
    """Whether a run is the same under every seed."""
    return config.method.name == "frozen"


def seed_settings(seed: int) -> dict[str, int]:
    """Returns the settings that set every source of chance: initial values, data order and dropout."""
    return dict.fromkeys(SEED_KEYS, seed)


def find_winner(study: optuna.Study) -> int | None:
    """Returns the number of the best complete trial of a search, the earliest of equals; None where none is complete.

    Only the controller's own trials count.
    """
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    complete = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if TURN_ATTRIBUTE in trial.user_attrs
    ]
    best = min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)
    return None if best is None else best.number


def _may_be(seed: int, distribution: BaseDistribution) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return seed in distribution.choices
    return isinstance(distribution, IntDistribution) and distribution.low <= seed <= distribution.high


def _fixed_seeds(arm: Arm) -> Iterator[int]:
    config = next(arm.corners())
    yield config.seed
    yield from (getattr(config.seeds, f.name) for f in fields(SeedsConfig))

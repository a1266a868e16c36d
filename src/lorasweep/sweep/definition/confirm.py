"""Fixes the confirm stage before the first trial: the questions that it answers, and the seeds of its runs."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import astuple

from lorasweep.errors import ConfigError
from lorasweep.record import Question, QuestionName
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.wording import nearest

SEED_LIMIT = 1_000_000
"""Seeds are below this number, so that a person can read and type them."""
SIZE_KEYS = ("method.rank", "method.dim")
"""The `confirm_each` keys whose smaller values cost less. For them, a sweep asks for the smallest sufficient value."""


def list_questions(definition: Definition) -> list[Question]:
    """Returns the questions of a sweep.

    - Each subject of each arm that trains is compared with `full`.
    - For an arm with `confirm_each` of `SIZE_KEYS`, the smallest sufficient value is asked for.
    - Each pair of `confirm.pairs` is compared. Without `full`, each arm that trains is by default in a pair with the
      first one.

    Raises:
        ConfigError: `confirm.pairs` names an arm that the sweep does not have.
    """
    trained = [arm for arm in definition.arms if arm.corner_configs[0].method.name != "frozen"]
    full = next((arm for arm in trained if arm.corner_configs[0].method.name == "full"), None)
    pairs = definition.sweep_config.confirm.pairs
    if full is None and not pairs:
        pairs = tuple((arm.name, trained[0].name) for arm in trained[1:])
    asked: list[tuple[QuestionName, Arm, list[str], str | None]] = []
    for arm in trained if full else ():
        if arm.corner_configs[0].method.name != "full":
            asked.append(("as_good_as_full", arm, list(arm.subjects), full.name if full else None))
    asked += [("smallest", arm, list(arm.subjects), None) for arm in trained if arm.confirm_each in SIZE_KEYS]
    known = {name: arm for arm in definition.arms for name in (arm.name, *arm.subjects)}
    for pair in pairs:
        if unknown := [name for name in pair if name not in known]:
            raise ConfigError(
                f"`confirm.pairs` must name arms of the sweep ({', '.join(known)}), but got {unknown[0]!r}."
                f"{nearest(unknown[0], known)}"
            )
        # a name of one value, such as `lora-rank-8`, is about that value alone; an arm's reference is its largest value
        subjects, references = ([name] if name in known[name].subjects else list(known[name].subjects) for name in pair)
        asked.append(("pair", known[pair[0]], subjects, references[-1]))
    return [
        Question(name=name, arm=arm.name, key=arm.confirm_each, subjects=subjects, reference=reference)
        for name, arm, subjects, reference in asked
    ]


def draw_confirm_seeds(definition: Definition) -> list[int]:
    """Returns the seeds of the confirm stage: the same for every arm, and different from the seeds of the search.

    The seeds depend on `sweep.seed`. A larger number of seeds begins with the same seeds, so that a stage can grow.
    """
    count = max(definition.sweep_config.confirm.list_looks(), default=0)
    configs = [config for arm in definition.arms for config in arm.corner_configs] if count else []
    used = {seed for config in configs for seed in (config.seed, *astuple(config.seeds))}
    seeds: dict[int, None] = {}
    numbers = itertools.count()
    while len(seeds) < count:
        # crc32 is the same in every process, unlike Python's hash of a text
        seed = zlib.crc32(f"{definition.sweep_config.sweep.seed}/confirm/{next(numbers)}".encode()) % SEED_LIMIT
        if seed not in used:
            seeds[seed] = None
    return list(seeds)


def has_fixed_score(arm: Arm) -> bool:
    """Returns whether an arm has the same score with every seed: the frozen base, unless it may have a new head."""
    config = arm.corner_configs[0]
    return config.method.name == "frozen" and config.model.kind != "classifier"


def count_confirm_runs(definition: Definition, *, look: int = 0) -> dict[str, int]:
    """Returns the number of confirm runs of each arm, if the questions are settled at the look with this index."""
    looks = definition.sweep_config.confirm.list_looks()
    seeds = looks[look] if looks else 0
    return {arm.name: min(seeds, 1) if has_fixed_score(arm) else seeds * len(arm.subjects) for arm in definition.arms}

"""Fixes the confirm stage before the first trial: its questions and seeds; and warns of what would weaken its answers.

After the sweep, `report.caveats` judges the trials that ran.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import astuple

from lorasweep.config.run import LR, RunConfig
from lorasweep.config.sweep import ENOUGH_SEEDS, parse_margin
from lorasweep.record import Question, QuestionName, list_confirm_runs
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.wording import join_words

SEED_LIMIT = 1_000_000
"""Seeds are below this number, so that a person can read and type them."""
SIZE_KEYS = ("method.rank", "method.dim")
"""The `confirm_each` keys whose smaller values cost less. For them, a sweep asks for the smallest sufficient value."""

WARNED_TOKENS_RATIO = 1.25
"""Ratio of two arms' training tokens from which a sweep warns that more training may decide the comparison."""
MAX_LAW_FACTOR = 16.0
"""Largest factor on B A, such as α/r, at which the rate law holds (docs/decisions.md, "Where u ends")."""


def list_questions(definition: Definition) -> list[Question]:
    """Returns the questions of a sweep.

    - Each subject of each arm that trains is compared with `full`.
    - For an arm with several values of `confirm_each` of `SIZE_KEYS`, the smallest sufficient value is asked for.
    - Without `full`, each arm that trains is compared with the first one: with its largest value, if it has several.
    """
    trained = [arm for arm in definition.arms if not arm.base.method.trains_nothing]
    full = next((arm for arm in trained if arm.base.method.trains_all), None)
    subjects = {arm.name: [subject.name for subject in arm.subjects] for arm in definition.arms}
    asked: list[tuple[QuestionName, Arm, list[str], str | None]] = []
    for arm in trained if full else ():
        if not arm.base.method.trains_all:
            asked.append(("as_good_as_full", arm, subjects[arm.name], full.name if full else None))
    sized = [arm for arm in trained if arm.confirm_each in SIZE_KEYS and len(arm.subjects) > 1]
    asked += [("smallest", arm, subjects[arm.name], None) for arm in sized]
    if full is None:
        asked += [("pair", arm, subjects[arm.name], subjects[trained[0].name][-1]) for arm in trained[1:]]
    return [
        Question(name=name, arm=arm.name, key=arm.confirm_each, subjects=names, reference=reference)
        for name, arm, names, reference in asked
    ]


def draw_confirm_seeds(definition: Definition) -> list[int]:
    """Returns the seeds of the confirm stage: the same for every arm, and different from the seeds of the search.

    The seeds depend on `sweep.seed`. A larger number of seeds begins with the same seeds, so that a stage can grow.
    """
    count = max(definition.sweep_config.confirm.list_looks(), default=0)
    configs = definition.corner_configs if count else []
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
    config = arm.base
    return config.method.trains_nothing and config.model.kind != "classifier"


def count_confirm_runs(arm: Arm, *, seeds: int) -> int:
    """Returns the number of confirm runs of an arm, if the questions are settled with this number of seeds."""
    subjects = [subject.name for subject in arm.subjects]
    return len(list_confirm_runs(subjects, seeds=seeds, is_fixed=has_fixed_score(arm)))


def find_warnings(definition: Definition) -> list[str]:
    warnings = []
    counts = {arm.name: max(map(count_tokens, arm.corner_configs)) for arm in definition.arms}
    tokens = {name: count for name, count in counts.items() if count}  # the frozen base has no budget to compare
    if tokens and max(tokens.values()) >= WARNED_TOKENS_RATIO * min(tokens.values()):
        listed = ", ".join(f"{name} {number:,}" for name, number in tokens.items())
        warnings.append(
            f"Arms train on unequal numbers of tokens per trial ({listed}): a better score may come from more training."
        )
    confirm = definition.sweep_config.confirm
    if 0 < (num_seeds := max(confirm.list_looks(), default=0)) < ENOUGH_SEEDS:
        warnings.append(
            f"`confirm.seeds` is {num_seeds}. One seed gives no interval, and two give a very wide one. Take "
            f"`confirm.seeds={ENOUGH_SEEDS}` or more."
        )
    answers = definition.arms[0].base.data.generated
    if not num_seeds and answers and not answers.on_validation:
        warnings.append(
            "`data.answers` has no effect, because answers are generated in the confirm stage. Set `confirm.seeds`, or "
            "`data.answers.on_validation=true`."
        )
    has_base = any(config.method.kind == "frozen" for config in definition.corner_configs)
    if confirm.seeds and list_questions(definition) and not has_base and parse_margin(confirm.margin).is_share_of_gain:
        warnings.append(
            f"`confirm.margin` is {confirm.margin}, a share of a gain over the frozen base, but the sweep has no arm "
            "with `method=frozen`. So no arms can be shown to be equivalent, and no rank to be enough. Add "
            "`arms.frozen={settings: {method: frozen}}`, or set it to a number in the metric's unit."
        )
    beyond = [arm.name for arm in definition.arms if LR in arm.space and any(map(exceeds_law, arm.corner_configs))]
    if beyond:
        warnings.append(
            f"{join_words(beyond)} reaches a factor on B A (such as α/r) above {MAX_LAW_FACTOR:g}, where the best u "
            "can be lower than elsewhere, so one search may not serve all of its settings. Lower `method.alpha`, or "
            "give it an arm."
        )
    return warnings


def exceeds_law(config: RunConfig) -> bool:
    """Returns whether a run follows the rate law, but has a larger factor on B A than the law was found to hold for."""
    return config.follows_rate_law and config.method.scale > MAX_LAW_FACTOR


def count_tokens(config: RunConfig) -> int:
    """Returns the maximum number of training tokens of a run; 0 under `method=frozen`."""
    return config.num_steps * config.trainer.batch_size * (config.data.max_tokens or 1)

"""Computes what a sweep costs by measured rates, and which smaller sweep fits a time (`--minutes`)."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from lorasweep.config.run import MIN_STEPS, STEPS_KEY, RunConfig
from lorasweep.config.sweep import ENOUGH_SEEDS, ENOUGH_TRIALS, LocalWorker, SlurmWorkers
from lorasweep.errors import ConfigError
from lorasweep.record import QuestionName
from lorasweep.sweep.controller.proposals import find_batch_start
from lorasweep.sweep.definition.arms import Arm, Definition, searches_one_key
from lorasweep.sweep.definition.confirm import count_confirm_runs, list_questions
from lorasweep.training.environment import get_device
from lorasweep.training.torch_variables import count_cores
from lorasweep.wording import format_seconds, format_share, join_words

INTERVAL_KEY = "trainer.eval_every_steps"
OPEN = "small differences stay open"
MIN_TRIALS = 6
"""Minimum number of trials that `--minutes` leaves to the arm with most. Fewer can't search two decades of rates."""
MIN_EXAMPLES = 200
"""Minimum number of examples or blocks on which `--minutes` lets a run be scored. If two settings differ on a quarter
of them, 10 points of accuracy are found with a probability of 80 %: 196 = (1.96 + 0.84)² · 0.25 / 0.1²."""
MIN_SCORING_SHARE = 0.25
"""Test examples are cut only if scoring them takes at least this share of the time of a confirm run."""
ANSWERED: Mapping[QuestionName, str] = {
    "as_good_as_full": "whether `{one.arm}` is as good as full fine-tuning",
    "smallest": "which `{one.key}` is enough",
    "pair": "whether `{one.arm}` is better than `{one.reference}`",
}
"""For each kind of question, the clause that says what its answer would tell."""
QUESTION_CUTS = ("rank", "full")
"""The cuts that give up a question."""
MAX_BUSY_SHARE = 0.2
"""The share of the cores above which a measurement says that other work slowed it down."""
MINUTES_TOLERANCE = 0.15
"""The smallest budget may exceed `--minutes` by this fraction, because two measurements differ by as much."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured time and memory of the trainings of a group of arms. With several slots, times are of a whole pack."""

    arms: tuple[str, ...]
    slots: int
    """Maximum number of trials that train together."""
    reason: str
    """Why packs have this number of slots; empty if `worker.pack_size` says it."""
    reference_s: float = 0.0
    """Seconds in which the base scores every split once, before the sweep's first step; 0 if nothing needs it."""
    loading_s: float
    step_s: float
    step_tokens: float
    """Mean number of tokens of a run's step, without padding."""
    evaluation_s: float
    """Seconds of an evaluation of a run."""
    saving_s: float = 0.0
    """Seconds of writing weights and checkpoints after an evaluation."""
    final_s: float
    """Seconds of the evaluation on all validation examples at the end of a run; 0 if every evaluation is on all."""
    test_s: float
    """Seconds in which a confirm run is scored on test data; 0 without a confirm stage."""
    answers_s: Mapping[str, float]
    """Seconds in which a run answers examples of a split, by name of the split, if it has to."""
    num_scored: Mapping[str, int]
    """Number of examples by name of the split."""
    num_train: int = 0
    """Number of training examples."""
    peak_memory_bytes: int
    metric: str
    """The metric that scores the measured run."""
    trained_params: dict[str, int]
    """Trained parameters of the largest run of each arm, by name of the arm."""
    busy_share: float = 0.0
    """The share of the machine's cores that other work kept busy just before it was measured."""

    def estimate_run_s(self, num_steps: int, interval: int) -> float:
        """Returns the seconds of a training with an evaluation every `interval` steps."""
        scored_s = (math.ceil(num_steps / interval) or 1) * (self.evaluation_s + self.saving_s) + self.final_s
        return self.loading_s + num_steps * self.step_s + scored_s + self.answers_s.get("validation", 0.0)

    @property
    def scoring_s(self) -> float:
        """Seconds in which a confirm run is scored on test data, and answers its examples."""
        return self.test_s + self.answers_s.get("test", 0.0)

    def limit(self, definition: Definition) -> Rates:
        """Returns the rates in a smaller sweep, which may lack arms and may score fewer examples."""
        if not (arms := tuple(arm.name for arm in definition.arms if arm.name in self.arms)):
            return replace(self, arms=())
        data = definition.find_arm(arms[0]).base.data
        limits = {key.split("_")[1]: getattr(data, key) for key in data.limit_keys}  # `max_test_examples`
        num_scored = {name: min(limits.get(name) or size, size) for name, size in self.num_scored.items()}
        shares = {name: num_scored[name] / size for name, size in self.num_scored.items() if size}
        answers_s = self.answers_s
        if answers_s and (answers := data.generated):
            most = answers.max_examples or math.inf
            shorter = {name: min(num_scored[name], most) / min(self.num_scored[name], most) for name in answers_s}
            answers_s = {name: shorter[name] * seconds for name, seconds in answers_s.items()}
        return replace(
            self,
            arms=arms,
            evaluation_s=shares.get("validation", 1.0) * self.evaluation_s,
            final_s=shares.get("validation", 1.0) * self.final_s,
            test_s=shares.get("test", 1.0) * self.test_s,
            answers_s=answers_s,
            num_scored=num_scored,
        )


class Cost(NamedTuple):
    """Seconds of the stages of a sweep. The lower end counts empty slots of packs as free, the upper at their cost."""

    search_low_s: float
    search_high_s: float
    confirm_s: float
    """Seconds of the confirm stage up to one of its looks."""

    @property
    def low_s(self) -> float:
        return self.search_low_s + self.confirm_s

    @property
    def high_s(self) -> float:
        return self.search_high_s + self.confirm_s


def estimate_cost(definition: Definition, rates: Sequence[Rates], *, look: int = 0) -> Cost:
    """Returns the cost of the arms that were measured, perhaps in a larger sweep, shared by all workers.

    The confirm stage goes up to the look with the index `look`. No run is assumed to stop early.
    """
    looks, workers = definition.sweep_config.confirm.list_looks(), count_workers(definition)
    seeds = looks[look] if looks else 0
    low = high = confirm = 0.0
    longest = longest_confirm = 0.0  # what one worker trains in any case, because batches wait for each other
    for group in (one.limit(definition) for one in rates):
        arms = [definition.find_arm(name) for name in group.arms]
        if not arms:
            continue
        config, slots = arms[0].base, group.slots
        run_s, empty = group.estimate_run_s(config.num_steps, config.trainer.eval_every_steps), _find_empty_cost(config)
        for arm in arms:
            batches = Counter(find_batch_start(arm, number) for number in range(arm.trials)).values()
            low += arm.trials / slots * run_s
            high += sum(_count_packs(size, slots, empty=empty) for size in batches) * run_s
            shares = [math.ceil(size / workers) for size in batches]
            longest = max(longest, sum(_count_packs(share, slots, empty=empty) for share in shares) * run_s)
        num_runs = sum(count_confirm_runs(arm, seeds=seeds) for arm in arms)
        confirm += _count_packs(num_runs, slots, empty=empty) * run_s + num_runs * group.scoring_s
        longest_confirm = max(longest_confirm, min(1.0, num_runs / slots) * run_s + min(1, num_runs) * group.scoring_s)
    reference_s = max((group.reference_s for group in rates), default=0.0)
    search_high_s = reference_s + max(high / workers, longest)
    return Cost(reference_s + low / workers, search_high_s, max(confirm / workers, longest_confirm))


def _count_packs(num_runs: int, slots: int, *, empty: float) -> float:
    """Returns the number of packs that the runs take, where an empty slot costs a fraction of one with a run."""
    filled = num_runs / slots
    return filled + empty * (math.ceil(filled) - filled)


def count_workers(definition: Definition) -> int:
    """Returns the number of workers that the sweep has from its start, as far as it is known."""
    config, trainer = definition.sweep_config.worker, definition.arms[0].base.trainer
    if isinstance(config, SlurmWorkers):
        processes = 1 if trainer.devices == "auto" else trainer.devices * trainer.num_nodes
        return max(1, config.jobs * config.processes_per_job // processes)
    return 1 if config.num == "auto" else config.num  # the sweep has replaced `auto` of local workers by a number


def _find_empty_cost(config: RunConfig) -> float:
    """Returns the assumed cost of an empty slot of a pack, as a fraction of the cost of a slot with a run."""
    return 1.0 if get_device(config.trainer).type == "cuda" else 0.25


class Cut(NamedTuple):
    """Overrides that make a sweep smaller. Of several cuts with one name the last one holds."""

    name: str
    overrides: Mapping[str, Any]
    given_up: str
    """A clause that says what is left. `{minutes}` stands for the least time that gives up no question here."""


class FittedSweep(NamedTuple):
    """A sweep that fits a time."""

    definition: Definition
    overrides: Mapping[str, Any]
    """The cuts that were made."""
    given_up: str
    """A sentence that says what is left of what is cut, and which questions are not asked."""


def fit_minutes(
    definition: Definition,
    rates: Sequence[Rates],
    minutes: float,
    *,
    typed: Collection[str] = (),
    spent_s: float = 0.0,
) -> FittedSweep:
    """Returns the largest sweep with which a command ends within the minutes.

    The cuts of `list_cuts` are made one after another. Then those of each name, the last name first, are taken back as
    far as they fit. The estimate assumes that no run stops early and all seeds are needed. `typed` are the keys that
    the user typed, whose values stay. `spent_s` is the time that loading and measuring have taken.

    Raises ConfigError, with the minutes that it needs, if the smallest sweep takes over `MINUTES_TOLERANCE` longer.
    """
    cuts = list_cuts(definition, rates, typed=typed)
    names = [cut.name for cut in cuts]

    def find_last(counts: Mapping[str, int]) -> list[Cut]:
        """Returns the last of the first `counts[name]` cuts of each name. Without `full`, several ranks stay."""
        made = [name for name, number in counts.items() if number and not (name == "rank" and counts.get("full"))]
        return [[cut for cut in cuts if cut.name == name][counts[name] - 1] for name in made]

    def list_overrides(counts: Mapping[str, int]) -> dict[str, Any]:
        overrides = {key: value for cut in find_last(counts) for key, value in cut.overrides.items()}
        dropped = tuple(f"{key}." for key, value in overrides.items() if value is None and key.count(".") == 1)  # arms
        return {key: value for key, value in overrides.items() if not key.startswith(dropped)}

    def estimate(counts: Mapping[str, int]) -> float:
        return spent_s + estimate_cost(definition.with_overrides(list_overrides(counts)), rates, look=-1).high_s

    def fits(counts: Mapping[str, int]) -> bool:
        return estimate(counts) <= 60 * minutes

    counts = Counter(names[: bisect_left(range(len(cuts)), True, key=lambda number: fits(Counter(names[:number])))])
    for name in reversed(dict.fromkeys(names)):
        counts[name] = bisect_left(range(counts[name]), True, key=lambda number: fits({**counts, name: number}))
    overrides, seconds = list_overrides(counts), estimate(counts)
    smaller = definition.with_overrides(overrides)
    made = {cut.name: cut.given_up for cut in sorted(find_last(counts), key=lambda cut: cut.name not in QUESTION_CUTS)}
    for name in [name for name in QUESTION_CUTS if name in made]:
        whole_s = estimate(Counter(names[: names.index(name)]))
        made[name] = made[name].replace("{minutes}", str(math.ceil(whole_s / 60)))
    given_up = "; ".join(text for name, text in made.items() if name != "ranks" or "rank" not in made)
    given_up = f"cut to {given_up}" if given_up else "nothing is cut"
    beside = " ".join(filter(None, (describe_cores(definition), describe_load(rates))))
    # with a tolerance, because this message may have named these minutes after an earlier measurement
    if seconds > (1 + MINUTES_TOLERANCE) * 60 * minutes:
        asked = list_questions(smaller)
        answers = join_words([ANSWERED[one.name].format(one=one) for one in asked]) or "which settings are best"
        raise ConfigError(
            f"`--minutes` must be at least {math.ceil(seconds / 60)} for this sweep on this machine, but "
            f"got {minutes:g}. That time would answer {answers}: {given_up}. "
            f"Shorter examples (`data.max_length`) or a smaller model take less. {beside}".rstrip()
        )
    within = f"within {minutes:g} min"
    if seconds > 60 * minutes:
        within = f"in about {format_seconds(seconds)}, a little more than {minutes:g} min"
    return FittedSweep(smaller, overrides, f"{within}: {given_up}. {beside}".rstrip())


def describe_cores(definition: Definition) -> str:
    """Returns a sentence if `OMP_NUM_THREADS` keeps cores of this machine from training; empty otherwise."""
    threads, config, num = os.environ.get("OMP_NUM_THREADS", ""), definition.sweep_config.worker, count_cores()
    if not threads.isdecimal() or not isinstance(config, LocalWorker):
        return ""
    used = max(int(threads), count_workers(definition))
    if used >= num or any(get_device(arm.base.trainer).type == "cuda" for arm in definition.arms):
        return ""
    return f"Trains on {used} of {num} cores, because `OMP_NUM_THREADS` is {threads}: unset it to take less time."


def describe_load(rates: Sequence[Rates]) -> str:
    """Returns a sentence if other processes slowed the measurement down; empty otherwise."""
    share = max((group.busy_share for group in rates), default=0.0)
    if share <= MAX_BUSY_SHARE:
        return ""
    return (
        f"Measured while other work kept {format_share(share)} of the cores busy, so the times change with that work. "
        "`lorasweep plan --measure` measures anew."
    )


def list_cuts(definition: Definition, rates: Sequence[Rates], *, typed: Collection[str] = ()) -> list[Cut]:
    """Returns cuts in the order in which they are made. A key that was `typed` is not cut.

    The questions are protected: two ranks in the middle stay until the rest is at its least, then one, and full
    fine-tuning goes last. A run keeps one epoch before, then half an epoch, never fewer than `MIN_STEPS`, and all that
    it has if that is less. LoRA stays.
    """
    epoch = max(group.num_train for group in rates) / definition.arms[0].base.trainer.batch_size
    steps = [*_cut_steps(definition, least=max(MIN_STEPS, epoch / 2))]
    order = (
        _cut_seeds(definition),
        _cut_examples(definition, rates, split="validation"),
        _cut_ranks(definition),
        _cut_trials(definition, typed=typed),
        [cut for cut in steps if cut.overrides[STEPS_KEY] >= epoch],
        _cut_examples(definition, rates, split="test") if _is_scoring_slow(definition, rates) else (),
        _cut_rank(definition),
        _cut_full(definition),
        [cut for cut in steps if cut.overrides[STEPS_KEY] < epoch],
    )
    kept = {*typed, STEPS_KEY} if "sweep.epochs" in typed else typed
    return [cut for cuts in order for cut in cuts if not any(_overlap(*pair) for pair in product(cut.overrides, kept))]


def _overlap(key: str, other: str) -> bool:
    """Returns whether two keys set the same for an arm, or one belongs to an arm that the other leaves out."""
    return f".{key}".endswith(f".{other}") or f".{other}".endswith(f".{key}") or other.startswith(f"{key}.")


def _cut_seeds(definition: Definition) -> Iterator[Cut]:
    seeds, looks = definition.sweep_config.confirm.seeds, definition.sweep_config.confirm.list_looks()
    fewer = [looks[:end] for end in range(len(looks) - 1, 0, -1)]
    for kept in [*fewer, (ENOUGH_SEEDS,)] if looks and looks[0] > ENOUGH_SEEDS else fewer:
        value = kept[-1] if isinstance(seeds, int) else list(kept)
        yield Cut("seeds", {"confirm.seeds": value}, f"at most {kept[-1]} of {looks[-1]} seeds ({OPEN})")


def _is_scoring_slow(definition: Definition, rates: Sequence[Rates]) -> bool:
    """Returns whether scoring test examples takes a large share of the time of a confirm run that trains."""
    config = next((arm.base for arm in definition.arms if arm.base.num_steps), definition.arms[0].base)
    run_s = [
        (group.scoring_s, group.estimate_run_s(config.num_steps, config.trainer.eval_every_steps) / group.slots)
        for group in rates
        if group.step_s
    ]
    return any(scoring_s > MIN_SCORING_SHARE * (seconds + scoring_s) for scoring_s, seconds in run_s)


def _cut_examples(definition: Definition, rates: Sequence[Rates], *, split: str) -> Iterator[Cut]:
    data = definition.arms[0].base.data
    most = max(group.num_scored.get(split, 0) for group in rates)
    halves = [half for number in range(1, 20) if (half := most >> number) > MIN_EXAMPLES]
    keys = [key for key in data.limit_keys if f"_{split}_" in key]
    for number in [*halves, MIN_EXAMPLES] if keys and most > MIN_EXAMPLES else ():
        limits = {f"data.{key}": min(number, getattr(data, key) or number) for key in keys}
        yield Cut(split, limits, f"at most {number:,} of {most:,} {split} examples ({OPEN})")


def _cut_ranks(definition: Definition) -> Iterator[Cut]:
    """Yields fewer values of `confirm_each`, down to the two in the middle."""
    most = max(len(arm.subjects) for arm in definition.arms)
    for number in range(most - 1, 1, -1):
        kept = {
            f"{arm.name}.{arm.confirm_each}": _keep_middle(arm, number)
            for arm in definition.arms
            if len(arm.subjects) > number
        }
        lost = [f"`{key.partition('.')[2]}` {join_words([*map(str, values)])} alone" for key, values in kept.items()]
        yield Cut("ranks", {f"arms.{key}": values for key, values in kept.items()}, "; ".join(lost))


def _cut_rank(definition: Definition) -> Iterator[Cut]:
    """Yields a sweep with one value of `confirm_each`, which is still compared with full fine-tuning."""
    several = [arm for arm in definition.arms if len(arm.subjects) > 1]
    if not several or not (full := [arm.name for arm in definition.arms if arm.base.method.trains_all]):
        return
    overrides, lost = dict[str, Any](), list[str]()
    for arm in several:
        (value,) = _keep_middle(arm, 1)
        own = {str(arm.confirm_each): value, "confirm_each": None, "trials": min(ENOUGH_TRIALS, arm.trials)}
        overrides |= {f"arms.{arm.name}.{key}": content for key, content in own.items()}
        lost.append(f"`{arm.confirm_each}` {value} alone")
    instead = " and ".join(f"`arms.{name}=null`" for name in full)
    how = f"`--minutes {{minutes}}` asks it too, {instead} asks it instead of full fine-tuning"
    yield Cut("rank", overrides, f"{'; '.join(lost)}, so which is enough is NOT ASKED ({how})")


def _keep_middle(arm: Arm, number: int) -> list[Any]:
    """Returns this number of values of an arm's `confirm_each` from the middle, where the usual ranks are."""
    first = (len(arm.subjects) - number + (number == 1)) // 2
    return [subject.value for subject in arm.subjects[first : first + number]]


def _cut_trials(definition: Definition, *, typed: Collection[str]) -> Iterator[Cut]:
    """Yields fewer trials of LoRA. Full fine-tuning keeps `ENOUGH_TRIALS`."""
    if not (arms := [arm for arm in definition.arms if arm.space and f"arms.{arm.name}.trials" not in typed]):
        return
    largest = max(arms, key=lambda arm: (arm.trials, not searches_one_key(arm.space)))
    most = largest.trials
    least = min(ENOUGH_TRIALS if largest.base.method.trains_all else MIN_TRIALS, most)
    for number in dict.fromkeys(max(least, number) for number in (most * 3 // 4, most // 2, least) if least < most):
        shared = 2 * number if searches_one_key(largest.space) else number
        own = dict[str, int]()
        for arm in arms:
            size = math.ceil(shared / 2) if searches_one_key(arm.space) else shared
            least_of_arm = ENOUGH_TRIALS if arm.base.method.trains_all else 0
            if (kept := min(arm.trials, max(size, least_of_arm))) != size:  # no number grows
                own[f"arms.{arm.name}.trials"] = kept
        yield Cut(
            "trials",
            {"sweep.trials": shared, **own},
            f"{number} of {most} trials of `{largest.name}` (a better learning rate may be missed)",
        )


def _cut_steps(definition: Definition, *, least: float) -> Iterator[Cut]:
    """Yields fewer steps of a run, in whole intervals of evaluations if the interval is set."""
    arms = [arm for arm in definition.arms if arm.base.num_steps]
    if not arms or any(STEPS_KEY in arm.space for arm in arms):
        return
    most = max(arm.base.num_steps for arm in arms)
    unit = math.lcm(2, *(arm.base.trainer.eval_every_steps for arm in arms if INTERVAL_KEY in arm.settings))
    for steps in range(unit * ((most - 1) // unit), unit * math.ceil(least / unit) - 1, -unit):
        own = {f"arms.{arm.name}.{STEPS_KEY}": arm.base.num_steps for arm in arms if arm.base.num_steps < steps}
        lost = f"{steps:,} of {most:,} steps a run (the answers hold for shorter training)"
        yield Cut("steps", {STEPS_KEY: steps, **own}, lost)


def _cut_full(definition: Definition) -> Iterator[Cut]:
    """Yields a sweep without full fine-tuning, whose margin is a share of the best rank's gain, if others search."""
    full = [arm.name for arm in definition.arms if arm.base.method.trains_all]
    if full and any(arm.space and arm.name not in full for arm in definition.arms):
        lost = (
            f"no arm {join_words([f'`{name}`' for name in full])}, so whether LoRA is as good as full fine-tuning is "
            "NOT ASKED (`--minutes {minutes}` asks it)"
        )
        yield Cut("full", dict.fromkeys(f"arms.{name}" for name in full), lost)

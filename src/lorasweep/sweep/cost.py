"""Computes what a sweep costs, and which smaller sweep fits a time (`--minutes`).

A cost is computed from measured rates, without composing the sweep again, so that many numbers can be tried.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from optuna.distributions import CategoricalDistribution

from lorasweep.config.compose import choose_evaluation_interval
from lorasweep.config.data import BlockSettings, DataConfig, RowSettings
from lorasweep.config.run import STEPS_KEY, RunConfig
from lorasweep.config.sweep import MINUTES_KEY, RayWorkers
from lorasweep.errors import ConfigError
from lorasweep.record import RunRecord
from lorasweep.sweep.controller.proposals import find_batch_start
from lorasweep.sweep.controller.stopping import MIN_STEPS
from lorasweep.sweep.definition.arms import Arm, Definition, restore_definition, searches_one_key
from lorasweep.sweep.definition.confirm import count_confirm_runs, list_questions
from lorasweep.training.environment import get_device
from lorasweep.wording import format_setting, join_words

MIN_TRIALS = 6
"""Fewer trials of an arm are too few to search two decades of learning rates, so they are a last resort."""
MIN_EXAMPLES = 16
"""Minimum number of examples on which `--minutes` lets a run be scored."""
ROUGH = "The estimate is rough: whole packs or steps took too long to measure."
MINUTES_TOLERANCE = 0.15
"""The smallest budget may exceed `--minutes` by this fraction, because two measurements differ by as much."""
MAX_MEASURED_SHARE = 0.1
"""Maximum share of `--minutes` for which all groups are measured."""
LOSS_OF_ANSWERS = 1e4
"""Loss of a cut after which a question is not asked or can't be answered. Every other cut goes first."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The largest numbers that a sweep may have. None keeps what the sweep has."""

    looks: tuple[int, ...] | None = None
    """Numbers of seeds at which the questions are tested."""
    trials: int | None = None
    """The setting `sweep.trials`: an arm that searches one key gets half of it."""
    values: int | None = None
    """Number of values of `confirm_each`. The largest one stays, and others at equal distances."""
    examples: int | None = None
    """Number of examples or blocks of a split on which a run is scored."""
    new_tokens: int | None = None
    """Tokens of a generated answer."""
    steps: int | None = None
    """Steps of a run."""
    batch_size: int | None = None
    left_out: tuple[str, ...] | None = None
    """Names of arms."""
    minutes: float | None = None
    """The time to which the sweep is cut."""

    def find_settings(self, definition: Definition) -> dict[str, Any]:
        """Returns the settings of a sweep file that cut a sweep to this budget; arms may have numbers of their own."""
        confirm, data = definition.sweep_config.confirm, definition.arms[0].base.data
        settings: dict[str, Any] = {MINUTES_KEY: self.minutes, STEPS_KEY: self.steps, "sweep.trials": self.trials}
        settings |= {"trainer.batch_size": self.batch_size, "data.answers.max_new_tokens": self.new_tokens}
        if self.looks is not None:
            is_auto = confirm.seeds == "auto"
            settings["confirm.looks" if is_auto else "confirm.seeds"] = list(self.looks) if is_auto else self.looks[-1]
        if (examples := self.examples) is not None:
            settings |= {
                f"data.{key}": min(examples, getattr(data, key) or examples) for key in list_example_keys(data)
            }
        settings = {key: value for key, value in settings.items() if value is not None}
        for arm in definition.arms:
            if arm.name in (self.left_out or ()):
                settings[f"arms.{arm.name}"] = None
            elif kept := self.limit_values(arm):
                settings[f"arms.{arm.name}.{arm.confirm_each}"] = list(kept)
                settings |= {} if len(kept) > 1 else {f"arms.{arm.name}.confirm_each": None}
        return settings

    def limit_trials(self, arm: Arm) -> int:
        if self.trials is None:
            return arm.trials
        return min(arm.trials, math.ceil(self.trials / 2) if searches_one_key(arm.space) else self.trials)

    def limit_values(self, arm: Arm) -> tuple[Any, ...]:
        """Returns the values of `confirm_each` that stay; empty if all do."""
        values = [subject.value for subject in arm.subjects]
        if self.values is None or self.values >= len(values):
            return ()
        return tuple(values[:: -math.ceil(len(values) / self.values)][::-1])

    def limit_steps(self, config: RunConfig) -> tuple[int, int]:
        """Returns the number of steps of a run, and the number of steps between two of its evaluations."""
        if self.steps is None or config.num_steps <= self.steps:
            return config.num_steps, config.trainer.eval_every_steps
        return self.steps, choose_evaluation_interval(self.steps)

    def limit_arm(self, arm: Arm) -> Arm:
        """Returns an arm with fewer trials and values."""
        kept, key = self.limit_values(arm), arm.confirm_each or ""
        space = {**arm.space, key: CategoricalDistribution(kept)} if kept else arm.space
        return replace(arm, trials=self.limit_trials(arm), space=space)


WHOLE = Budget()
"""The budget that cuts nothing."""


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
    """Number of training examples; 0 if it is not known."""
    is_rough: bool = False
    """Whether fewer slots, or fewer examples a step, were measured than the sweep has."""
    peak_memory_bytes: int
    record: RunRecord
    """Record of one of the measured runs."""
    kept_bytes: int
    """Size of the folder of that run."""
    trained_params: dict[str, int]
    """Trained parameters of the largest run of each arm, by name of the arm."""

    def estimate_run_s(self, num_steps: int, interval: int) -> float:
        """Returns the seconds of a training with an evaluation every `interval` steps."""
        scored_s = (math.ceil(num_steps / interval) or 1) * (self.evaluation_s + self.saving_s) + self.final_s
        return self.loading_s + num_steps * self.step_s + scored_s + self.answers_s.get("validation", 0.0)

    def limit(self, budget: Budget, config: RunConfig) -> Rates:
        """Returns the rates after a cut. `config` has the settings of the measured runs."""
        step = _share(budget.batch_size, config.trainer.batch_size)
        validation, test = (_share(budget.examples, self.num_scored.get(name)) for name in ("validation", "test"))
        answers_s = self.answers_s
        if answers_s and (answers := config.data.generated):
            tokens = _share(budget.new_tokens, answers.max_new_tokens)
            most = {name: min(self.num_scored[name], answers.max_examples or math.inf) for name in answers_s}
            answers_s = {name: tokens * _share(budget.examples, most[name]) * s for name, s in answers_s.items()}
        return replace(
            self,
            step_s=step * self.step_s,
            step_tokens=step * self.step_tokens,
            evaluation_s=validation * self.evaluation_s,
            final_s=validation * self.final_s,
            test_s=test * self.test_s,
            answers_s=answers_s,
        )


def _share(limit: int | None, number: float | None) -> float:
    return min(1.0, limit / number) if limit and number else 1.0


class Cost(NamedTuple):
    """Seconds of the stages of a sweep. The lower end is for packs in which empty slots make a step shorter."""

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


def estimate_cost(definition: Definition, rates: Sequence[Rates], *, budget: Budget = WHOLE, look: int = 0) -> Cost:
    """Returns the cost of the arms that were measured, in a sweep that is cut to a budget.

    It goes up to the look with this index, and assumes that no run stops early.
    """
    looks = definition.sweep_config.confirm.list_looks() if budget.looks is None else budget.looks
    seeds = looks[look] if looks else 0
    low = high = max((group.reference_s for group in rates), default=0.0)
    confirm = 0.0
    for group in rates:
        whole = [definition.find_arm(name) for name in group.arms if name not in (budget.left_out or ())]
        if not whole:
            continue
        arms, config = [budget.limit_arm(arm) for arm in whole], whole[0].base
        limited = group.limit(budget, config)
        run_s = limited.estimate_run_s(*budget.limit_steps(config))
        for arm in arms:
            batches = Counter(find_batch_start(arm, number) for number in range(arm.trials))
            low += arm.trials / group.slots * run_s
            high += sum(math.ceil(size / group.slots) for size in batches.values()) * run_s
        num_runs = sum(count_confirm_runs(arm, seeds=seeds) for arm in arms)
        num_packs = num_runs / group.slots
        confirm += (num_packs + find_empty_cost(config) * (math.ceil(num_packs) - num_packs)) * run_s
        confirm += num_runs * (limited.test_s + limited.answers_s.get("test", 0.0))
    return Cost(low, high, confirm)


def count_workers(definition: Definition) -> int:
    """Returns the number of workers that the sweep has from its start, as far as it is known."""
    config = definition.sweep_config.worker
    return config.num if isinstance(config, RayWorkers) and config.num != "auto" else 1


def find_empty_cost(config: RunConfig) -> float:
    """Returns the assumed cost of an empty slot of a pack, over that of a slot with a run."""
    return 1.0 if get_device(config.trainer).type == "cuda" else 0.25


class Cut(NamedTuple):
    """A value of a field of `Budget`."""

    value: Any
    loss: float
    """How bad the cut is. Dropping one of several looks is 1."""
    given_up: str


def fit_minutes(
    definition: Definition, rates: Sequence[Rates], minutes: float, *, spent_s: float = 0.0
) -> tuple[Budget, str]:
    """Returns the best budget with which a command ends within the minutes, and a sentence on what is given up.

    The next cut of `list_cuts` is always the one that saves most time for its loss. Afterwards each cut that turned out
    to be needless is undone, and time that is left goes into steps. The estimate assumes that no run stops early and
    all seeds are needed. `spent_s` is the time that loading and measuring have taken.

    Raises ConfigError if the smallest budget takes longer.
    """
    cuts, available_s = list_cuts(definition, rates), 60 * minutes - spent_s
    most, known = max(arm.base.num_steps for arm in definition.arms), dict[Budget, float]()

    def choose(places: Mapping[str, int]) -> dict[str, Cut]:
        return {name: cuts[name][place] for name, place in places.items()}

    def build(places: Mapping[str, int]) -> Budget:
        return Budget(minutes=minutes, **{name: cut.value for name, cut in choose(places).items()})

    def estimate(budget: Budget) -> float:
        if budget not in known:
            cost = estimate_cost(definition, rates, budget=budget, look=-1)
            known[budget] = cost.low_s + find_empty_cost(definition.arms[0].base) * (cost.high_s - cost.low_s)
        return known[budget]

    def cut_to(seconds: float) -> dict[str, int]:
        places = dict.fromkeys(cuts, 0)

        def save_by_loss(name: str) -> float:
            added = cuts[name][places[name] + 1].loss - cuts[name][places[name]].loss
            return (estimate(build(places)) - estimate(build({**places, name: places[name] + 1}))) / added

        while estimate(build(places)) > seconds:
            if not (names := [name for name, place in places.items() if place + 1 < len(cuts[name])]):
                break
            places[max(names, key=save_by_loss)] += 1
        for name in sorted(cuts, key=lambda name: choose(places)[name].loss, reverse=True):
            if name == "values" and places["left_out"]:
                continue  # without `full`, nothing says which value is enough
            while places[name] and estimate(build({**places, name: places[name] - 1})) <= seconds:
                places[name] -= 1
        return places

    def is_enough(minutes: int) -> bool:
        places = cut_to((1 - MAX_MEASURED_SHARE) * 60 * minutes - spent_s)  # more minutes are measured for longer
        keeps_answers = all(cut.loss < LOSS_OF_ANSWERS for cut in choose(places).values())
        return keeps_answers and not _find_missing_epochs(definition, rates, build(places))

    places = cut_to(available_s)
    budget, given_up = build(places), {name: cut.given_up for name, cut in choose(places).items() if cut.given_up}
    if budget.steps is not None:
        longer = range(cuts["steps"][places["steps"] - 1].value or most, budget.steps, -2)
        fitting = (replace(budget, steps=steps) for steps in longer)
        budget = next((each for each in fitting if estimate(each) <= available_s), budget)
        given_up["steps"] = _describe_steps(budget.steps or most, most)
    seconds, lost = estimate(budget), "; ".join(given_up.values()) or "nothing is given up"
    rough = f" {ROUGH}" if any(group.is_rough for group in rates) else ""
    # with room, because an earlier measurement may have named these minutes
    if seconds + spent_s > (1 + MINUTES_TOLERANCE) * 60 * minutes:
        raise ConfigError(
            f"`--minutes` must be at least {math.ceil((seconds + spent_s) / 60)} for this sweep on this machine, but "
            f"got {minutes:g}. That would give up: {lost}.{rough} What helps: shorter examples (`data.max_length`) and "
            "a smaller model."
        )
    about = "about " if seconds > available_s else ""
    missing = _list_missing(definition, rates, budget)
    if missing or any(cut.loss >= LOSS_OF_ANSWERS for cut in choose(places).values()):
        high = math.ceil(minutes)
        while not is_enough(high):
            high *= 2
        least = high // 2 + bisect.bisect_left(range(high // 2, high), True, key=is_enough)
        missing.append(f"From `--minutes {least}` on, every question is asked and runs train an epoch or all steps.")
    return budget, " ".join([f"within {about}{minutes:g} min: {lost}.{rough}", *missing])


def _list_missing(definition: Definition, rates: Sequence[Rates], budget: Budget) -> list[str]:
    """Returns sentences on the questions that a sweep cut to a budget does not ask, and on less than an epoch."""
    left_out, missing, sentences = budget.left_out or (), [], []
    for question in list_questions(definition):
        arm = definition.find_arm(question.arm)
        if question.name == "smallest" and (arm.name in left_out or len(budget.limit_values(arm)) == 1):
            missing.append(f"which `{question.key}` of `{arm.name}` is enough")
        elif not {question.arm, question.reference}.isdisjoint(left_out):
            missing.append(f"how `{question.arm}` compares with `{question.reference}`")
    if missing:
        sentences.append(f"Questions that will not be asked: {'; '.join(missing)}.")
    if epochs := _find_missing_epochs(definition, rates, budget):
        sentences.append(f"A run trains {epochs:.2g} epochs, so it may learn nothing.")
    return sentences


def _find_missing_epochs(definition: Definition, rates: Sequence[Rates], budget: Budget) -> float:
    """Returns the epochs of a run if the budget cuts its steps below one epoch; otherwise 0."""
    config = max((arm.base for arm in definition.arms), key=lambda config: config.num_steps)
    num_train, batch_size = max(group.num_train for group in rates), config.trainer.batch_size
    trained = budget.limit_steps(config)[0] * (budget.batch_size or batch_size)
    return trained / num_train if trained < min(num_train, config.num_steps * batch_size) else 0.0


def _describe_steps(steps: int, most: int) -> str:
    return f"{steps:,} of {most:,} steps a run (the answers hold for shorter training)"


def list_cuts(definition: Definition, rates: Sequence[Rates]) -> dict[str, list[Cut]]:
    """Returns the cuts of each field of `Budget`, from none to the largest.

    The losses are judgements: seeds, trials, values, examples and answers go before steps, and steps before whatever
    answers a question: the second seed, the second value, and arms. A single trial and smaller batches come late.
    """
    looks, config = definition.sweep_config.confirm.list_looks(), definition.arms[0].base
    cuts = {each.name: [Cut(None, 0.0, "")] for each in fields(Budget) if each.name != "minutes"}

    def add(name: str, value: Any, loss: float, given_up: str) -> None:
        cuts[name].append(Cut(value, loss, given_up))

    fewer = [(looks[:end], float(len(looks) - end)) for end in range(len(looks) - 1, 0, -1)]
    smallest = ((3, 4.0), (2, 20.0), (1, LOSS_OF_ANSWERS))
    fewer += [((seeds,), loss) for seeds, loss in smallest if looks and seeds < looks[0]]
    for seeds, loss in fewer:
        open_ = "small differences stay" if seeds[-1] > 1 else "every question stays"
        add("looks", seeds, loss, f"at most {seeds[-1]} of {looks[-1]} seeds ({open_} open)")
    largest = max(definition.arms, key=lambda arm: (arm.trials, not searches_one_key(arm.space)))
    unit, most = 2 if searches_one_key(largest.space) else 1, largest.trials
    least = min(MIN_TRIALS, most)
    for number, loss in {max(least, most * 3 // 4): 1.0, max(least, most // 2): 3.0, 3: 15.0, 1: 60.0}.items():
        given_up = f"{number} of {most} trials an arm (a better learning rate may be missed)"
        cuts["trials"] += [Cut(unit * number, loss, given_up)] if number < most else []
    most = max(len(arm.subjects) for arm in definition.arms)
    for number, loss in {math.ceil(most / 2): 4.0, 1: 10 * LOSS_OF_ANSWERS}.items() if looks else ():
        kept = [(arm.confirm_each, Budget(values=number).limit_values(arm)) for arm in definition.arms]
        named = [f"`{key}` {join_words(list(map(format_setting, values)))}" for key, values in kept if values]
        if named:
            add("values", number, loss, f"{join_words(named)} alone (other values stay unknown)")
    most = max(size for group in rates for size in (*group.num_scored.values(), 0))
    most = most if list_example_keys(config.data) else 0
    for size in (most >> number for number in range(1, 20) if most >> number >= MIN_EXAMPLES):
        loss = 2.0 * math.log2(most / size) + 20.0 * MIN_EXAMPLES / size
        add("examples", size, loss, f"at most {size:,} of {most:,} scored examples (small differences stay open)")
    if answers := config.data.generated:
        most = answers.max_new_tokens
        for tokens, loss in ((most // 2, 2.0), (most // 4, 8.0)) if most >= 32 else ():
            add("new_tokens", tokens, loss, f"{tokens} of {most} tokens an answer (longer ones are cut off)")
    steps = most = max(arm.base.num_steps for arm in definition.arms)
    while steps > 2:
        steps = max(2, 2 * (steps // 3))
        loss = 10 * math.log2(most / steps) + 15 * math.log2(max(1.0, MIN_STEPS / steps))
        add("steps", steps, loss, _describe_steps(steps, most))
    most = config.trainer.batch_size
    can_cut = config.module is None and all(arm.base.trainer.batch_size == most for arm in definition.arms)
    for size in (most >> number for number in range(1, 20) if can_cut and most >> number >= config.trainer.accumulate):
        add("batch_size", size, 40.0 * math.log2(most / size), f"{size} of {most} examples a step (noisier steps)")
    paired = {name for pair in definition.sweep_config.confirm.pairs for name in pair}
    trained = [arm for arm in definition.arms if not arm.base.method.trains_nothing and arm.name not in paired]
    trained.sort(key=lambda arm: arm.base.method.name == "full")
    names = [arm.name for arm in (*trained[-1:], *trained[1:-1])] if len(trained) > 1 else []  # full goes last
    for number in range(1, len(names) + 1):
        left = tuple(names[-number:])
        loss = 100 * LOSS_OF_ANSWERS * number
        add("left_out", left, loss, f"arms {join_words(left)} (nothing is compared with them)")
    return cuts


def list_example_keys(data: DataConfig) -> Sequence[str]:
    """Returns the settings of data that limit the examples on which a run is scored."""
    if isinstance(data, BlockSettings):
        return "max_validation_blocks", "max_test_blocks"
    return ("max_validation_examples", "max_test_examples") if isinstance(data, RowSettings) else ()


def cut_sweep(definition: Definition, budget: Budget) -> Definition:
    """Returns a sweep whose arms have at most the numbers of a budget."""
    left_out = {f"arms.{name}": name in definition.raw["file"]["arms"] for name in budget.left_out or ()}
    typed = {
        key: value for key, value in definition.raw["overrides"].items() if ".".join(key.split(".")[:2]) not in left_out
    }
    overrides = {**typed, **budget.find_settings(definition)}
    # an arm that was typed is left out by not typing it
    overrides = {key: value for key, value in overrides.items() if left_out.get(key, True)}
    if budget.steps is not None:
        overrides["trainer.eval_every_steps"] = choose_evaluation_interval(budget.steps)
    cut = restore_definition({**definition.raw, "overrides": overrides}, source=definition.source)
    # the settings may raise the numbers of an arm that has smaller ones, and leave those that are typed for one arm
    corrections: dict[str, int] = {}
    for after in cut.arms:
        before = definition.find_arm(after.name)
        trials, (steps, interval) = budget.limit_trials(before), budget.limit_steps(before.base)
        if trials != after.trials:
            corrections[f"arms.{before.name}.trials"] = trials
        if steps != after.base.num_steps:
            corrections[f"arms.{before.name}.{STEPS_KEY}"] = steps
            corrections[f"arms.{before.name}.trainer.eval_every_steps"] = interval
    if not corrections:
        return cut
    return restore_definition({**definition.raw, "overrides": overrides | corrections}, source=definition.source)

"""Computes what a sweep costs, and which smaller sweep fits a time (`--minutes`).

A cost is computed from measured rates, without composing the sweep again, so that many numbers can be tried.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lorasweep.config.compose import choose_evaluation_interval
from lorasweep.config.run import MIN_STEPS, STEPS_KEY, RunConfig
from lorasweep.config.sweep import DEFAULT_MARGIN, RayWorkers, parse_margin
from lorasweep.errors import ConfigError
from lorasweep.record import QuestionName
from lorasweep.sweep.controller.proposals import find_batch_start
from lorasweep.sweep.definition.arms import Arm, Definition, searches_one_key
from lorasweep.sweep.definition.confirm import count_confirm_runs, list_questions
from lorasweep.sweep.definition.ranges import Range
from lorasweep.training.environment import get_device
from lorasweep.wording import join_words

MIN_SEEDS = 3
"""Minimum number of confirm seeds that `--minutes` leaves. Fewer seeds leave nearly every question open."""
MIN_TRIALS = 6
"""Minimum number of trials that `--minutes` leaves to the arm with most. Fewer can't search two decades of rates."""
MIN_EXAMPLES = 200
"""Minimum number of examples or blocks on which `--minutes` lets a run be scored. If two settings differ on a quarter
of them, 10 points of accuracy are found with a probability of 80 %: 196 = (1.96 + 0.84)² · 0.25 / 0.1²."""
ANSWERED: Mapping[QuestionName, str] = {
    "as_good_as_full": "whether `{one.arm}` is as good as full fine-tuning",
    "smallest": "which `{one.key}` is enough",
    "pair": "whether `{one.arm}` is better than `{one.reference}`",
}
"""For each kind of question, the clause that says what its answer would tell."""
MINUTES_TOLERANCE = 0.15
"""The smallest budget may exceed `--minutes` by this fraction, because two measurements differ by as much."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The largest numbers that a sweep may have. None keeps what the sweep has."""

    looks: tuple[int, ...] | None = None
    """Numbers of seeds at which the questions are tested."""
    examples: int | None = None
    """Number of examples or blocks of a split on which a run is scored."""
    ranks: int | None = None
    """Number of values of `confirm_each`."""
    trials: int | None = None
    """The setting `sweep.trials`: an arm that searches one key gets half of it."""
    own_trials: tuple[str, ...] = ()
    """Names of the arms that keep their trials, because a user typed them."""
    steps: int | None = None
    """Steps of a run."""
    without: tuple[str, ...] = ()
    """Names of the arms that are left out."""

    def find_ranks(self, definition: Definition) -> dict[str, list[Any]]:
        """Returns the values of `confirm_each` that stay, by the key below `arms`, for each arm that loses some."""
        limited = {arm.name: self.limit(arm) for arm in definition.arms}
        cut = [arm for arm in definition.arms if limited[arm.name].space != arm.space]
        return {f"{arm.name}.{arm.confirm_each}": [one.value for one in limited[arm.name].subjects] for arm in cut}

    def find_settings(self, definition: Definition) -> dict[str, Any]:
        """Returns the settings that cut a sweep to this budget, but for `confirm_each` and numbers that one arm has."""
        confirm, data = definition.sweep_config.confirm, definition.arms[0].base.data
        settings: dict[str, Any] = {STEPS_KEY: self.steps, "sweep.trials": self.trials}
        if self.looks is not None:
            settings["confirm.seeds"] = self.looks[-1] if isinstance(confirm.seeds, int) else list(self.looks)
        if (examples := self.examples) is not None:
            settings |= {f"data.{key}": min(examples, getattr(data, key) or examples) for key in data.limit_keys}
        return {key: value for key, value in settings.items() if value is not None} | self.leave_out(definition)

    def leave_out(self, definition: Definition) -> dict[str, Any]:
        """Returns the overrides that leave out arms: without full fine-tuning, the margin is no share of its gain."""
        if not self.without:
            return {}
        margin = definition.sweep_config.confirm.margin
        changes = {"confirm.margin": DEFAULT_MARGIN} if parse_margin(margin).is_share_of_gain else {}
        return dict.fromkeys(f"arms.{name}" for name in self.without) | changes

    def limit(self, arm: Arm) -> Arm:
        """Returns an arm with at most the budget's trials and values of `confirm_each`, which are evenly spaced."""
        trials, key = arm.trials, arm.confirm_each
        if self.trials is not None and arm.name not in self.own_trials:
            trials = min(trials, math.ceil(self.trials / 2) if searches_one_key(arm.space) else self.trials)
        if self.ranks is None or key is None or len(arm.subjects) <= self.ranks:
            return replace(arm, trials=trials)
        values = [subject.value for subject in arm.subjects]
        kept = [values[round(n * (len(values) - 1) / (self.ranks - 1))] for n in range(self.ranks)]
        return replace(arm, trials=trials, space={**arm.space, key: Range(choices=kept)})

    def limit_steps(self, config: RunConfig) -> tuple[int, int]:
        """Returns the number of steps of a run, and the number of steps between two of its evaluations."""
        if self.steps is None or config.num_steps <= self.steps:
            return config.num_steps, config.trainer.eval_every_steps
        return self.steps, choose_evaluation_interval(self.steps)


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
    peak_memory_bytes: int
    metric: str
    """The metric that scores the measured run."""
    trained_params: dict[str, int]
    """Trained parameters of the largest run of each arm, by name of the arm."""

    def estimate_run_s(self, num_steps: int, interval: int) -> float:
        """Returns the seconds of a training with an evaluation every `interval` steps."""
        scored_s = (math.ceil(num_steps / interval) or 1) * (self.evaluation_s + self.saving_s) + self.final_s
        return self.loading_s + num_steps * self.step_s + scored_s + self.answers_s.get("validation", 0.0)

    def limit(self, budget: Budget, config: RunConfig) -> Rates:
        """Returns the rates after a cut. `config` has the settings of the measured runs."""
        validation, test = (_share(budget.examples, self.num_scored.get(name)) for name in ("validation", "test"))
        answers_s = self.answers_s
        if answers_s and (answers := config.data.generated):
            most = {name: min(self.num_scored[name], answers.max_examples or math.inf) for name in answers_s}
            answers_s = {name: _share(budget.examples, most[name]) * s for name, s in answers_s.items()}
        return replace(
            self,
            arms=tuple(name for name in self.arms if name not in budget.without),
            evaluation_s=validation * self.evaluation_s,
            final_s=validation * self.final_s,
            test_s=test * self.test_s,
            answers_s=answers_s,
        )


def _share(limit: int | None, number: float | None) -> float:
    return min(1.0, limit / number) if limit and number else 1.0


class Cost(NamedTuple):
    """Seconds of the stages of a sweep. The lower end counts empty slots of packs as free, the upper as used."""

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

    The confirm stage goes up to the look with the index `look`. No run is assumed to stop early.
    """
    looks = definition.sweep_config.confirm.list_looks() if budget.looks is None else budget.looks
    seeds = looks[look] if looks else 0
    low = high = max((group.reference_s for group in rates), default=0.0)
    confirm = 0.0
    for group in rates:
        config = definition.find_arm(group.arms[0]).base
        limited = group.limit(budget, config)
        arms = [budget.limit(definition.find_arm(name)) for name in limited.arms]
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
    """Returns the assumed cost of an empty slot of a pack, as a fraction of the cost of a slot with a run."""
    return 1.0 if get_device(config.trainer).type == "cuda" else 0.25


class Cut(NamedTuple):
    """A smaller value of a field of `Budget`."""

    field: str
    value: Any


def fit_minutes(
    definition: Definition,
    rates: Sequence[Rates],
    minutes: float,
    *,
    typed: Collection[str] = (),
    spent_s: float = 0.0,
) -> tuple[Budget, str]:
    """Returns the best budget with which a command ends within the minutes, and a sentence on what is given up.

    The cuts of `list_cuts` are made one after another. Then the fields, the last one first, grow again if that fits.
    The estimate assumes that no run stops early and all seeds are needed. `typed` are the keys that the user typed,
    whose values stay. `spent_s` is the time that loading and measuring have taken.

    Raises ConfigError, with the minutes that it needs, if the smallest budget takes over `MINUTES_TOLERANCE` longer.
    """
    cuts, available_s = list_cuts(definition, rates, typed=typed), 60 * minutes - spent_s
    own_trials = tuple(arm.name for arm in definition.arms if f"arms.{arm.name}.trials" in typed)
    budgets = [Budget(own_trials=own_trials)]
    for cut in cuts:
        budgets.append(replace(budgets[-1], **{cut.field: cut.value}))

    def estimate(budget: Budget) -> float:
        cost = estimate_cost(definition, rates, budget=budget, look=-1)
        return cost.low_s + find_empty_cost(definition.arms[0].base) * (cost.high_s - cost.low_s)

    budget = next((each for each in budgets if estimate(each) <= available_s), budgets[-1])
    longest = max(arm.base.num_steps for arm in definition.arms)
    for name in dict.fromkeys(cut.field for cut in reversed(cuts)):
        values = [getattr(WHOLE, name), *(cut.value for cut in cuts if cut.field == name)]
        larger = values[: values.index(getattr(budget, name))]
        if name == "steps" and budget.steps is not None:  # in finer steps than the cuts
            larger = [None, *range(longest - 2, budget.steps, -2)]
        fitting = (replace(budget, **{name: value}) for value in larger)
        budget = next((each for each in fitting if estimate(each) <= available_s), budget)
    whole = next(each for each in reversed(budgets) if not each.without)
    needed = math.ceil((estimate(whole) + spent_s) / 60)
    seconds = estimate(budget)
    lost = "; ".join(describe_cuts(definition, rates, budget, needed_minutes=needed)) or "nothing is given up"
    # with a tolerance, because this message may have named these minutes after an earlier measurement
    if seconds + spent_s > (1 + MINUTES_TOLERANCE) * 60 * minutes:
        asked = list_questions(cut_sweep(definition, budget))
        answers = join_words([ANSWERED[one.name].format(one=one) for one in asked]) or "which settings are best"
        raise ConfigError(
            f"`--minutes` must be at least {math.ceil((seconds + spent_s) / 60)} for this sweep on this machine, but "
            f"got {minutes:g}. That time would answer {answers}, and give up: {lost}. "
            f"Shorter examples (`data.max_length`) or a smaller model take less.{_describe_load()}"
        )
    about = "about " if seconds > available_s else ""
    return budget, f"within {about}{minutes:g} min: {lost}.{_describe_load()}"


def _describe_load() -> str:
    """Returns a sentence if other processes slow the measurement down; empty otherwise."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f" Measured beside other work (a load of {load:.1f} on {cores} cores)." if load > 1.5 * cores else ""


def list_cuts(definition: Definition, rates: Sequence[Rates], *, typed: Collection[str] = ()) -> list[Cut]:
    """Returns cuts in their order: seeds, examples, values of the rank, trials, steps, full fine-tuning, more steps.

    The training is protected: a run keeps one epoch before full fine-tuning goes, then half an epoch, never fewer than
    `MIN_STEPS`, and all that it has if that is less. LoRA stays. A key that was `typed` is not cut.
    """

    def is_free(*endings: str) -> bool:
        return not any(f".{key}".endswith(f".{ending}") for key in typed for ending in endings)

    cuts, looks = list[Cut](), definition.sweep_config.confirm.list_looks()
    if looks and is_free("confirm.seeds"):
        cuts += [Cut("looks", looks[:end]) for end in range(len(looks) - 1, 0, -1)]
        cuts += [Cut("looks", (MIN_SEEDS,))] if looks[0] > MIN_SEEDS else []
    limits = definition.arms[0].base.data.limit_keys
    most = max(size for group in rates for size in (*group.num_scored.values(), 0)) if limits else 0
    if is_free(*(f"data.{key}" for key in limits)):
        sizes = (most >> number for number in range(1, 20))
        cuts += [Cut("examples", size) for size in sizes if size > MIN_EXAMPLES]
        cuts += [Cut("examples", MIN_EXAMPLES)] if most > MIN_EXAMPLES else []
    most = max(len(arm.subjects) for arm in definition.arms)
    if is_free(*(arm.confirm_each for arm in definition.arms if arm.confirm_each)):
        cuts += [Cut("ranks", number) for number in range(most - 1, 1, -1)]
    largest = max(definition.arms, key=lambda arm: (arm.trials, not searches_one_key(arm.space)))
    unit, most = 2 if searches_one_key(largest.space) else 1, largest.trials
    is_typed = {arm.name: f"arms.{arm.name}.trials" in typed for arm in definition.arms if arm.space}
    if "sweep.trials" not in typed and not all(is_typed.values()):
        least = min(MIN_TRIALS, most)
        numbers = dict.fromkeys(max(least, number) for number in (most * 3 // 4, most // 2, least))
        cuts += [Cut("trials", unit * number) for number in numbers if number < most]
    full = [arm.name for arm in definition.arms if arm.base.method.trains_all]
    has_others = any(arm.space and arm.name not in full for arm in definition.arms)
    is_full_typed = any(key.startswith(f"arms.{name}.") for key in typed for name in full)
    longest = max((arm.base for arm in definition.arms), key=lambda config: config.num_steps)
    epoch, steps = max(group.num_train for group in rates) / longest.trainer.batch_size, longest.num_steps
    for epochs in (1.0, 0.5):
        least = max(MIN_STEPS, 2 * math.ceil(epochs * epoch / 2))
        while steps > least and is_free(STEPS_KEY, "sweep.epochs"):
            steps = max(least, 2 * (steps // 3))
            cuts.append(Cut("steps", steps))
        cuts += [Cut("without", tuple(full))] if epochs == 1 and full and has_others and not is_full_typed else []
    return cuts


def describe_cuts(
    definition: Definition, rates: Sequence[Rates], budget: Budget, *, needed_minutes: int
) -> Iterator[str]:
    """Yields a clause on each number that a budget cuts, and on what that gives up; lost questions first.

    The smallest sweep that asks all questions takes `needed_minutes`.
    """
    for name in budget.without:
        yield (
            f"the arm `{name}`, so whether LoRA is as good as full fine-tuning is NOT ASKED (`--minutes "
            f"{needed_minutes}` asks it)"
        )
    looks = definition.sweep_config.confirm.list_looks()
    if budget.looks is not None:
        yield f"at most {budget.looks[-1]} of {looks[-1]} seeds (small differences stay open)"
    if budget.examples is not None:
        most = max(size for group in rates for size in group.num_scored.values())
        yield f"at most {budget.examples:,} of {most:,} scored examples (small differences stay open)"
    for key, values in budget.find_ranks(definition).items():
        yield f"`{key.partition('.')[2]}` {join_words(list(map(str, values)))} alone"
    largest = max(definition.arms, key=lambda arm: (arm.trials, not searches_one_key(arm.space)))
    if budget.trials is not None:
        yield f"{budget.limit(largest).trials} of {largest.trials} trials an arm (a better learning rate may be missed)"
    most = max(arm.base.num_steps for arm in definition.arms)
    if budget.steps is not None:
        yield f"{budget.steps:,} of {most:,} steps a run (the answers hold for shorter training)"


def cut_sweep(definition: Definition, budget: Budget) -> Definition:
    """Returns a sweep in which no arm has larger numbers than the budget."""
    changes = budget.find_settings(definition)
    changes |= {f"arms.{key}": values for key, values in budget.find_ranks(definition).items()}
    if budget.steps is not None:
        changes["trainer.eval_every_steps"] = choose_evaluation_interval(budget.steps)
    cut = definition.with_overrides(changes)
    # these settings may raise the smaller numbers of an arm, and do not change numbers that are set for one arm
    corrections: dict[str, int] = {}
    for after in cut.arms:
        before = definition.find_arm(after.name)
        trials, (steps, interval) = budget.limit(before).trials, budget.limit_steps(before.base)
        if trials != after.trials:
            corrections[f"arms.{before.name}.trials"] = trials
        if steps != after.base.num_steps:
            corrections[f"arms.{before.name}.{STEPS_KEY}"] = steps
            corrections[f"arms.{before.name}.trainer.eval_every_steps"] = interval
    return cut.with_overrides(corrections) if corrections else cut

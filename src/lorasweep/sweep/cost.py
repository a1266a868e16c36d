"""Computes what a sweep costs, and which smaller sweep fits a time (`--minutes`).

A cost is computed from measured rates, without composing the sweep again, so that many numbers can be tried.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from lorasweep.config.compose import choose_evaluation_interval
from lorasweep.config.run import STEPS_KEY, RunConfig
from lorasweep.config.sweep import MINUTES_KEY, RayWorkers
from lorasweep.errors import ConfigError
from lorasweep.sweep.controller.proposals import find_batch_start
from lorasweep.sweep.controller.stopping import MIN_STEPS
from lorasweep.sweep.definition.arms import Arm, Definition, searches_one_key
from lorasweep.sweep.definition.confirm import count_confirm_runs
from lorasweep.training.environment import get_device

MIN_SEEDS = 3
"""Minimum number of confirm seeds that `--minutes` leaves. Fewer seeds leave nearly every question open."""
MIN_TRIALS = 6
"""Minimum number of trials that `--minutes` leaves. Fewer are too few to search two decades of learning rates."""
MIN_EXAMPLES = 64
"""Minimum number of examples or blocks on which `--minutes` lets a run be scored."""
MINUTES_TOLERANCE = 0.15
"""The smallest budget may exceed `--minutes` by this fraction, because two measurements differ by as much."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The largest numbers that a sweep may have. None keeps what the sweep has."""

    looks: tuple[int, ...] | None = None
    """Numbers of seeds at which the questions are tested."""
    trials: int | None = None
    """The setting `sweep.trials`: an arm that searches one key gets half of it."""
    examples: int | None = None
    """Number of examples or blocks of a split on which a run is scored."""
    steps: int | None = None
    """Steps of a run."""
    minutes: float | None = None
    """The time to which the sweep is cut."""

    def find_settings(self, definition: Definition) -> dict[str, Any]:
        """Returns the settings of a sweep file that cut a sweep to this budget; arms may have numbers of their own."""
        confirm, data = definition.sweep_config.confirm, definition.arms[0].base.data
        settings: dict[str, Any] = {MINUTES_KEY: self.minutes, STEPS_KEY: self.steps, "sweep.trials": self.trials}
        if self.looks is not None:
            settings["confirm.seeds"] = self.looks[-1] if isinstance(confirm.seeds, int) else list(self.looks)
        if (examples := self.examples) is not None:
            settings |= {f"data.{key}": min(examples, getattr(data, key) or examples) for key in data.limit_keys}
        return {key: value for key, value in settings.items() if value is not None}

    def limit_trials(self, arm: Arm) -> int:
        if self.trials is None:
            return arm.trials
        return min(arm.trials, math.ceil(self.trials / 2) if searches_one_key(arm.space) else self.trials)

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
        arms = [definition.find_arm(name) for name in group.arms]
        arms, config = [replace(arm, trials=budget.limit_trials(arm)) for arm in arms], arms[0].base
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

    The next cut of `list_cuts` is always the one that saves most time for its loss, and time that is left goes into
    steps. The estimate assumes that no run stops early and all seeds are needed. `spent_s` is the time that loading and
    measuring have taken.

    Raises ConfigError if the smallest budget takes longer.
    """
    cuts, available_s = list_cuts(definition, rates), 60 * minutes - spent_s
    most, places = max(arm.base.num_steps for arm in definition.arms), dict.fromkeys(cuts, 0)

    def build(places: Mapping[str, int]) -> Budget:
        return Budget(minutes=minutes, **{name: cuts[name][place].value for name, place in places.items()})

    def estimate(budget: Budget) -> float:
        cost = estimate_cost(definition, rates, budget=budget, look=-1)
        return cost.low_s + find_empty_cost(definition.arms[0].base) * (cost.high_s - cost.low_s)

    def save_by_loss(name: str) -> float:
        added = cuts[name][places[name] + 1].loss - cuts[name][places[name]].loss
        return (estimate(build(places)) - estimate(build({**places, name: places[name] + 1}))) / added

    while estimate(build(places)) > available_s:
        if not (names := [name for name, place in places.items() if place + 1 < len(cuts[name])]):
            break
        places[max(names, key=save_by_loss)] += 1
    budget = build(places)
    given_up = {name: cuts[name][place].given_up for name, place in places.items() if place}
    if budget.steps is not None:
        longer = range(cuts["steps"][places["steps"] - 1].value or most, budget.steps, -2)
        fitting = (replace(budget, steps=steps) for steps in longer)
        budget = next((each for each in fitting if estimate(each) <= available_s), budget)
        given_up["steps"] = _describe_steps(budget.steps or most, most)
    seconds, lost = estimate(budget), "; ".join(given_up.values()) or "nothing is given up"
    # with room, because an earlier measurement may have named these minutes
    if seconds + spent_s > (1 + MINUTES_TOLERANCE) * 60 * minutes:
        raise ConfigError(
            f"`--minutes` must be at least {math.ceil((seconds + spent_s) / 60)} for this sweep on this machine, but "
            f"got {minutes:g}. That would give up: {lost}. What helps: shorter examples (`data.max_length`), "
            "fewer ranks, an arm less, or a smaller model."
        )
    about = "about " if seconds > available_s else ""
    return budget, f"within {about}{minutes:g} min: {lost}."


def _describe_steps(steps: int, most: int) -> str:
    return f"{steps:,} of {most:,} steps a run (the answers hold for shorter training)"


def list_cuts(definition: Definition, rates: Sequence[Rates]) -> dict[str, list[Cut]]:
    """Returns the cuts of each field of `Budget`, from none to the largest.

    The losses are judgements: seeds, trials and examples go before steps. Every arm and value stays, because a sweep
    without them does not answer its questions. A run keeps `MIN_STEPS`, and one epoch if it had as much.
    """
    looks = definition.sweep_config.confirm.list_looks()
    cuts = {each.name: [Cut(None, 0.0, "")] for each in fields(Budget) if each.name != "minutes"}

    def add(name: str, value: Any, loss: float, given_up: str) -> None:
        cuts[name].append(Cut(value, loss, given_up))

    fewer = [(looks[:end], float(len(looks) - end)) for end in range(len(looks) - 1, 0, -1)]
    fewer += [((MIN_SEEDS,), 4.0)] if looks and looks[0] > MIN_SEEDS else []
    for seeds, loss in fewer:
        add("looks", seeds, loss, f"at most {seeds[-1]} of {looks[-1]} seeds (small differences stay open)")
    largest = max(definition.arms, key=lambda arm: (arm.trials, not searches_one_key(arm.space)))
    unit, most = 2 if searches_one_key(largest.space) else 1, largest.trials
    least = min(MIN_TRIALS, most)
    for number, loss in {max(least, most * 3 // 4): 1.0, max(least, most // 2): 3.0, least: 6.0}.items():
        if number < most:
            given_up = f"{number} of {most} trials an arm (a better learning rate may be missed)"
            add("trials", unit * number, loss, given_up)
    most = max(size for group in rates for size in (*group.num_scored.values(), 0))
    most = most if definition.arms[0].base.data.limit_keys else 0
    for size in (most >> number for number in range(1, 20) if most >> number >= MIN_EXAMPLES):
        loss = 2.0 * math.log2(most / size) + 20.0 * MIN_EXAMPLES / size
        add("examples", size, loss, f"at most {size:,} of {most:,} scored examples (small differences stay open)")
    longest = max((arm.base for arm in definition.arms), key=lambda config: config.num_steps)
    steps = most = longest.num_steps
    epoch = math.ceil(max(group.num_train for group in rates) / longest.trainer.batch_size)
    least = max(MIN_STEPS, epoch if epoch <= most else 0)
    while steps > least:
        steps = max(least, 2 * (steps // 3))
        add("steps", steps, 10 * math.log2(most / steps), _describe_steps(steps, most))
    return cuts


def cut_sweep(definition: Definition, budget: Budget) -> Definition:
    """Returns a sweep whose arms have at most the numbers of a budget."""
    changes = budget.find_settings(definition)
    if budget.steps is not None:
        changes["trainer.eval_every_steps"] = choose_evaluation_interval(budget.steps)
    cut = definition.with_overrides(changes)
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
    return cut.with_overrides(corrections) if corrections else cut

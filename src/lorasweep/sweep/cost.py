"""Computes what a sweep costs, and which smaller numbers of trials, steps and seeds fit a time (`--minutes`).

A cost is computed from measured rates, without composing the sweep again, so that many numbers can be tried.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lorasweep.config.compose import choose_evaluation_interval
from lorasweep.config.run import STEPS_KEY, RunConfig
from lorasweep.config.sweep import RayWorkers
from lorasweep.errors import ConfigError
from lorasweep.record import RunRecord
from lorasweep.sweep.controller.proposals import find_batch_start
from lorasweep.sweep.controller.stopping import MIN_STEPS
from lorasweep.sweep.definition.arms import Arm, Definition, restore_definition, searches_one_key
from lorasweep.sweep.definition.confirm import count_confirm_runs

MIN_TRIALS = 6
"""Minimum number of trials of an arm under `--minutes`. Fewer are too few to search two decades of learning rates."""

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
    loading_s: float
    step_s: float
    step_tokens: float
    """Mean number of tokens of a run's step, without padding."""
    evaluation_s: float
    """Seconds of an evaluation of a run, and of writing weights and checkpoints after it."""
    final_s: float
    """Seconds of the evaluation on all validation examples at the end of a run; 0 if every evaluation is on all."""
    test_s: float
    """Seconds in which a confirm run is scored on test data; 0 without a confirm stage."""
    peak_memory_bytes: int
    record: RunRecord
    """Record of one of the measured runs."""
    kept_bytes: int
    """Size of the folder of that run."""
    trained_params: dict[str, int]
    """Trained parameters of the largest run of each arm, by name of the arm."""

    def estimate_run_s(self, num_steps: int, interval: int) -> float:
        """Returns the seconds of a training with an evaluation every `interval` steps."""
        num_evaluations = math.ceil(num_steps / interval) or 1
        return self.loading_s + num_steps * self.step_s + num_evaluations * self.evaluation_s + self.final_s


class Budget(NamedTuple):
    """The largest numbers that a sweep may have. None keeps what the sweep has."""

    trials: int | None = None
    """The setting `sweep.trials`: an arm that searches one key gets half of it."""
    steps: int | None = None
    """Steps of a run."""
    looks: tuple[int, ...] | None = None
    """Numbers of seeds at which the questions are tested."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a sweep file that cut a sweep to this budget."""
        looks = None if self.looks is None else list(self.looks)
        settings = {STEPS_KEY: self.steps, "sweep.trials": self.trials, "confirm.looks": looks}
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

    def describe_loss(self, definition: Definition) -> str:
        """Returns what a sweep gives up that is cut to this budget."""
        given_up, largest = [], find_largest_arm(definition)
        if self.looks is not None:
            most = definition.sweep_config.confirm.list_looks()[-1]
            given_up.append(f"at most {self.looks[-1]} of {most} seeds (small differences stay open)")
        if self.trials is not None:
            trials = f"{self.limit_trials(largest)} of {largest.trials} trials an arm"
            given_up.append(f"{trials} (a better learning rate may be missed)")
        if self.steps is not None:
            steps = f"{self.steps:,} of {count_most_steps(definition):,} steps a run"
            given_up.append(f"{steps} (the answers hold for shorter training)")
        return "; ".join(given_up) or "nothing is given up"


WHOLE = Budget()
"""The budget that cuts nothing."""


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
    low = high = confirm = 0.0
    for group in rates:
        arms = [definition.find_arm(name) for name in group.arms]
        run_s = group.estimate_run_s(*budget.limit_steps(arms[0].base))
        for arm in (replace(arm, trials=budget.limit_trials(arm)) for arm in arms):
            batches = Counter(find_batch_start(arm, number) for number in range(arm.trials))
            low += arm.trials / group.slots * run_s
            high += sum(math.ceil(size / group.slots) for size in batches.values()) * run_s
        num_runs = sum(count_confirm_runs(arm, seeds=seeds) for arm in arms)
        confirm += math.ceil(num_runs / group.slots) * run_s + num_runs * group.test_s
    return Cost(low, high, confirm)


def count_workers(definition: Definition) -> int:
    """Returns the number of workers that the sweep has from its start, as far as it is known."""
    config = definition.sweep_config.worker
    return config.num if isinstance(config, RayWorkers) and config.num != "auto" else 1


def fit_minutes(definition: Definition, rates: Sequence[Rates], minutes: float) -> tuple[Budget, str]:
    """Returns the largest budget with which a sweep ends within the minutes, and a sentence on what is given up.

    Seeds go first, then trials, then steps. The estimate assumes that no run stops early and all seeds are needed.

    Raises ConfigError if the smallest budget takes longer.
    """
    for budget in list_budgets(definition):
        seconds = estimate_cost(definition, rates, budget=budget, look=-1).high_s
        if seconds <= 60 * minutes:
            return budget, f"within {minutes:g} min: {budget.describe_loss(definition)}."
    if seconds <= (1 + MINUTES_TOLERANCE) * 60 * minutes:  # the least that an earlier measurement named
        return budget, f"within about {minutes:g} min: {budget.describe_loss(definition)}."
    seeds = "" if definition.sweep_config.confirm.list_looks() in ((), (3,)) else " or seeds (`confirm.seeds=3`)"
    raise ConfigError(
        f"`--minutes` must be at least {math.ceil(seconds / 60)} for this sweep on this machine, but got {minutes:g}. "
        f"What helps: fewer steps (`trainer.max_steps`), arms (`arms.full=null`), values of `confirm_each`{seeds}, "
        "shorter or fewer examples (`data.max_length`, `data.max_validation_examples`), and a smaller model."
    )


def list_budgets(definition: Definition) -> Iterator[Budget]:
    """Yields budgets from the whole sweep to the smallest."""
    looks, largest = definition.sweep_config.confirm.list_looks(), find_largest_arm(definition)
    unit = 2 if searches_one_key(largest.space) else 1
    steps = most_steps = count_most_steps(definition)
    while True:
        for part in (4, 3, 2):
            trials = max(min(MIN_TRIALS, largest.trials), largest.trials * part // 4)
            for last in range(len(looks), 0, -1) if looks else (0,):
                yield Budget(
                    trials=None if trials == largest.trials else unit * trials,
                    steps=None if steps == most_steps else steps,
                    looks=None if last == len(looks) else looks[:last],
                )
        if steps <= MIN_STEPS:
            return
        steps = 2 * (max(MIN_STEPS, steps // 2) // 2)


def find_largest_arm(definition: Definition) -> Arm:
    """Returns the arm with the most trials; one that searches several keys if there are several."""
    return max(definition.arms, key=lambda arm: (arm.trials, not searches_one_key(arm.space)))


def count_most_steps(definition: Definition) -> int:
    return max(arm.base.num_steps for arm in definition.arms)


def cut_sweep(definition: Definition, budget: Budget) -> Definition:
    """Returns a sweep whose arms have at most the numbers of a budget."""
    overrides = {**definition.raw["overrides"], **budget.settings}
    if budget.steps is not None:
        overrides["trainer.eval_every_steps"] = choose_evaluation_interval(budget.steps)
    cut = restore_definition({**definition.raw, "overrides": overrides}, source=definition.source)
    # the settings may raise the numbers of an arm that has smaller ones, and leave those that are typed for one arm
    corrections: dict[str, int] = {}
    for before, after in zip(definition.arms, cut.arms, strict=True):
        trials, (steps, interval) = budget.limit_trials(before), budget.limit_steps(before.base)
        if trials != after.trials:
            corrections[f"arms.{before.name}.trials"] = trials
        if steps != after.base.num_steps:
            corrections[f"arms.{before.name}.{STEPS_KEY}"] = steps
            corrections[f"arms.{before.name}.trainer.eval_every_steps"] = interval
    if not corrections:
        return cut
    return restore_definition({**definition.raw, "overrides": overrides | corrections}, source=definition.source)

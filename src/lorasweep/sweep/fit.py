"""Fits a sweep to a number of minutes (`--minutes`), with one measured training of each group of arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from lorasweep.errors import ConfigError
from lorasweep.sweep.checks import MIN_STEPS, NUM_EVALUATIONS, STEPS_KEY
from lorasweep.sweep.definition.arms import Definition, restore_definition
from lorasweep.sweep.definition.seeds import count_confirm_runs
from lorasweep.sweep.plan import GroupPlan, plan_sweep
from lorasweep.training.inputs import InputsCache
from lorasweep.wording import format_seconds

MIN_TRIALS = 6
"""Fewest trials of an arm. With fewer, the best learning rate of two decades is found by luck."""


class Budget(NamedTuple):
    """What a sweep costs most: trials of each arm, steps of each run, and the numbers of seeds at which it tests."""

    trials: int
    steps: int
    looks: tuple[int, ...]


def fit_minutes(
    definition: Definition, minutes: float, inputs_cache: InputsCache, *, on_progress: Callable[[str], None]
) -> tuple[Definition, list[GroupPlan], str]:
    """Returns a checked sweep that ends within the minutes, its measured trainings, and what the time gives up.

    The estimate prunes nothing and trains all seeds, so the sweep may end earlier.

    Raises:
        ConfigError: The smallest budget takes longer.
        RunError: A training failed, as it would in the sweep.
    """
    groups = plan_sweep(definition, inputs_cache, on_progress=on_progress)
    asked, seconds = _read_budget(definition), 0.0
    for budget in _list_budgets(asked):
        overrides = {**definition.raw["overrides"], **_list_overrides(budget, asked)}
        fitted = restore_definition({**definition.raw, "overrides": overrides}, source=definition.source)
        measured = [replace(one, arms=tuple(fitted.find_arm(arm.name) for arm in one.arms)) for one in groups]
        seconds = _estimate(fitted, measured)
        if seconds <= 60 * minutes:
            return fitted, measured, _describe(minutes, budget, asked)
    raise ConfigError(
        f"`--minutes` must be at least {math.ceil(seconds / 60)} for this sweep on this machine, but got {minutes:g}. "
        "Leave out an arm (`arms.full=null`), or take a smaller model or shorter texts."
    )


def _read_budget(definition: Definition) -> Budget:
    steps = max(arm.corner_configs[0].num_steps for arm in definition.arms)
    return Budget(max(arm.trials for arm in definition.arms), steps, definition.sweep_config.confirm.list_looks())


def _list_budgets(asked: Budget) -> Iterator[Budget]:
    """Yields budgets from the whole one to the smallest: fewer seeds first, then fewer trials, then shorter runs."""
    trials = [max(min(MIN_TRIALS, asked.trials), asked.trials * part // 4) for part in (4, 3, 2)]
    steps = asked.steps
    while True:
        for number in trials:
            for last in range(len(asked.looks), 0, -1) if asked.looks else (0,):
                yield Budget(number, steps, asked.looks[:last])
        if steps <= MIN_STEPS:
            return
        steps = NUM_EVALUATIONS * (max(MIN_STEPS, steps // 2) // NUM_EVALUATIONS)


def _list_overrides(budget: Budget, asked: Budget) -> dict[str, Any]:
    """Returns the settings that differ from those of the whole budget."""
    overrides: dict[str, Any] = {}
    if budget.trials != asked.trials:
        overrides["sweep.trials"] = budget.trials
    if budget.steps != asked.steps:
        overrides |= {STEPS_KEY: budget.steps, "trainer.eval_every_steps": budget.steps // NUM_EVALUATIONS}
    if budget.looks != asked.looks:
        overrides["confirm.looks"] = list(budget.looks)
    return overrides


def _estimate(definition: Definition, groups: list[GroupPlan]) -> float:
    runs = count_confirm_runs(definition, look=-1)
    return sum(
        group.estimate_search().high + group.estimate_confirm(sum(runs[a.name] for a in group.arms)) for group in groups
    )


def _describe(minutes: float, budget: Budget, asked: Budget) -> str:
    said = []
    if budget.looks != asked.looks:
        said.append(f"at most {budget.looks[-1]} of {asked.looks[-1]} seeds (small differences stay open)")
    if budget.trials != asked.trials:
        said.append(f"{budget.trials} of {asked.trials} trials an arm (a better learning rate may be missed)")
    if budget.steps != asked.steps:
        said.append(f"{budget.steps:,} of {asked.steps:,} steps a run (the answers hold for shorter training)")
    given_up = "; ".join(said) if said else "nothing is given up"
    return f"within {format_seconds(60 * minutes)}: {given_up}."

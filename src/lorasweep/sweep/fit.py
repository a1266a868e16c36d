"""Fits a sweep to a number of minutes (`--minutes`), with one measured training of each group of arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from lorasweep.config.compose import space_evaluations
from lorasweep.config.run import STEPS_KEY
from lorasweep.errors import ConfigError
from lorasweep.sweep.checks import MIN_STEPS
from lorasweep.sweep.definition.arms import Definition, restore_definition
from lorasweep.sweep.definition.confirm import count_confirm_runs
from lorasweep.sweep.plan import GroupPlan, plan_sweep
from lorasweep.training.inputs import InputsCache
from lorasweep.wording import join_words

MIN_TRIALS = 6
"""Fewest trials of an arm. With fewer, the best learning rate of two decades is found by luck."""


def fit_minutes(
    definition: Definition, minutes: float, inputs_cache: InputsCache, *, on_progress: Callable[[str], None]
) -> tuple[Definition, list[GroupPlan], str]:
    """Returns a checked sweep that ends within the minutes, its measured trainings, and what the time gives up.

    Seeds go first, then trials, then steps. The estimate prunes nothing and trains all seeds, so the sweep may end
    earlier.

    Raises ConfigError if the smallest budget takes longer, and the errors of `plan_sweep`.
    """
    groups, seconds = plan_sweep(definition, inputs_cache, on_progress=on_progress), 0.0
    most_trials = max(arm.trials for arm in definition.arms)
    most_steps = max(arm.corner_configs[0].num_steps for arm in definition.arms)
    all_looks = definition.sweep_config.confirm.list_looks()
    for steps, trials, looks in _list_budgets(most_steps, most_trials, all_looks):
        overrides, given_up = dict(definition.raw["overrides"]), []
        if looks != all_looks:
            overrides["confirm.looks"] = list(looks)
            given_up.append(f"at most {looks[-1]} of {all_looks[-1]} seeds (small differences stay open)")
        if trials != most_trials:
            overrides["sweep.trials"] = trials
            given_up.append(f"{trials} of {most_trials} trials an arm (a better learning rate may be missed)")
        if steps != most_steps:
            overrides |= {STEPS_KEY: steps, "trainer.eval_every_steps": space_evaluations(steps)}
            given_up.append(f"{steps:,} of {most_steps:,} steps a run (the answers hold for shorter training)")
        fitted = restore_definition({**definition.raw, "overrides": overrides}, source=definition.source)
        measured = [replace(one, arms=tuple(fitted.find_arm(arm.name) for arm in one.arms)) for one in groups]
        runs = count_confirm_runs(fitted, look=-1)
        confirm_s = (one.estimate_confirm(sum(runs[arm.name] for arm in one.arms)) for one in measured)
        seconds = sum(one.estimate_search().high for one in measured) + sum(confirm_s)
        if seconds <= 60 * minutes:
            return fitted, measured, f"within {minutes:g} min: {'; '.join(given_up) or 'nothing is given up'}."
    raise ConfigError(
        f"`--minutes` must be at least {math.ceil(seconds / 60)} for this sweep on this machine, but got {minutes:g}. "
        f"What helps: {join_words(list(_list_savings(definition)))}."
    )


def _list_savings(definition: Definition) -> Iterator[str]:
    """Yields the changes that shorten this sweep beyond the smallest budget."""
    looks, names = definition.sweep_config.confirm.list_looks(), [arm.name for arm in definition.arms]
    if "full" in names and len(names) > 1:
        yield "leave out an arm (`arms.full=null`)"
    yield from (f"fewer values of `{arm.confirm_each}`" for arm in definition.arms if arm.confirm_each)
    if looks and looks[0] > 1:
        yield f"fewer than {looks[0]} seeds (`confirm.seeds`)"
    fields = ("max_length", "block_length", "max_validation_examples", "max_validation_blocks")
    data = definition.arms[0].corner_configs[0].data
    yield from (f"a lower `data.{field}`" for field in fields if hasattr(data, field))
    yield "a smaller model"


def _list_budgets(steps: int, trials: int, looks: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yields numbers of steps, trials and looks, from the given ones to the smallest."""
    while True:
        for part in (4, 3, 2):
            for last in range(len(looks), 0, -1) if looks else (0,):
                yield steps, max(min(MIN_TRIALS, trials), trials * part // 4), looks[:last]
        if steps <= MIN_STEPS:
            return
        steps = 2 * (max(MIN_STEPS, steps // 2) // 2)

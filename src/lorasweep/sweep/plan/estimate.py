"""Adds up the measured parts of a sweep to its time, memory and disk."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorasweep.config.components import Component
from lorasweep.sweep.controller.stopping_rules import build_rule
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.seeds import count_confirm_runs
from lorasweep.sweep.definition.warnings import count_tokens
from lorasweep.sweep.plan.measure import GroupCost, SweepCost, TrainingCost


@dataclass(frozen=True)
class Seconds:
    """A range of time."""

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(factor * self.low, factor * self.high)


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """The estimated cost of one arm."""

    arm: Arm
    pack_size: int
    """Maximum number of trials that train together."""
    confirm_runs: int
    steps: int
    """Optimizer steps of all runs together, if no trial is pruned."""
    tokens: int
    """Maximum number of training tokens of all runs together, if no trial is pruned."""
    trainable_params: int
    kept_bytes: int
    """Size on disk of all runs."""
    memory_bytes: int
    """Largest memory of its trainings: allocated on the GPU, else resident in the process."""
    seconds: Seconds
    """Time of all runs. Arms that share packs divide the time by their numbers of runs."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The estimated cost of a sweep."""

    arms: tuple[ArmPlan, ...]
    stages: Mapping[str, Seconds]
    """Time of the start, of each stage and of the report."""
    host_bytes: int
    """Largest resident memory of the process."""
    largest_moment: str
    """The part of the sweep that needs this memory."""
    cost: SweepCost

    @property
    def total(self) -> Seconds:
        return sum(self.stages.values(), start=Seconds())


def estimate_sweep(definition: Definition, cost: SweepCost) -> SweepPlan:
    """Returns the cost of a checked sweep from its measured parts."""
    stages = {"start": Seconds(cost.start_s, cost.start_s)}
    confirm_runs = count_confirm_runs(definition)
    plans: dict[str, ArmPlan] = {}
    moments = {"the start": cost.start_bytes, "the report": cost.report_bytes}
    for group in cost.groups:
        times = estimate_group(group, definition)
        for stage, seconds in times.items():
            stages[stage] = stages.get(stage, Seconds()) + seconds
        runs = {arm.name: arm.trials + confirm_runs[arm.name] for arm in group.arms}
        for arm in group.arms:
            plans[arm.name] = ArmPlan(
                arm=arm,
                pack_size=group.slots,
                confirm_runs=confirm_runs[arm.name],
                steps=runs[arm.name] * group.large.config.num_steps,
                tokens=runs[arm.name] * count_tokens(group.large.config),
                trainable_params=group.large.trainable_params,
                kept_bytes=runs[arm.name] * group.large.kept_bytes,
                memory_bytes=max(group.small.memory_bytes, group.large.memory_bytes),
                seconds=sum(times.values(), start=Seconds()) * (runs[arm.name] / sum(runs.values())),
            )
        names = ", ".join(f"`{arm.name}`" for arm in group.arms)
        moments[f"the training of {names}"] = max(group.small.host_bytes, group.large.host_bytes)
    stages["report"] = Seconds(cost.report_s, cost.report_s)
    largest_moment = max(moments, key=lambda name: moments[name])
    return SweepPlan(
        arms=tuple(plans[arm.name] for arm in definition.arms),
        stages=stages,
        host_bytes=moments[largest_moment],
        largest_moment=largest_moment,
        cost=cost,
    )


def estimate_group(group: GroupCost, definition: Definition) -> dict[str, Seconds]:
    """Returns the time of each stage for arms that share packs, or for one arm whose trials run alone.

    The lower end: the stopping rule prunes all that its bounds allow, early stopping ends each run as soon as it may,
    and all slots are full. The upper end: no run ends early; or, if that takes longer, the rule prunes, and each trial
    beyond the first rung trains without others.
    """
    low, high = Price(group, "low"), Price(group, "high")
    parts, first = [part for arm in group.arms for part in list_parts(arm)], group.first_slots
    full_packs = sum(part.trials * low.of_part(part, slots=first) for part in parts)
    one_by_one = sum(part.trials * high.of_part(part, slots=1 if part.start else first) for part in parts)
    unpruned = high.of_runs(sum(arm.trials for arm in group.arms), slots=first)
    confirm_runs = count_confirm_runs(definition)
    count = sum(confirm_runs[arm.name] for arm in group.arms)
    confirm = Seconds(low.of_runs(count, slots=group.slots), high.of_runs(count, slots=group.slots))
    return {
        "search": Seconds(full_packs, max(unpruned, one_by_one)),
        "confirm": confirm + Seconds(low.of_scoring(), high.of_scoring()) * count,
    }


@dataclass(frozen=True, kw_only=True)
class Part:
    """A range of optimizer steps that the same number of trials train."""

    start: int
    stop: int
    """The last step; 0 under `method=frozen`."""
    trials: int


def list_parts(arm: Arm) -> list[Part]:
    """Returns the parts of an arm's search if the stopping rule prunes all that its bounds allow."""
    rule, config, trials = build_rule(arm), arm.corners[0], arm.trials
    steps, every = config.num_steps, config.trainer.eval_every_steps
    if isinstance(arm.sweep_config.pruner, Component) and every < steps:
        # a pruner of another package may prune at any evaluation
        return [Part(start=0, stop=every, trials=trials), Part(start=every, stop=steps, trials=1)]
    parts, start = [], 0
    for rung in rule.rungs:
        parts.append(Part(start=start, stop=rung, trials=trials))
        start, trials = rung, rule.count_kept([(float(n), 0.0, n) for n in range(trials)], all_arrived=True)
    return [*parts, Part(start=start, stop=steps, trials=trials)]


class Price:
    """The time of the trainings of a group, at the lower or at the upper end.

    The price of a pack with another number of slots than the two measured packs lies on the line through both. For an
    arm whose trials run alone, the lower end is the run with the least work, the upper end the run with the most work.
    """

    def __init__(self, group: GroupCost, end: Literal["low", "high"]) -> None:
        self._group, self._end = group, end
        is_packed = group.slots > 1
        self._small = group.small if is_packed or end == "low" else group.large
        self._large = group.large if is_packed or end == "high" else group.small
        config = self._small.config
        self._every, self._last_step = config.trainer.eval_every_steps, config.num_steps
        if end == "low" and config.trainer.early_stop_evaluations is not None:
            self._last_step = min(self._last_step, (config.trainer.early_stop_evaluations + 1) * self._every)

    def of_runs(self, num_runs: int, *, slots: int) -> float:
        """Returns the seconds of runs from their first to their last step, in packs with at most `slots` slots."""
        full_packs, rest = divmod(num_runs, slots)
        seconds = full_packs * self._of_training(0, self._last_step, slots=slots)
        return seconds + (self._of_training(0, self._last_step, slots=rest) if rest else 0.0)

    def of_part(self, part: Part, *, slots: int) -> float:
        """Returns one trial's share of the seconds of a part in a pack with `slots` slots."""
        stop = min(part.stop, self._last_step)
        return self._of_training(part.start, stop, slots=slots) / slots if stop > part.start or not part.stop else 0.0

    def of_scoring(self) -> float:
        """Returns the seconds to score one run on test data."""
        if not self._group.test_ratio:
            return 0.0
        evaluation_s = self._group.test_ratio * self._measure_evaluation(self._small)
        return self._small.loading_s + evaluation_s + self._group.answers_s

    def _of_training(self, start: int, stop: int, *, slots: int) -> float:
        num_evaluations = math.ceil(stop / self._every) - start // self._every if stop else 1
        return (
            self._at(slots, lambda cost: cost.loading_s)
            + self._at(slots, self._measure_step) * (stop - start)
            + self._at(slots, lambda cost: self._measure_evaluation(cost) + cost.saving_s) * num_evaluations
        )

    def _at(self, slots: int, measure: Callable[[TrainingCost], float]) -> float:
        small, large = measure(self._small), measure(self._large)
        if self._large.slots == self._small.slots:
            return large * slots / self._large.slots
        slope = (large - small) / (self._large.slots - self._small.slots)
        return max(0.0, small + slope * (slots - self._small.slots))

    def _measure_step(self, cost: TrainingCost) -> float:
        """Returns the shortest or the longest measured step that is no outlier.

        An outlier lies outside of the quartiles by more than their distance.
        """
        if len(cost.steps_s) < 2:
            return sum(cost.steps_s)
        first, _, third = statistics.quantiles(cost.steps_s, n=4, method="inclusive")
        if self._end == "low":
            return max(min(cost.steps_s), 2 * first - third)
        return min(max(cost.steps_s), 2 * third - first)

    def _measure_evaluation(self, cost: TrainingCost) -> float:
        return min(cost.evaluations_s) if self._end == "low" else max(cost.evaluations_s)

"""Replays stopping rules on complete learning curves (`benchmarks/curves/`) and names the cheapest within bounds.

    python benchmarks/bench_stopping.py [--json] [--curves FOLDER] [--draws 100]

A replay draws n trials of a task and seed at random and runs them like the controller: packs of 8 slots, all values
of an evaluation before any decision, freed slots refilled first with promoted trials, and with an adaptive sampler
only half of the trials before all of these have been compared at the first rung. It counts the optimizer steps as a
share of the steps of n complete trials. The loss is the final score of the winner, compared with the best final score
of the n trials, as a share of full fine-tuning's gain: the frozen base minus the best full run on this data and seed.
If full was not recorded, the best trial of the task replaces it.

It is chosen on all tasks except `e2e_nlg_lora`, for a search of one winner: the rule with the fewest steps among the
rules that meet the bounds below for every n. If no rule meets them, the rule must meet only the bounds on the loss.
Only rules that the product offers can be chosen: they compare trials by the metric or the loss of the weights. The
output also names the best of all rules. The product's default has one rung, at half of a run, because its search must
serve every rank (`bench_answers.py`).
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import math
import statistics
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

LAST = 12
"""Evaluations of a complete run; a rung is named by the number of its evaluation, so 6 is half of the run."""
NUM_SLOTS = 8
FIRST_PART_FRACTION = 0.5
"""Share of an arm's trials that an adaptive sampler proposes before all of these are compared at the first rung."""
LEFT_OUT = "e2e_nlg_lora"
"""The task that the choice ignores; this was decided before any curve was recorded."""
BOUNDS = {8: (0.60, 0.01, 0.05), 16: (0.40, 0.005, 0.02), 24: (0.40, 0.005, 0.02)}
"""For n trials: the largest share of the steps, median loss and 95th percentile of the loss, of the pooled tasks."""
MAXIMIZED = {"movie_snippets_lora"}
"""Tasks whose metric is better when larger: accuracy. Others are in bits per byte."""
FULL_OF = {"stdlib_docs_lora": "stdlib_docs_full", "stdlib_code_lora": "stdlib_code_full"}
"""The file with full fine-tuning on a task's data, which gives the gain."""
NOISE_SHARE = 1 / 3
"""Seed noise is the spread over seeds of a setting's final score, beside what a seed does to all settings alike, pooled
over this best share of the settings."""

Criterion = Literal["metric", "loss", "mean", "mean loss", "best", "best loss", "cooldown"]
"""The value by which trials are compared at a rung: metric or loss of the weights, of the mean weights, or of the
better of both, or the metric after a cooldown branch. The metric always picks the winner."""
CRITERION_NAMES: Mapping[Criterion, str] = {
    "metric": "",
    "loss": ", by loss",
    "mean": ", by mean weights",
    "mean loss": ", by loss of mean weights",
    "best": ", by better of weights and mean",
    "best loss": ", by lower loss of weights and mean",
    "cooldown": ", after cooldown",
}
LIKE_LOSS: Mapping[Criterion, Criterion] = {"loss": "metric", "mean loss": "mean", "best loss": "best"}


class StoppingRule(Protocol):
    """The interface of a rule in the replay; the product's rules satisfy it."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Evaluations at which trials are compared."""

    def __hash__(self) -> int:
        """Two rules are equal if their settings are."""


def load_product_rules() -> Any:
    """Returns the module of the product's stopping rules, without the package around it, which would import torch."""
    package = importlib.util.find_spec("lorasweep")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("`lorasweep` must be importable, but is not. Run `make` or set PYTHONPATH=src.")
    path = Path(package.submodule_search_locations[0]) / "sweep" / "controller" / "stopping_rules.py"
    spec = importlib.util.spec_from_file_location("stopping_rules", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the annotations of a class
    spec.loader.exec_module(module)
    return module


rules = load_product_rules()


@dataclass(frozen=True, kw_only=True)
class MedianOfPeers:
    """A trial continues if it is no worse than the median of all trials at the rung, including running trials.

    Optuna's MedianPruner compares with complete trials only, so in a pack, where all trials run at once, it never
    stops a trial.
    """

    rungs: tuple[int, ...]
    min_trials: int
    """Number of trials that must reach a rung before any trial continues, unless no further trial can reach it."""

    def count_kept(self, ranked: Sequence[tuple[float, float, int]], *, all_arrived: bool) -> int:
        if not ranked or (len(ranked) < self.min_trials and not all_arrived):
            return 0
        *median, _ = ranked[(len(ranked) - 1) // 2]  # without the number: equal trials continue together
        return bisect_right(ranked, median, key=lambda row: list(row[:-1]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Extrapolation:
    """A trial goes on while its extrapolated final value has a fair chance to beat the best one at the rung.

    Each curve up to the rung is fitted by least squares as a + b · t^-c for c = 0.25, 0.5, 1, 2 (t in evaluations,
    b >= 0) and extrapolated to the end; the prediction is normal, with the mean of the four ends and, as its variance,
    that of the four ends plus the mean squared residual. A trial whose prediction lies below that of the best with a
    probability of at least `least_probability` goes on.
    """

    rungs: tuple[int, ...]
    least_probability: float
    ends: Mapping[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    """Mean and variance of the predicted final value, by trial and rung."""

    def better_part(self, rung: int, values: Mapping[int, float]) -> frozenset[int]:
        """Returns the trials that may still become the best."""
        found = {number: self.ends[number, rung] for number in values}
        if not found:
            return frozenset()
        best = min(found, key=lambda number: (found[number][0], number))
        mean, variance = found[best]
        return frozenset(
            number
            for number, (own_mean, own_variance) in found.items()
            if number == best
            or normal_cdf((mean - own_mean) / math.sqrt(variance + own_variance + 1e-12)) >= self.least_probability
        )


def better_part(rule: Any, rung: int, values: Mapping[int, float], *, all_arrived: bool) -> frozenset[int]:
    """Returns the numbers of the trials that may go on beyond a rung, by a rule of the product or by extrapolation."""
    if isinstance(rule, Extrapolation):
        return rule.better_part(rung, values)
    ranked = sorted((value, number) for number, value in values.items())
    return frozenset(number for _, number in ranked[: rule.count_kept(ranked, all_arrived=all_arrived)])


def normal_cdf(z: float) -> float:
    """Returns the probability that a standard normal variable is below z."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def extrapolate(times: Sequence[int], values: Sequence[float], *, end: int = LAST) -> tuple[float, float]:
    """Returns mean and variance of a curve's predicted value at `end`; see `Extrapolation`."""
    t, y = np.asarray(times, float), np.asarray(values, float)
    ends, squares = [], []
    for exponent in (0.25, 0.5, 1.0, 2.0):
        shape = t**-exponent
        centred = shape - shape.mean()
        slope = max(float(centred @ (y - y.mean()) / (centred @ centred)), 0.0) if len(t) > 1 else 0.0
        offset = float(y.mean() - slope * shape.mean())
        ends.append(offset + slope * end**-exponent)
        squares.append(float(np.mean((y - offset - slope * shape) ** 2)))
    return float(np.mean(ends)), float(np.var(ends)) + float(np.mean(squares))


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One trial of one seed; signs are set so that lower is always better."""

    judged: Mapping[Criterion, Mapping[int, float]]
    """Value at each evaluation, by the name of the compared value, if it was recorded."""
    final: float
    """Score at the end under the linear schedule."""
    final_cooldown: float | None
    """Score at the end of the constant rate with a cooldown over the last twelfth; None if it was not recorded."""
    fails_at: int | None
    """The evaluation at which the trial failed with NaN."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskSeed:
    """All trials of a task trained with one seed."""

    task: str
    seed: int
    curves: tuple[Curve, ...]
    gain: float
    """Gain of full fine-tuning over the frozen base, in the task's metric, > 0."""
    noise: float
    """Standard deviation over seeds of the final score of a good setting."""
    is_grid: bool = False
    """Whether the trials are a grid, which is shown but not used for the choice."""

    @property
    def has_cooldowns(self) -> bool:
        """Whether the constant rate with cooldowns was recorded."""
        return all(curve.final_cooldown is not None for curve in self.curves)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A rule and the value that it compares."""

    name: str
    rule: StoppingRule
    criterion: Criterion = "metric"

    @property
    def is_offered(self) -> bool:
        """Whether the product offers it: its own rules, by the metric or the loss of the weights."""
        return self.criterion in ("metric", "loss") and not isinstance(self.rule, Extrapolation | MedianOfPeers)

    def fits(self, data: TaskSeed) -> bool:
        """Returns whether all values that the rule compares were recorded."""
        if self.criterion == "cooldown" and not data.has_cooldowns:
            return False
        return all(
            rung in curve.judged.get(self.criterion, {}) or curve.fails_at is not None
            for curve in data.curves
            for rung in self.rule.rungs
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one replay."""

    steps: int
    """Number of trained twelfths of a run, with branches."""
    complete: tuple[int, ...]
    """Numbers of the trials that were trained to the end, in the order of their numbers."""


class Arm:
    """One arm of n trials under a rule, as `sweep/controller/arm_trials.py` decides; see the module's docstring."""

    def __init__(
        self,
        values: Sequence[Mapping[int, float]],
        fails_at: Sequence[int | None],
        rule: StoppingRule,
        *,
        first_part: int,
        branch_steps: int = 0,
    ) -> None:
        """Takes each trial's value at each rung (lower is better), and the evaluation at which it fails or None."""
        self.values, self.fails_at, self.rule = values, fails_at, rule
        self.first_part = first_part
        self.branch_steps = branch_steps
        self.done: list[int] = []  # number of evaluations of each started trial
        self.states: list[str] = []
        self.waits_at: list[int] = []  # the rung at which each trial waits, else 0
        self.at: dict[int, dict[int, float]] = {rung: {} for rung in rule.rungs}
        self.steps = 0
        self._better_parts: dict[int, frozenset[int]] = {}

    def run(self, *, slots: int = NUM_SLOTS, shuffle: Callable[[list[int]], None] | None = None) -> Outcome:
        """Trains until no trial may continue.

        Args:
            slots: Size of the pack.
            shuffle: Permutes the pack's slots before they report, which must change nothing.
        """
        pack: list[int] = []
        while True:
            while len(pack) < slots and (trial := self._next()) is not None:
                pack.append(trial)
            if not pack:
                complete = tuple(n for n, state in enumerate(self.states) if state == "complete")
                return Outcome(steps=self.steps, complete=complete)
            if shuffle is not None:
                shuffle(pack)
            # No decision happens before the next rung or end of a trial, so all trials advance to it in one step.
            evaluations = min(self._evaluations_to_event(trial) for trial in pack)
            for trial in pack:
                self._advance(trial, evaluations)
            # Decisions below do not change which trials are the best part; only stored values do.
            self._better_parts.clear()
            for trial in pack:
                if self.states[trial] == "running" and (rung := self.waits_at[trial]):
                    if trial in self._better_part(rung):
                        self.waits_at[trial] = 0
                    else:
                        self.states[trial] = "paused"
            pack = [n for n in pack if self.states[n] == "running"]

    def _next(self) -> int | None:
        """Returns the paused trial at the highest rung whose best part includes it, else a new trial."""
        for rung in reversed(self.rule.rungs):
            paused = [n for n in self._better_part(rung) if self.states[n] == "paused" and self.waits_at[n] == rung]
            if paused:
                trial = min(paused, key=lambda n: (self.at[rung][n], n))
                self.states[trial], self.waits_at[trial] = "running", 0
                return trial
        begun = len(self.states)
        if begun == len(self.values) or (begun == self.first_part and self._waits_for_first_part()):
            return None
        self.done.append(0)
        self.states.append("running")
        self.waits_at.append(0)
        return begun

    def _waits_for_first_part(self) -> bool:
        first_rung = min(self.rule.rungs, default=LAST)
        return any(state == "running" and self.done[n] < first_rung for n, state in enumerate(self.states))

    def _evaluations_to_event(self, trial: int) -> int:
        done, fails_at = self.done[trial], self.fails_at[trial]
        events = [rung for rung in self.rule.rungs if rung > done] + [LAST if fails_at is None else fails_at]
        return min(events) - done

    def _advance(self, trial: int, evaluations: int) -> None:
        self.steps += evaluations
        self.done[trial] += evaluations
        evaluation = self.done[trial]
        if evaluation == self.fails_at[trial]:
            self.states[trial] = "failed"
            for values in self.at.values():
                values.pop(trial, None)
        elif evaluation == LAST:
            self.states[trial] = "complete"
        elif evaluation in self.at:
            self.at[evaluation][trial] = self.values[trial][evaluation]
            self.waits_at[trial] = evaluation
            self.steps += self.branch_steps

    def _better_part(self, rung: int) -> frozenset[int]:
        if rung not in self._better_parts:
            arrived = self._all_arrived(rung)
            self._better_parts[rung] = better_part(self.rule, rung, self.at[rung], all_arrived=arrived)
        return self._better_parts[rung]

    def _all_arrived(self, rung: int) -> bool:
        if len(self.states) < len(self.values):
            return False
        at = self.at[rung]
        return all(
            trial in at or state in ("complete", "failed") or self._stays_below(trial, rung)
            for trial, state in enumerate(self.states)
        )

    def _stays_below(self, trial: int, rung: int) -> bool:
        waits_at = self.waits_at[trial]
        return 0 < waits_at < rung and trial not in self._better_part(waits_at)


@dataclass(kw_only=True)
class Tally:
    """Results of a rule's replays on some tasks."""

    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Adds the results of other replays."""
        self.steps += other.steps
        self.losses += other.losses
        self.hits += other.hits

    def summary(self) -> dict[str, float]:
        """Returns the mean share of the steps, the quantiles of the loss and how often the best was found."""
        median, p95 = np.quantile(self.losses, [0.5, 0.95])
        return {
            "steps_fraction": round(statistics.fmean(self.steps), 4),
            "median_loss_fraction": round(float(median), 5),
            "p95_loss_fraction": round(float(p95), 5),
            "best_or_within_noise": round(statistics.fmean(self.hits), 4),
        }


def replay(candidate: Candidate, data: TaskSeed, *, n: int, draws: int, adaptive: bool = True) -> Tally:
    """Returns the results of a rule on `draws` random draws of n trials; every rule gets the same draws."""
    criterion = candidate.criterion
    if data.task not in MAXIMIZED:  # bits per byte are proportional to the loss, so both rank trials equally
        criterion = LIKE_LOSS.get(criterion, criterion)
    return _replay(candidate.rule, criterion, data, n=n, draws=draws, adaptive=adaptive)


@functools.cache
def _replay(asked: StoppingRule, criterion: Criterion, data: TaskSeed, *, n: int, draws: int, adaptive: bool) -> Tally:
    tally = Tally()
    random = np.random.default_rng([n, data.seed])
    first_part = math.ceil(FIRST_PART_FRACTION * n) if adaptive else n
    uses_cooldown = criterion == "cooldown"
    for _ in range(draws):
        drawn = random.choice(len(data.curves), size=n, replace=False)
        curves = [data.curves[i] for i in drawn]
        rule = asked
        if isinstance(rule, Extrapolation):
            predicted = {
                (number, rung): predict_end(curve, rung, criterion)
                for number, curve in enumerate(curves)
                for rung in rule.rungs
                if curve.fails_at is None or rung < curve.fails_at
            }
            rule = replace(rule, ends=predicted)
        arm = Arm(
            [curve.judged.get(criterion, {}) for curve in curves],
            [curve.fails_at for curve in curves],
            rule,
            first_part=first_part,
            branch_steps=int(uses_cooldown),
        )
        outcome = arm.run()
        finals = [_final(curve, uses_cooldown=uses_cooldown) for curve in curves]
        best = min(curve.final for curve in curves)
        chosen = min((finals[number] for number in outcome.complete), default=math.inf)
        loss = (chosen - best) / data.gain
        tally.steps.append(outcome.steps / (LAST * n))
        tally.losses.append(min(loss, 10.0))
        tally.hits.append(chosen - best <= data.noise)
    return tally


@functools.cache
def predict_end(curve: Curve, rung: int, criterion: Criterion) -> tuple[float, float]:
    """Returns mean and variance of the final value of a curve, predicted from its values up to a rung."""
    known = [(t, value) for t, value in sorted(curve.judged[criterion].items()) if t <= rung]
    return extrapolate([t for t, _ in known], [value for _, value in known])


def _final(curve: Curve, *, uses_cooldown: bool) -> float:
    return curve.final if not uses_cooldown or curve.final_cooldown is None else curve.final_cooldown


def candidates() -> list[Candidate]:
    """Returns the rules that are compared. Rungs are twelfths of a run."""
    found = [Candidate(name="none", rule=rules.StoppingRule())]

    def add(rungs: tuple[int, ...], factor: int, *, least: int = 1, criterion: Criterion = "metric") -> None:
        family = "cutoff" if len(rungs) == 1 else "halving"
        minimum = "" if least == 1 else f", at least {least}"
        name = f"{family} at {_name_rungs(rungs)}, best 1/{factor}{minimum}{CRITERION_NAMES[criterion]}"
        rule = rules.Halving(rungs=rungs, reduction_factor=factor, min_survivors=least)
        found.append(Candidate(name=name, rule=rule, criterion=criterion))

    rungs: tuple[int, ...]
    for rungs in ((6,), (8,)):
        for factor in (2, 3, 4):
            add(rungs, factor)
    for rungs in ((4, 8), (2, 4, 6, 8)):
        for factor in (2, 3):
            add(rungs, factor)
    for criterion in CRITERION_NAMES:
        for rung in (2, 4):
            for factor in (2, 3, 4):
                add((rung,), factor, criterion=criterion)
        for rungs in ((2, 4), (2, 6), (2, 4, 6)):
            for factor in (2, 3):
                add(rungs, factor, criterion=criterion)
        if criterion == "cooldown":
            continue
        for factor, least in ((4, 3), (4, 4)):
            add((2,), factor, least=least, criterion=criterion)
        for rungs in ((2, 4), (2, 6), (2, 4, 6)):
            for factor, least in ((2, 3), (2, 4), (3, 4)):
                add(rungs, factor, least=least, criterion=criterion)
    for rungs in ((2, 4, 6, 8), (4, 8)):
        name = f"median of peers at {_name_rungs(rungs)}"
        found.append(Candidate(name=name, rule=MedianOfPeers(rungs=rungs, min_trials=4)))
    for rungs, probability in (((2, 4, 6, 8), 0.05), ((4, 6, 8), 0.05), ((4, 6, 8), 0.2)):
        name = f"extrapolation at {_name_rungs(rungs)}, p >= {probability}"
        found.append(Candidate(name=name, rule=Extrapolation(rungs=rungs, least_probability=probability)))
    return found


def _name_rungs(rungs: Sequence[int]) -> str:
    return ", ".join(f"{rung}/{LAST}" for rung in rungs)


def read_curves(folder: Path) -> list[TaskSeed]:
    """Returns all tasks and seeds of a folder's CSV files.

    Raises:
        SystemExit: There is no curve.
    """
    rows: dict[tuple[str, str, int], list[dict[str, str]]] = defaultdict(list)
    for path in sorted(folder.glob("*.csv")):
        kind = next((kind for kind in ("grid", "cooldown") if path.stem.startswith(f"{kind}_")), "curves")
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                rows[kind, row["task"], int(row["seed"])].append(row)
    if not any(kind == "curves" for kind, _, _ in rows):
        raise SystemExit(f"{str(folder)!r} must hold learning curves, but has none. Record them as its README.md says.")
    noise = measure_noise(rows)
    gains = {(task, seed): measure_gain(of, task) for (kind, task, seed), of in rows.items() if kind == "curves"}
    data = []
    for (kind, task, seed), of in rows.items():
        if kind == "cooldown":
            continue
        curves = tuple(_curve(trial, task) for trial in _by_trial(of).values())
        if kind == "curves" and ("cooldown", task, seed) in rows:
            cooled = _by_trial(rows["cooldown", task, seed])
            curves = tuple(
                _with_cooldown(curve, cooled[number], task) for number, curve in zip(_by_trial(of), curves, strict=True)
            )
        gain = gains.get((FULL_OF.get(task, task), seed), gains.get((task, seed), 0.0))
        is_grid = kind == "grid"
        data.append(TaskSeed(task=task, seed=seed, curves=curves, gain=gain, noise=noise[task], is_grid=is_grid))
    return data


def measure_gain(rows: Sequence[Mapping[str, str]], task: str) -> float:
    """Returns the best trial's gain over the frozen base, in the task's metric."""
    frozen = next(_value(row, task) for row in rows if row["evaluation"] == "0")
    finals = [_value(row, task) for row in rows if row["evaluation"] == str(LAST)]
    return frozen - min(value for value in finals if math.isfinite(value))


def measure_noise(rows: Mapping[tuple[str, str, int], Sequence[Mapping[str, str]]]) -> dict[str, float]:
    """Returns by task a good setting's standard deviation over seeds, without effects common to all settings."""
    finals: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (kind, task, seed), of in rows.items():
        for row in of:
            if kind == "curves" and row["evaluation"] == str(LAST):
                value = _value(row, task)
                finals[task][row["trial"]][seed] = value if math.isfinite(value) else math.inf
    noise = {}
    for task, by_trial in finals.items():
        ordered = sorted(by_trial.values(), key=lambda values: statistics.fmean(values.values()))
        table = np.array([list(v.values()) for v in ordered[: math.ceil(NOISE_SHARE * len(ordered))]])
        settings, seeds = table.shape
        # An effect of a seed that is common to all settings does not change their order.
        rest = table - table.mean(0, keepdims=True) - table.mean(1, keepdims=True) + table.mean()
        freedom = (settings - 1) * (seeds - 1)
        noise[task] = math.sqrt(float((rest**2).sum()) / freedom) if freedom else 0.0
    return noise


def _by_trial(rows: Iterable[dict[str, str]]) -> dict[int, list[dict[str, str]]]:
    trials: dict[int, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if row["evaluation"] != "0":
            trials[int(row["trial"])].append(row)
    return trials


def _curve(rows: Sequence[Mapping[str, str]], task: str) -> Curve:
    values = {int(row["evaluation"]): _value(row, task) for row in rows}
    losses = {int(row["evaluation"]): float(row["val_loss"]) for row in rows}
    means = {int(row["evaluation"]): _value(row, task, "ema_value") for row in rows if row["ema_value"]}
    mean_losses = {int(row["evaluation"]): float(row["ema_loss"]) for row in rows if row["ema_loss"]}
    broken = [t for t in values if not (math.isfinite(values[t]) and math.isfinite(losses[t]))]
    judged: dict[Criterion, Mapping[int, float]] = {
        "metric": values,
        "loss": losses,
        "mean": means,
        "mean loss": mean_losses,
        "best": {t: min(mean, values[t]) for t, mean in means.items()},
        "best loss": {t: min(mean, losses[t]) for t, mean in mean_losses.items()},
    }
    fails_at = min(broken, default=None)
    final = math.inf if fails_at else values[LAST]
    return Curve(judged=judged, final=final, final_cooldown=None, fails_at=fails_at)


def _with_cooldown(curve: Curve, rows: Sequence[Mapping[str, str]], task: str) -> Curve:
    values = {int(row["evaluation"]): _value(row, task) for row in rows}
    return replace(curve, judged={**curve.judged, "cooldown": values}, final_cooldown=values[LAST - 1])


def _value(row: Mapping[str, str], task: str, column: str = "value") -> float:
    return (-1 if task in MAXIMIZED else 1) * float(row[column])


@dataclass(kw_only=True)
class Result:
    """A candidate's replays by n and task; seeds are pooled."""

    candidate: Candidate
    tallies: dict[int, dict[str, Tally]]

    def pooled(self, n: int, tasks: Iterable[str]) -> Tally:
        """Returns the replays of several tasks together."""
        tally = Tally()
        for task in tasks:
            tally.add(self.tallies[n][task])
        return tally

    def keeps(self, tasks: Sequence[str], *, steps_too: bool) -> bool:
        """Returns whether the bounds hold on the pooled tasks for every n."""
        for n, (most_steps, most_median, most_p95) in BOUNDS.items():
            found = self.pooled(n, tasks).summary()
            within = found["median_loss_fraction"] <= most_median and found["p95_loss_fraction"] <= most_p95
            if not within or (steps_too and found["steps_fraction"] > most_steps):
                return False
        return True

    def cost(self, tasks: Sequence[str]) -> float:
        """Returns the mean share of the steps over every n."""
        return statistics.fmean(self.pooled(n, tasks).summary()["steps_fraction"] for n in BOUNDS)


def choose_rule(results: Sequence[Result], tasks: Sequence[str]) -> tuple[Result, bool]:
    """Returns the rule that the module's docstring describes, and whether it keeps every bound."""
    complete = [result for result in results if all(task in of for of in result.tallies.values() for task in tasks)]
    within = [result for result in complete if result.keeps(tasks, steps_too=True)]
    lossless = [result for result in complete if result.keeps(tasks, steps_too=False)]
    return min(within or lossless, key=lambda result: result.cost(tasks)), bool(within)


def replay_all(data: Sequence[TaskSeed], *, draws: int, adaptive: bool = True) -> list[Result]:
    """Returns every candidate's replays on every task and seed with the values that it compares."""
    results = []
    by_task: dict[str, list[TaskSeed]] = defaultdict(list)
    for each in data:
        by_task[f"{each.task}, grid" if each.is_grid else each.task].append(each)
    for candidate in candidates():
        tallies: dict[int, dict[str, Tally]] = {n: {} for n in BOUNDS}
        for task, seeds in by_task.items():
            recorded = [each for each in seeds if candidate.fits(each)]
            for n in BOUNDS if recorded else ():
                tallies[n][task] = Tally()
                for each in recorded:
                    tallies[n][task].add(replay(candidate, each, n=n, draws=draws, adaptive=adaptive))
        results.append(Result(candidate=candidate, tallies=tallies))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--curves", type=Path, default=Path(__file__).parent / "curves", help="folder of the CSV files")
    parser.add_argument("--draws", type=int, default=100, help="random draws per task, seed and n")
    args = parser.parse_args()
    data = read_curves(args.curves)
    results = replay_all(data, draws=args.draws)
    tasks = sorted({each.task for each in data if not each.is_grid and each.task != LEFT_OUT})
    offered = [result for result in results if result.candidate.is_offered]
    default, keeps_all = choose_rule(offered, tasks)
    best, best_keeps_all = choose_rule(results, tasks)
    if args.json:
        print(json.dumps(as_json(results, tasks, default=default, best_of_all=best), indent=1))
        return
    show(data, results, tasks)
    print(f"\nDefault, of the rules that the product offers: {_describe_choice(default, keeps_all=keeps_all)}")
    show_tasks(data, default, tasks, draws=args.draws)
    for task in tasks:
        without = choose_rule(offered, [other for other in tasks if other != task])[0]
        print(f"Chosen without {task}: {without.candidate.name}")
    print(f"\nBest of all rules: {_describe_choice(best, keeps_all=best_keeps_all)}")
    show_tasks(data, best, tasks, draws=args.draws)


def as_json(results: Sequence[Result], tasks: Sequence[str], *, default: Result, best_of_all: Result) -> dict[str, Any]:
    """Returns the default and every rule, each with its results for every n."""

    def describe(result: Result) -> dict[str, Any]:
        known = [task for task in tasks if task in result.tallies[8]]
        own = {f"n{n}": result.pooled(n, known).summary() for n in BOUNDS}
        return {"rule": result.candidate.name, "is_offered": result.candidate.is_offered, **own}

    described = []
    for result in results:
        by_task = {
            task: {f"n{n}": result.tallies[n][task].summary() for n in BOUNDS} for task in sorted(result.tallies[8])
        }
        if by_task:
            described.append({**describe(result), "tasks": by_task})
    return {
        "default": describe(default),
        "best_of_all": describe(best_of_all),
        "left_out": LEFT_OUT,
        "rules": described,
    }


def show(data: Sequence[TaskSeed], results: Sequence[Result], tasks: Sequence[str]) -> None:
    """Prints the gains that losses are divided by, and a table of all rules."""
    for each in data:
        full = FULL_OF.get(each.task)
        of = "the best full run" if full or each.task.endswith("_full") else "the best trial, in place of full"
        label = f"{each.task}{', grid' if each.is_grid else ''}, seed {each.seed}"
        print(f"{label}: {len(each.curves)} trials; gain {each.gain:.4f} to {of}; seed noise {each.noise:.4f}")
    print("\nLosses in % of full's gain, pooled over all tasks but the one left out; rungs in twelfths of a run.")
    print("(m of k): the rule was replayed on m of the k tasks only; cooldowns were recorded for one seed.")
    columns = "steps  median    95th   best*"
    print(f"{'':74}" + "".join(f"{f'n = {n}':36}" for n in BOUNDS) + f"left out ({LEFT_OUT}), n = 16")
    print(f"{'rule':74}" + "".join(f"{columns:30}{'worst':6}" for _ in BOUNDS) + columns)
    for result in results:
        known = [task for task in tasks if task in result.tallies[8]]
        if not known:
            continue
        name = result.candidate.name + ("" if len(known) == len(tasks) else f" ({len(known)} of {len(tasks)})")
        line = f"{name:74}"
        for n in BOUNDS:
            worst = max(result.tallies[n][task].summary()["p95_loss_fraction"] for task in known)
            line += f"{_cells(result.pooled(n, known)):30}{100 * worst:5.1f} "
        left_out = result.tallies[16].get(LEFT_OUT)
        print(line + (_cells(left_out) if left_out else ""))
    print("* share of the replays that end with the best trial or one within seed noise of it; worst: the 95th")
    print("  percentile on the worst task.")


def show_tasks(data: Sequence[TaskSeed], result: Result, tasks: Sequence[str], *, draws: int) -> None:
    """Prints a rule's results by task, and its results if all trials start before any has ended."""
    print(f"{'':30}" + "".join(f"{f'n = {n}':32}" for n in BOUNDS))
    for task in sorted(result.tallies[8]):
        name = f"{task} (left out)" if task == LEFT_OUT else task
        print(f"{name:30}" + "".join(f"{_cells(result.tallies[n][task]):32}" for n in BOUNDS))
    print(f"{'pooled':30}" + "".join(f"{_cells(result.pooled(n, tasks)):32}" for n in BOUNDS))
    at_once = {n: Tally() for n in BOUNDS}
    for n, tally in at_once.items():
        for each in data:
            if each.task in tasks and not each.is_grid:
                tally.add(replay(result.candidate, each, n=n, draws=draws, adaptive=False))
    print(f"{'pooled, all begin at once':30}" + "".join(f"{_cells(at_once[n]):32}" for n in BOUNDS))


def _describe_choice(result: Result, *, keeps_all: bool) -> str:
    says = "the fewest steps of those that keep every bound"
    if not keeps_all:
        says = "none keeps every bound; the fewest steps of those that keep the losses"
    return f"{result.candidate.name} ({says})."


def _cells(tally: Tally) -> str:
    found = tally.summary()
    return (
        f"{100 * found['steps_fraction']:4.0f} % {100 * found['median_loss_fraction']:6.2f} "
        f"{100 * found['p95_loss_fraction']:7.2f} {100 * found['best_or_within_noise']:5.0f} %"
    )


if __name__ == "__main__":
    main()

"""Replays stopping rules on complete learning curves (`benchmarks/curves/`).

    python benchmarks/bench_stopping.py [--draws 100]

A replay draws n trials of a task and seed at random and runs them like the controller: packs of 8 slots, all values
of an evaluation before any decision, freed slots refilled first with promoted trials, and only half of the trials
before all of these have been compared at the first rung. It counts the optimizer steps as a share of the steps of n
complete trials. The loss is the final score of the winner, compared with the best final score of the n trials, as a
share of full fine-tuning's gain: the frozen base minus the best full run on this data and seed. If full was not
recorded, the best trial of the task replaces it.

The table pools all tasks except `e2e_nlg_lora`. `bench_answers.py` replays the same rules up to the verdicts.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lorasweep.sweep.controller.arm_trials import Halving, StoppingRule

LAST = 12
"""Evaluations of a complete run; a rung is named by the number of its evaluation, so 6 is half of the run."""
NUM_SLOTS = 8
FIRST_PART_FRACTION = 0.5
"""Share of an arm's trials that an adaptive sampler proposes before all of these are compared at the first rung."""
LEFT_OUT = "e2e_nlg_lora"
"""The task that is not pooled; this was decided before any curve was recorded."""
NUM_TRIALS = (8, 16, 24)
MAXIMIZED = {"movie_snippets_lora"}
"""Tasks whose metric is better when larger: accuracy. Others are in bits per byte."""
FULL_OF = {"stdlib_docs_lora": "stdlib_docs_full", "stdlib_code_lora": "stdlib_code_full"}
"""The file with full fine-tuning on a task's data, which gives the gain."""
NOISE_SHARE = 1 / 3
"""Seed noise is the spread over seeds of a setting's final score, beside what a seed does to all settings alike, pooled
over this best share of the settings."""
RULES: Mapping[str, StoppingRule] = {
    "none": StoppingRule(),
    "cutoff at 2, best 1/3": Halving(rungs=(2,), reduction_factor=3),
    "halving at 2, 6, best 1/2": Halving(rungs=(2, 6), reduction_factor=2),
    "cutoff at 6, best 1/2 (the default)": Halving(rungs=(6,), reduction_factor=2),
    "cutoff at 6, best 1/3": Halving(rungs=(6,), reduction_factor=3),
}
"""The compared rules by name."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One trial of one seed; signs are set so that lower is always better."""

    values: Mapping[int, float]
    """The metric at each evaluation."""
    fails_at: int | None
    """The evaluation at which the trial failed with NaN."""

    @property
    def final(self) -> float:
        return math.inf if self.fails_at else self.values[LAST]


@dataclass(frozen=True, kw_only=True)
class TaskSeed:
    """All trials of a task trained with one seed."""

    task: str
    seed: int
    curves: tuple[Curve, ...]
    gain: float
    """Gain of full fine-tuning over the frozen base, in the task's metric, > 0."""
    noise: float
    """Standard deviation over seeds of the final score of a good setting."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one replay."""

    steps: int
    """Number of trained twelfths of a run."""
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
    ) -> None:
        """Takes each trial's value at each rung (lower is better), and the evaluation at which it fails or None."""
        self.values, self.fails_at, self.rule = values, fails_at, rule
        self.first_part = first_part
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

    def _better_part(self, rung: int) -> frozenset[int]:
        if rung not in self._better_parts:
            arrived = self._all_arrived(rung)
            ranked = sorted((value, 0.0, number) for number, value in self.at[rung].items())
            kept = ranked[: self.rule.count_kept(ranked, all_arrived=arrived)]
            self._better_parts[rung] = frozenset(number for *_, number in kept)
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

    def show(self) -> str:
        """Returns the mean share of the steps, quantiles of the loss, and how often the best was found, in %."""
        median, p95 = np.quantile(self.losses, [0.5, 0.95])
        numbers = (statistics.fmean(self.steps), median, p95, statistics.fmean(self.hits))
        return "{:4.0f} {:7.2f} {:7.2f} {:5.0f}".format(*(100 * number for number in numbers))


def replay(rule: StoppingRule, data: TaskSeed, tally: Tally, *, n: int, draws: int) -> None:
    """Adds the results of a rule on `draws` random draws of n trials; every rule gets the same draws."""
    random = np.random.default_rng([n, data.seed])
    for _ in range(draws):
        curves = [data.curves[i] for i in random.choice(len(data.curves), size=n, replace=False)]
        values, fails_at = [curve.values for curve in curves], [curve.fails_at for curve in curves]
        outcome = Arm(values, fails_at, rule, first_part=math.ceil(FIRST_PART_FRACTION * n)).run()
        best = min(curve.final for curve in curves)
        chosen = min((curves[number].final for number in outcome.complete), default=math.inf)
        tally.steps.append(outcome.steps / (LAST * n))
        tally.losses.append(min((chosen - best) / data.gain, 10.0))
        tally.hits.append(chosen - best <= data.noise)


def read_curves(folder: Path) -> list[TaskSeed]:
    """Returns all tasks and seeds of a folder's CSV files."""
    rows: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    for path in sorted(folder.glob("*_seed?.csv")):
        if not path.stem.startswith("cooldown_"):
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    rows[row["task"], int(row["seed"])].append(row)
    noise = measure_noise(rows)
    gains = {(task, seed): measure_gain(of, task) for (task, seed), of in rows.items()}
    return [
        TaskSeed(
            task=task,
            seed=seed,
            curves=_read_trials(of, task),
            gain=gains.get((FULL_OF.get(task, task), seed), gains[task, seed]),
            noise=noise[task],
        )
        for (task, seed), of in rows.items()
    ]


def measure_gain(rows: Sequence[Mapping[str, str]], task: str) -> float:
    """Returns the best trial's gain over the frozen base, in the task's metric."""
    frozen = next(_value(row, task) for row in rows if row["evaluation"] == "0")
    finals = [_value(row, task) for row in rows if row["evaluation"] == str(LAST)]
    return frozen - min(value for value in finals if math.isfinite(value))


def measure_noise(rows: Mapping[tuple[str, int], Sequence[Mapping[str, str]]]) -> dict[str, float]:
    """Returns by task a good setting's standard deviation over seeds, without effects common to all settings."""
    finals: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (task, seed), of in rows.items():
        for row in of:
            if row["evaluation"] == str(LAST):
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


def _read_trials(rows: Sequence[Mapping[str, str]], task: str) -> tuple[Curve, ...]:
    trials: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        if row["evaluation"] != "0":
            trials[row["trial"]].append(row)
    curves = []
    for of in trials.values():
        values = {int(row["evaluation"]): _value(row, task) for row in of}
        losses = {int(row["evaluation"]): float(row["val_loss"]) for row in of}
        broken = [t for t in values if not (math.isfinite(values[t]) and math.isfinite(losses[t]))]
        curves.append(Curve(values=values, fails_at=min(broken, default=None)))
    return tuple(curves)


def _value(row: Mapping[str, str], task: str) -> float:
    return (-1 if task in MAXIMIZED else 1) * float(row["value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100, help="random draws per task, seed and n")
    draws = parser.parse_args().draws
    data = [each for each in read_curves(Path(__file__).parent / "curves") if each.task != LEFT_OUT]
    print("Steps, median and 95th percentile of the loss, best or within seed noise, in %; rungs in twelfths of a run.")
    print(f"{'rule':38}" + "".join(f"{f'n = {n}':30}" for n in NUM_TRIALS))
    for name, rule in RULES.items():
        cells = []
        for n in NUM_TRIALS:
            tally = Tally()
            for each in data:
                replay(rule, each, tally, n=n, draws=draws)
            cells.append(f"{tally.show():30}")
        print(f"{name:38}{''.join(cells)}")


if __name__ == "__main__":
    main()

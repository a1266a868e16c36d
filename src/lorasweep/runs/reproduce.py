"""Repeats a run from its record and compares it step by step (`lorasweep reproduce RUN`), and compares two sweeps."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lorasweep.config.compose import dotted_items
from lorasweep.config.redaction import HIDDEN
from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError, Diverged, RecordError
from lorasweep.models.attention import IMPLEMENTATIONS, AttentionChoice
from lorasweep.record import STEPS_FILE, RunRecord, SweepRecord, get_run_folder, read_run, read_steps, read_sweep
from lorasweep.training.components import EVENT_LOGGER
from lorasweep.training.inputs import RunInputs, build_inputs
from lorasweep.training.module import check_run
from lorasweep.training.restore import restore_config
from lorasweep.training.run import never_stop, train_run
from lorasweep.training.run_log import RunFolder
from lorasweep.wording import shorten

PACK_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Default tolerance for a run that was trained in a pack or by several processes. A run alone rounds sums differently.
The difference grows with the number of steps and with the learning rate. Over 60 steps of the embedded model it was at
most 2e-7 in fp32 and 2e-3 in bf16. At too high a learning rate (3e-2) it was 1e-5 and 2e-2."""

Verdict = Literal["identical", "within tolerance", "different", "interrupted"]
Values = Mapping[tuple[int, str], float | None]
"""Values by step and name (`loss`, `lr`, `validation loss`), in recorded order. None is NaN or infinite."""

POSSIBLE_REASONS = (
    *("data.train.fingerprint", "data.validation.fingerprint", "base.fingerprint"),
    # A pack adds in another order, which changes rounding. With `shared_draws`, its slots share the random numbers of
    # attention's dropout.
    *("pack.slots", "pack.shared_draws"),
    *("platform.precision", "platform.device", "platform.gpu", "platform.cuda", "platform.cudnn"),
    *("batching.micro_batches", "batching.attention.name", "packages.torch"),
    *("platform.processes", "platform.strategy", "platform.processor", "platform.instructions", "platform.threads"),
    *("platform.matmul_precision", "environment", "packages", "platform", "code"),
)
"""Parts of a run's record, outside its settings, that may change its losses, the most likely reason first."""
MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A recorded value that is missing or different in the repetition."""

    step: int
    name: str
    recorded: float | None
    repeated: float | None
    """None is NaN, infinite or missing."""

    @property
    def relative(self) -> float:
        """The difference divided by the larger value; infinite if a value is NaN, infinite or missing."""
        if self.recorded is None or self.repeated is None:
            return math.inf
        return abs(self.recorded - self.repeated) / max(abs(self.recorded), abs(self.repeated))

    def describe(self) -> str:
        """Returns a clause: `at step 3 loss was 1.5 and is 1.6 (a relative difference of 0.0625)`."""
        before, after = ("no finite number" if x is None else repr(x) for x in (self.recorded, self.repeated))
        clause = f"at step {self.step} {self.name} was {before} and is {after}"
        return f"{clause} (a relative difference of {self.relative:.2g})" if self.relative < math.inf else clause


@dataclass(frozen=True, kw_only=True, eq=False)
class Reproduction:
    """The comparison of a run with its repetition."""

    run: Path
    folder: Path
    """Folder of the repetition."""
    verdict: Verdict
    tolerance: float
    recorded: Values
    """The values of the run that were compared."""
    differences: tuple[Difference, ...]
    """The values that differ by any size, in recorded order."""
    other_weights: tuple[str, ...] = ()
    """Weight files that differ although every value of the log is the same."""
    reasons: tuple[str, ...] = ()
    """Clauses on hardware, software or data that may explain a difference, the most likely reason first."""
    failure: str | None = None
    """The error message if the repetition diverged."""

    @property
    def holds(self) -> bool:
        return self.verdict in ("identical", "within tolerance")

    def describe(self) -> str:
        """Returns the result in one line, and if it is different a line for each reason."""
        num_steps = sum(name == "loss" for _, name in self.recorded)
        num_evaluations = len({step for step, name in self.recorded if name.startswith("validation ")})
        compared = f"{num_steps} steps and {num_evaluations} evaluations of {self.run} and {self.folder}"
        if self.verdict == "interrupted":
            return f"interrupted: {self.folder} has the steps so far"
        if self.verdict == "identical":
            return f"identical: {compared} are the same, bit for bit"
        if self.verdict == "within tolerance":
            largest = max(self.differences, key=lambda difference: difference.relative, default=None)
            detail = f"the largest difference: {largest.describe()}" if largest else "weights differ in bits"
            return f"within a tolerance of {self.tolerance:g}: {compared}; {detail}"
        first = next((difference for difference in self.differences if difference.relative > self.tolerance), None)
        clauses = [f"every logged value is the same, but weights differ in {', '.join(self.other_weights)}"]
        if first is not None:
            clauses = [f"first {first.describe()}"]
        if self.failure is not None:
            clauses.append(f"it ended because {self.failure.rstrip('.')}")
        lines = [f"different: {'; '.join(clauses)}: {self.folder}", "no recorded hardware, software or data differs"]
        if self.reasons:
            reasons = (f"  {number}. {reason}" for number, reason in enumerate(self.reasons, start=1))
            lines[1:] = ["possible reasons, the most likely first:", *reasons]
        return "\n".join(lines)


def reproduce_run(
    run: Path,
    *,
    output: Path,
    tolerance: float | None = None,
    steps: int | None = None,
    stop_requested: Callable[[], bool] = never_stop,
) -> Reproduction:
    """Trains a run again, alone in one process, and compares both runs step by step.

    Args:
        run: The run's folder.
        output: A new folder for the repetition.
        tolerance: Largest relative difference that counts as the same. None means `PACK_TOLERANCE` for a run that was
            trained in a pack or by several processes, and 0 for any other.
        steps: Number of steps to train and compare. The schedule is still that of the whole run. None means
            all steps.
        stop_requested: Called after every step; returns whether to stop.

    Raises:
        RecordError: The run is missing, logged no step, held a secret in its settings, or has a damaged record.
        ConfigError: Model or data can't be loaded.
        OutOfMemory: The run does not fit in memory.
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"`0 <= --tolerance < 1` must hold, but got {tolerance!r}.")
    if steps is not None and steps < 1:
        raise ConfigError(f"`--steps >= 1` must hold, but got {steps!r}.")
    record = read_run(run)
    config = restore_solo_config(record)
    last_step = _last_step(record, run, steps=steps)
    if tolerance is None:
        is_alone = record.pack is None and "processes" not in record.platform
        tolerance = 0.0 if is_alone else PACK_TOLERANCE.get(record.platform.get("precision", ""), 0.0)
    failure, step = None, itertools.count()

    def is_done() -> bool:
        # `train_run` calls this before the first step and after every step. `trainer.max_steps` stays, because the
        # schedule depends on it.
        is_limit = next(step) >= last_step and last_step < record.steps_planned
        return is_limit or stop_requested()

    with _recorded_threads(record.platform.get("threads")):
        inputs = _build_inputs(config, record)
        check_run(config, inputs.base)
        try:
            train_run(config, RunFolder(path=output), inputs=inputs, stop_requested=is_done)
        except Diverged as error:
            failure = str(error)
    repeated, recorded = read_run(output), read_values(run, up_to=last_step)
    differences = list_differences(recorded, read_values(output))
    other_weights: tuple[str, ...] = ()
    if last_step == record.steps_planned and not differences:
        files = [name for name in record.files if name.endswith(".safetensors")]
        other_weights = tuple(name for name in files if record.files[name] != repeated.files.get(name))
    verdict: Verdict = "within tolerance"
    if repeated.status == "interrupted" and repeated.steps_done < last_step:
        verdict = "interrupted"
    elif any(difference.relative > tolerance for difference in differences) or (other_weights and not tolerance):
        verdict = "different"
    elif not differences and not other_weights:
        verdict = "identical"
    return Reproduction(
        run=run,
        folder=output,
        verdict=verdict,
        tolerance=tolerance,
        recorded=recorded,
        differences=tuple(differences),
        other_weights=other_weights,
        reasons=tuple(list_possible_reasons(record, repeated)) if verdict == "different" else (),
        failure=failure,
    )


def restore_solo_config(record: RunRecord) -> RunConfig:
    """Returns a run's settings for one process, with the recorded precision, device and micro-batches.

    A profiler, and loggers that may send metrics to a server, are removed. They do not affect training.

    Raises:
        RecordError: The settings or what the record says of the machine are damaged, or of another version.
    """
    config, platform = restore_config(record), record.platform
    trainer = {
        **record.config["trainer"],
        "precision": platform.get("precision", config.trainer.precision),
        "device": "auto" if platform.get("device") == "gpu" else "cpu",  # without a GPU, it is the first reason
        "accumulate": record.batching.get("micro_batches", config.trainer.accumulate),
        "strategy": "auto",
        "devices": 1,
        "num_nodes": 1,
        "progress": False,
        "profiler": None,
    }
    local = {name: record.config["logger"][name] for name, part in config.logger.items() if part.target == EVENT_LOGGER}
    # restored from mappings, so that the types of what was recorded are checked
    return restore_config(replace(record, config={**record.config, "trainer": trainer, "logger": local}))


def _last_step(record: RunRecord, run: Path, *, steps: int | None) -> int:
    """Returns the last step to train.

    Raises:
        RecordError: The run logged no step, its log is damaged, or its settings held a secret.
    """
    logged = read_values(run)
    if not logged:
        raise RecordError(
            f"a run must have logged a step to be repeated, but {str(run)!r} logged no step. Name another run."
        )
    if HIDDEN in str(record.config):
        raise RecordError(
            f"{str(run)!r} must have no secrets in its settings to be repeated, because its record does not keep them. "
            "Start it again using `lorasweep train`."
        )
    last_logged = max(step for step, _ in logged)
    if record.status == "complete" and last_logged < record.steps_done:
        raise RecordError(
            f"{str(run / STEPS_FILE)!r} must have all {record.steps_done} steps of the run, but is damaged after step "
            f"{last_logged}. Restore the file."
        )
    last = record.steps_planned if record.status == "complete" else last_logged
    return min(steps or last, last)


@contextmanager
def _recorded_threads(recorded: Any) -> Iterator[None]:
    """Sets torch's number of threads, on which the order of sums depends. Restores the number afterwards."""
    before = torch.get_num_threads()
    if type(recorded) is int and 1 <= recorded <= 4 * (os.cpu_count() or 1):
        torch.set_num_threads(recorded)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _build_inputs(config: RunConfig, record: RunRecord) -> RunInputs:
    """Returns base model and data, with the recorded implementation of attention."""
    attention = record.batching.get("attention")
    name = attention.get("name") if isinstance(attention, dict) else None
    if config.model.attention != "auto" or name not in IMPLEMENTATIONS:
        return build_inputs(config)
    inputs = build_inputs(replace(config, model=replace(config.model, attention=name)))
    return replace(inputs, attention=AttentionChoice(name, "as in the repeated run"))


def read_values(run: Path, *, up_to: int | None = None) -> Values:
    """Returns loss and learning rate of each step of a run, and every metric of each evaluation.

    Args:
        run: The run's folder.
        up_to: The last step to return; None returns all.
    """
    values: dict[tuple[int, str], float | None] = {}
    for row in read_steps(run):
        if up_to is not None and row["step"] > up_to:
            continue
        named: dict[str, Any] = {name: row[name] for name in ("loss", "lr") if name in row}
        named |= {f"validation {name}": value for name, value in row.get("validation", {}).items()}
        for name, value in named.items():
            values[row["step"], name] = float(value) if value is not None and math.isfinite(value) else None
    return values


def list_differences(recorded: Values, repeated: Values) -> list[Difference]:
    """Returns the values that differ, in recorded order. Values that only the repetition has are ignored."""
    return [
        Difference(step=step, name=name, recorded=value, repeated=repeated.get((step, name)))
        for (step, name), value in recorded.items()
        if repeated.get((step, name), MISSING) != value
    ]


def list_possible_reasons(recorded: RunRecord, repeated: RunRecord) -> list[str]:
    """Returns a clause for each part of the surroundings that differs, the most likely reason first."""
    before, after = _flatten_surroundings(recorded), _flatten_surroundings(repeated)
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    ordered = dict.fromkeys(
        name for part in POSSIBLE_REASONS for name in different if f"{name}.".startswith(f"{part}.")
    )
    return [f"`{name}` was {shorten(before.get(name))} and is {shorten(after.get(name))}" for name in ordered]


def _flatten_surroundings(record: RunRecord) -> dict[str, Any]:
    groups = {name: getattr(record, name) for name in {reason.partition(".")[0] for reason in POSSIBLE_REASONS}}
    return {name: value for name, value in dotted_items(groups) if not isinstance(value, Mapping)}


@dataclass(frozen=True, kw_only=True)
class SweepReproduction:
    """The comparison of a sweep with its repetition."""

    folder: Path
    """The new sweep's folder."""
    num_runs: int
    """Number of runs of all stages: trials, and runs of the confirm stage."""
    difference: str | None
    """The first difference in a clause: trial or run, step, key and both values."""

    @property
    def holds(self) -> bool:
        """Whether the two sweeps are identical."""
        return self.difference is None

    def describe(self) -> str:
        if self.difference is None:
            return f"identical: all {self.num_runs} runs, their decisions, losses and scores: {self.folder}"
        return f"different: {self.difference}: {self.folder}"


def compare_sweeps(first: Path, second: Path) -> SweepReproduction:
    """Compares proposals, decisions, losses of every step and scores of two sweeps, trial by trial.

    Args:
        first: Folder of the sweep that was reproduced.
        second: Folder of the new sweep.

    Raises:
        RecordError: A sweep has no record, or the record is damaged.
    """
    before, after = read_sweep(first), read_sweep(second)
    parts = zip(_list_parts(before, first), _list_parts(after, second), strict=False)
    difference = next(
        (
            f"{place} was {one.get(place, 'nothing')!r} and is {other.get(place, 'nothing')!r}"
            for one, other in parts
            for place in {**one, **other}
            if one.get(place, "nothing") != other.get(place, "nothing")
        ),
        None,
    )
    return SweepReproduction(folder=second, num_runs=len(before.trials) + len(before.confirm), difference=difference)


def _list_parts(record: SweepRecord, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the values that a repetition must have too, part by part. Each value has its place in words as key."""
    keys = ("metric", "direction", "confirm_seeds")
    yield {f"sweep: `{key}`": getattr(record, key) for key in keys}
    yield {f"{row.subject}: `{key}`": value for row in record.settings for key, value in row.params.items()}
    for name, rows in (("trials", record.trials), ("confirm runs", record.confirm)):
        yield {f"sweep: `number of {name}`": len(rows)}
        for row in rows:
            is_trial = row.stage == "search"
            where = f"trial {row.arm}-{row.number}" if is_trial else f"confirm run {row.subject} seed {row.seed}"
            yield {f"{where}: `{key}`": value for key, value in row.params.items()}
            logged = read_values(get_run_folder(folder, row.run))
            yield {f"{where}, step {step}: `{key}`": logged[step, key] for step, key in sorted(logged)}
            yield {f"{where}: `{key}`": getattr(row, key) for key in ("state", "value")}

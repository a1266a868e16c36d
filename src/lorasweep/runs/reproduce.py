"""Repetition of a run from its record, compared step by step: `lorasweep reproduce RUN`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lorasweep.config.build import convert
from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError, Diverged, RecordError
from lorasweep.models.attention import CANDIDATES, AttentionChoice
from lorasweep.record import RunRecord, read_run
from lorasweep.redaction import HIDDEN
from lorasweep.runs.compare_runs import Comparison, compare_values, explain, read_values
from lorasweep.training.components import EVENT_LOGGER
from lorasweep.training.inputs import RunInputs, build_inputs
from lorasweep.training.prepare import check_run
from lorasweep.training.restore import require_trusted_code, restore_config
from lorasweep.training.run import never_stop, train_run
from lorasweep.training.run_log import RunPlace

PACK_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Default tolerance for a run that was trained in a pack or by several processes: alone, its sums round otherwise.
Such a difference grows with the steps and with the learning rate. Over 60 steps of the embedded model the largest was
2e-7 in fp32 and 2e-3 in bf16; at a rate that is too high (3e-2) it was 1e-5 and 2e-2."""

Verdict = Literal["identical", "within tolerance", "different", "interrupted"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reproduction:
    """The comparison of a run with its repetition."""

    run: Path
    folder: Path
    """Folder of the repetition."""
    verdict: Verdict
    tolerance: float
    comparison: Comparison
    other_weights: tuple[str, ...] = ()
    """Files of weights that differ, although every value of the log is the same."""
    suspects: tuple[str, ...] = ()
    """Surroundings that may explain a difference, the most suspicious first."""
    failure: str | None = None
    """Why the repetition diverged, if it did."""

    @property
    def holds(self) -> bool:
        """Whether the repetition is identical or within the tolerance."""
        return self.verdict in ("identical", "within tolerance")

    def describe(self) -> str:
        """Returns the result in one line, and if it is different a line for each suspect."""
        found = self.comparison
        compared = f"{found.steps} steps and {found.evaluations} evaluations"
        if self.verdict == "interrupted":
            return f"interrupted: {self.folder} has what there is of it"
        if self.verdict == "identical":
            return f"identical: {compared} of {self.run} and {self.folder} are the same, bit for bit"
        if self.verdict == "within tolerance":
            most = f"the largest difference: {found.largest.describe()}" if found.largest else "weights differ in bits"
            return f"within a tolerance of {self.tolerance:g}: {compared} of {self.run} and {self.folder}; {most}"
        return "\n".join([f"different: {self._describe_difference()}", *self._describe_suspects()])

    def _describe_difference(self) -> str:
        found = self.comparison
        if found.first_beyond is None:
            return f"every value is the same, but not the weights in {', '.join(self.other_weights)}: {self.folder}"
        first, largest = found.first_beyond, found.largest
        told = [f"first {first.describe()}"]
        if largest is not None and first.relative < largest.relative:
            told.append(f"the largest {largest.describe()}")
        if self.failure is not None:
            told.append(f"it ended because {self.failure.rstrip('.')}")
        return f"{'; '.join(told)}: {self.folder}"

    def _describe_suspects(self) -> list[str]:
        if not self.suspects:
            return ["nothing in the recorded surroundings differs"]
        listed = [f"  {number}. {suspect}" for number, suspect in enumerate(self.suspects, start=1)]
        return ["possible reasons, the most suspicious first:", *listed]


def reproduce_run(
    run: Path,
    *,
    output: Path,
    tolerance: float | None = None,
    steps: int | None = None,
    trust: bool = False,
    stop_requested: Callable[[], bool] = never_stop,
) -> Reproduction:
    """Trains a run again, alone, and compares step by step.

    Args:
        run: Its folder.
        output: A new folder for the repetition.
        tolerance: Largest relative difference that still counts as the same. None means `PACK_TOLERANCE` for a run that
            was trained in a pack or by several processes, and 0 for any other.
        steps: Number of steps to compare; the schedule stays that of all steps. None compares all.
        trust: Whether code and pickles that the record names may be run.
        stop_requested: Called after every step; returns whether to stop.

    Raises:
        RecordError: There is no such run, it logged no step, or its record is damaged.
        ConfigError: It needs `trust`, or model or data can't be loaded.
        OutOfMemory: It does not fit in memory.
    """
    _check_request(tolerance, steps)
    record = read_run(run)
    config = config_as_run(record)
    require_trusted_code(config, trust=trust, option="--trust")
    limit = _last_step(record, run, steps=steps)
    recorded = read_values(run, up_to=limit)
    if tolerance is None:
        alone = record.pack is None and "processes" not in record.platform
        tolerance = 0.0 if alone else PACK_TOLERANCE.get(record.platform.get("precision", ""), 0.0)
    stop = _StepLimit(limit, stop_requested)
    with _recorded_threads(record.platform.get("threads")):
        inputs = _build_inputs(config, record)
        check_run(config, inputs.base)
        failure = _train(config, output, inputs=inputs, stop=stop)
    repeated = read_run(output)
    comparison = compare_values(recorded, read_values(output), tolerance=tolerance)
    if repeated.status == "interrupted" and not stop.reached:
        return Reproduction(run=run, folder=output, verdict="interrupted", tolerance=tolerance, comparison=comparison)
    weights = _other_weights(record, repeated) if limit is None and comparison.first is None else ()
    verdict = _judge(comparison, weights, tolerance=tolerance)
    return Reproduction(
        run=run,
        folder=output,
        verdict=verdict,
        tolerance=tolerance,
        comparison=comparison,
        other_weights=weights,
        suspects=tuple(explain(record, repeated)) if verdict == "different" else (),
        failure=failure,
    )


def config_as_run(record: RunRecord) -> RunConfig:
    """Returns a run's settings for one process, with the recorded values of precision, device and micro-batches.

    Without loggers that may send metrics elsewhere, and without a profiler: they do not change the training.

    Raises:
        RecordError: The settings are damaged or of another version.
        ConfigError: The number of micro-batches is not one.
    """
    config, platform = restore_config(record), record.platform
    micro_batches = record.batching.get("micro_batches", config.trainer.accumulate)
    on_gpu = platform.get("device", "gpu" if platform.get("gpu") else "cpu") == "gpu"
    trainer = replace(
        config.trainer,
        precision=platform.get("precision", config.trainer.precision),
        device="auto" if on_gpu else "cpu",  # on a machine without a GPU the device becomes the first suspect
        accumulate=convert(int | Literal["auto"], micro_batches, key="batching.micro_batches"),
        strategy="auto",
        devices=1,
        num_nodes=1,
        progress=False,
        profiler=None,
    )
    local = {name: part for name, part in config.logger.items() if part.target == EVENT_LOGGER}
    return replace(config, trainer=trainer, logger=local)


class _StepLimit:
    """A `stop_requested` that also stops after a number of steps. It is called once after every step."""

    def __init__(self, steps: int | None, stop_requested: Callable[[], bool]) -> None:
        self.steps = steps
        self.stop_requested = stop_requested
        self.done = 0

    @property
    def reached(self) -> bool:
        return self.steps is not None and self.done >= self.steps

    def __call__(self) -> bool:
        self.done += 1
        return self.reached or self.stop_requested()


def _check_request(tolerance: float | None, steps: int | None) -> None:
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"`0 <= --tolerance < 1` must hold, but got {tolerance!r}.")
    if steps is not None and steps < 1:
        raise ConfigError(f"`--steps >= 1` must hold, but got {steps!r}.")


def _last_step(record: RunRecord, run: Path, *, steps: int | None) -> int | None:
    """Returns the last step to train; None trains all.

    Raises:
        RecordError: The run logged no step, or its settings held a secret.
    """
    logged = read_values(run)
    if not logged:
        raise RecordError(f"a run must have logged a step to be repeated, but {str(run)!r} has none. Name another run.")
    if HIDDEN in str(record.config):
        raise RecordError(
            f"{str(run)!r} must have been run without secrets in its settings to be repeated from its record, "
            "which does not keep them. Start it again by `lorasweep train`."
        )
    whole = record.steps_planned if record.status == "complete" else max(step for step, _ in logged)
    last = whole if steps is None else min(steps, whole)
    return None if last >= record.steps_planned else last


@contextmanager
def _recorded_threads(recorded: Any) -> Iterator[None]:
    """Sets torch's number of threads to the recorded one, because sums are split by thread; restores it afterwards."""
    before = torch.get_num_threads()
    if isinstance(recorded, int) and 1 <= recorded <= 4 * (os.cpu_count() or 1):
        torch.set_num_threads(recorded)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _build_inputs(config: RunConfig, record: RunRecord) -> RunInputs:
    """Returns base model and data, with the recorded implementation of attention."""
    name = (record.batching.get("attention") or {}).get("name")
    if config.model.attention != "auto" or name not in CANDIDATES:
        return build_inputs(config)
    inputs = build_inputs(replace(config, model=replace(config.model, attention=name)))
    return replace(inputs, attention=AttentionChoice(name, "as in the run that is repeated"))


def _train(config: RunConfig, output: Path, *, inputs: RunInputs, stop: Callable[[], bool]) -> str | None:
    """Trains, and returns the reason if the run diverged."""
    try:
        train_run(config, RunPlace(folder=output), inputs=inputs, stop_requested=stop)
    except Diverged as error:
        return str(error)
    return None


def _other_weights(record: RunRecord, repeated: RunRecord) -> tuple[str, ...]:
    names = [name for name in record.files if name.endswith(".safetensors")]
    return tuple(name for name in names if record.files[name] != repeated.files.get(name))


def _judge(comparison: Comparison, weights: tuple[str, ...], *, tolerance: float) -> Verdict:
    if comparison.first_beyond is not None or (weights and not tolerance):
        return "different"
    return "identical" if comparison.first is None and not weights else "within tolerance"

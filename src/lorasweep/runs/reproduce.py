"""Trains a run again and compares it step by step (`lorasweep reproduce RUN`)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas
import torch

from lorasweep.config.build import flatten
from lorasweep.config.redaction import HIDDEN
from lorasweep.config.run import RunConfig
from lorasweep.disk import claim_folder, numbered_folders
from lorasweep.errors import ConfigError, Diverged, RecordError
from lorasweep.models.attention import IMPLEMENTATIONS
from lorasweep.record import (
    STEPS_FILE,
    RunRecord,
    is_number,
    read_run,
    read_steps,
    restore_config,
)
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.prepare import check_run
from lorasweep.training.run import train_alone
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.stop_signal import StopSignal
from lorasweep.wording import ABSENT, shorten

PACK_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Default tolerance for a run that was trained in a pack or by several processes. A run alone rounds sums differently.
The difference grows with the number of steps and with the learning rate. Over 60 steps of the embedded model it was at
most 2e-7 in fp32 and 2e-3 in bf16. At too high a learning rate (3e-2) it was 1e-5 and 2e-2."""
COMPARED_PARTS = ("data", "base", "pack", "batching", "platform", "packages", "environment", "code")
"""Parts of a run's record, outside its settings, whose differences are listed if the losses differ."""
Match = Literal["identical", "within tolerance", "different", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """The comparison of a run with its repetition."""

    folder: Path
    """Folder of the repetition."""
    verdict: Match
    description: str
    """The first line names the compared values, and their first or largest difference. Others compare the records."""

    @property
    def holds(self) -> bool:
        return self.verdict in ("identical", "within tolerance")


def reproduce_run(
    run: str | Path,
    *,
    output: str | Path | None = None,
    tolerance: float | None = None,
    steps: int | None = None,
) -> Reproduction:
    """Trains a run again, alone in one process, and compares both runs step by step.

    >>> lorasweep.reproduce_run("outputs/tiny/runs/lora-0000", tolerance=0.1).holds
    True

    Args:
        run: The run's folder.
        output: A new folder for the repetition, by default the next free `outputs/reproduce/NAME`.
        tolerance: Largest relative difference that counts as the same. None means `PACK_TOLERANCE` for a run that was
            trained in a pack or by several processes, else 0. With 0 and all steps, the weights must be equal too.
        steps: Number of steps to train and compare; None means all. The schedule is still that of the whole run.

    Raises:
        RecordError: The run is missing, logged no step, held a secret in its settings, or has a damaged record.
        ConfigError: An argument is wrong, or model or data can't be loaded.
        OutOfMemory: The run does not fit in memory.
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"`0 <= --tolerance < 1` must hold, but got {tolerance!r}.")
    if steps is not None and steps < 1:
        raise ConfigError(f"`--steps >= 1` must hold, but got {steps!r}.")
    run, wanted = Path(run), None if output is None else Path(output)
    record = read_run(run)
    config, platform = restore_solo_config(record), record.platform
    last_step = min(steps or record.steps_planned, _find_last_step(record, run))
    if tolerance is None:
        is_alone = record.pack is None and "processes" not in platform
        tolerance = 0.0 if is_alone else PACK_TOLERANCE.get(platform.get("precision", ""), 0.0)
    threads = platform.get("threads", 0)
    if 1 <= threads <= 4 * (os.cpu_count() or 1):
        torch.set_num_threads(threads)  # the order of sums depends on it
    inputs = load_inputs(config)
    check_run(config, inputs.base)
    folders = numbered_folders(Path("outputs") / "reproduce" / run.resolve().name)
    with StopSignal() as stop, claim_folder(wanted, otherwise=folders, key="--output") as folder:
        failure = _train_again(config, folder, inputs, last_step=last_step, stop_requested=stop)
    repeated = read_run(folder)
    if repeated.status == "interrupted" and repeated.steps_done < last_step:
        description = f"interrupted: {folder} has the steps so far"
        return Reproduction(folder=folder, verdict="interrupted", description=description)
    before, after = _read_values(run, up_to=last_step), _read_values(folder)
    if last_step == record.steps_planned and not tolerance:
        before, after = before | _list_weights(record), after | _list_weights(repeated)
    differences = _find_differences(before, {place: value for place, value in after.items() if place in before})
    what, said = f"{last_step} steps of {run} and {folder}", _describe_differences(differences)
    if not said:
        return Reproduction(
            folder=folder, verdict="identical", description=f"identical: {what} are the same, bit for bit"
        )
    if (differences["relative"] <= tolerance).all():
        largest = said[int(differences["relative"].argmax())]
        description = f"within a tolerance of {tolerance:g}: {what}; the largest difference: {largest}"
        return Reproduction(folder=folder, verdict="within tolerance", description=description)
    first = said[int((differences["relative"] > tolerance).argmax())]
    parts = (flatten({part: getattr(run, part) for part in COMPARED_PARTS}) for run in (record, repeated))
    named = ({f"  `{key}`": value for key, value in part.items()} for part in parts)
    of_records = _describe_differences(_find_differences(*named))
    lead = "the records differ in:" if of_records else "no recorded hardware, software or data differs"
    description = "\n".join([f"different in {folder}: first {first}{failure}", lead, *of_records])
    return Reproduction(folder=folder, verdict="different", description=description)


def _train_again(
    config: RunConfig, folder: Path, inputs: RunInputs, *, last_step: int, stop_requested: Callable[[], bool]
) -> str:
    """Trains up to `last_step`. Returns a clause on the error if the run diverged, else an empty text."""
    step = itertools.count()

    def is_done() -> bool:  # called before the first step and after every step
        # `trainer.max_steps` stays, because the schedule depends on it
        is_limit = next(step) >= last_step and last_step < config.num_steps
        return is_limit or stop_requested()

    try:
        prepared = inputs.prepare(config, folder=folder)
        train_alone(config, RunFolder(path=folder), inputs=prepared, stop_requested=is_done)
    except Diverged as error:
        return f"; it ended because {error}".rstrip(".")
    return ""


def restore_solo_config(record: RunRecord) -> RunConfig:
    """Returns a run's settings for one process, with the recorded precision, device, micro-batches and attention.

    Loggers are removed: they may write to other folders, or to a server, and do not affect training. Raises RecordError
    if the recorded settings or machine are damaged, or of another version.
    """
    config, platform = restore_config(record), record.platform
    trainer = {
        **record.config["trainer"],
        "precision": platform.get("precision", config.trainer.precision),
        "device": "auto" if platform.get("device") == "gpu" else "cpu",  # a GPU may be missing now
        "accumulate": record.batching.get("micro_batches", config.trainer.accumulate),
        "strategy": "auto",
        "devices": 1,
        "num_nodes": 1,
        "progress": False,
    }
    # restored from mappings, so that the types of the recorded values are checked
    config = restore_config(replace(record, config={**record.config, "trainer": trainer, "logger": {}}))
    chosen = record.batching.get("attention")
    attention = chosen.get("name") if isinstance(chosen, dict) else None
    if config.model.attention == "auto" and attention in IMPLEMENTATIONS:
        return replace(config, model=replace(config.model, attention=attention))
    return config


def _find_last_step(record: RunRecord, run: Path) -> int:
    """Returns the last step to repeat. Raises RecordError if none was logged, or the run can't be repeated."""
    last_logged = max((row["step"] for row in read_steps(run)), default=0)
    if not last_logged:
        raise RecordError(
            f"a run must have logged a step to be repeated, but {str(run)!r} logged no step. Name another run."
        )
    if HIDDEN in str(record.config):
        raise RecordError(
            f"{str(run)!r} must have no secrets in its settings to be repeated, because its record does not keep them. "
            "Start it again using `lorasweep train`."
        )
    if record.status == "complete" and last_logged < record.steps_done:
        raise RecordError(
            f"{str(run / STEPS_FILE)!r} must have all {record.steps_done} steps of the run, but is damaged after step "
            f"{last_logged}. Restore the file."
        )
    return record.steps_planned if record.status == "complete" else last_logged


def _read_values(run: Path, *, up_to: float = math.inf) -> dict[str, Any]:
    """Returns loss and learning rate of each step of a run, and every metric of each evaluation.

    Keys say where a value is: "step 3: `loss`". NaN and infinite values are None. Steps after `up_to` are skipped.
    """
    values: dict[str, Any] = {}
    for row in read_steps(run):
        named: dict[str, Any] = {name: row[name] for name in ("loss", "lr") if name in row}
        named |= {f"validation {name}": value for name, value in row.get("validation", {}).items()}
        if row["step"] <= up_to:
            values |= {f"step {row['step']}: `{name}`": value for name, value in named.items()}
    return values


def _list_weights(record: RunRecord) -> dict[str, Any]:
    files = {name: kept for name, kept in record.files.items() if name.endswith(".safetensors")}
    return {f"weights in {name}: `sha256`": kept.get("sha256") for name, kept in files.items()}


def _find_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> pandas.DataFrame:
    """Returns the values that differ as a table: `was`, `is`, and `relative`, which is infinite if one is no number."""
    places = list({**before, **after})
    pairs = [(before.get(place, ABSENT), after.get(place, ABSENT)) for place in places]
    table = pandas.DataFrame(pairs, index=places, columns=["was", "is"], dtype=object)
    numbers = table.map(lambda value: float(value) if is_number(value) else math.nan)
    relative = (numbers["was"] - numbers["is"]).abs() / numbers.abs().max(axis=1)
    return table.assign(relative=relative.fillna(math.inf))[[was != now for was, now in pairs]]


def _describe_differences(table: pandas.DataFrame) -> list[str]:
    """Returns a clause for each row of `_find_differences`."""
    return [
        f"{place} was {shorten(was)} and is {shorten(now)}"
        + (f" (a relative difference of {relative:.2g})" if relative < math.inf else "")
        for place, was, now, relative in table.itertuples()
    ]

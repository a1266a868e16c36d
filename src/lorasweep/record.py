"""Records of runs and sweeps on disk: `run.json` and `sweep.json`, each written whole and without secrets.

The classes below define the format of the files. Reading a record runs no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lorasweep.config.data import Direction
from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError
from lorasweep.redaction import redact
from lorasweep.wording import format_setting, short_key, shorten

RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
TEST_SCORES_FILE = "test_scores.csv"
SWEEP_FILE = "sweep.json"
PATCH_FILE = "code.patch"
VERSION = 1
"""Version of the format. Records of another version are refused."""
MAX_NESTING = 50
"""Lists and mappings inside each other. A deeper record is refused: its readers call themselves once per level."""

RunStatus = Literal["running", "complete", "paused", "pruned", "failed", "infeasible", "interrupted"]
"""`paused`: the run stopped at an evaluation and may continue from its checkpoint. `pruned`: the run was paused and the
sweep ended. `infeasible`: the run does not fit in memory."""
TrialState = Literal["running", "paused", "complete", "pruned", "failed", "infeasible"]
QuestionName = Literal["as_good_as_full", "smallest", "pair"]
ConfirmState = Literal["running", "complete", "failed", "infeasible"]


@dataclass(kw_only=True)
class RunRecord:
    """Settings, environment and results of one run: enough to repeat and check it."""

    format: str = "lorasweep.run"
    version: int = VERSION
    status: RunStatus
    reason: str | None = None
    """Why the run failed or stopped before its last step."""
    config: dict[str, Any]
    """The resolved `RunConfig`, nested."""
    arm: str | None = None
    trial: int | None = None
    """Number of the trial in its arm, also if the run trains that trial again; null for a single run."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the settings of a single run come from (`lorasweep train --from`): `sweep` (its folder), `name`, `arm` and
    `trial`. Empty if they were typed. `command` has what was typed."""
    pack: dict[str, Any] | None = None
    """`slot`, the number of `slots` when the run joined the pack, and `shared_draws`: whether a fused kernel drew the
    attention's dropout for all slots at once, so that a run alone would differ. `slot_steps` is the run's share of the
    slots that its packs were planned with (see `measure_occupancy`). Null for a run alone."""
    metric: str
    """The score's name, such as `bits_per_byte`."""
    direction: Direction
    command: dict[str, Any] = field(default_factory=dict)
    """`arguments` of the command line, and the current `folder`, where relative paths start."""
    code: dict[str, Any] = field(default_factory=dict)
    """`version` of lorasweep. A git checkout also has `commit` and `modified`; a modified one has `patch` (`file`
    and `sha256`)."""
    packages: dict[str, str] = field(default_factory=dict)
    platform: dict[str, Any] = field(default_factory=dict)
    """`python`, `os`, `processor`, `instructions`, `cores`, `threads`, `device`, `gpu`, `cuda`, `cudnn`, `precision`,
    `matmul_precision`. A run of several processes also has `processes` and `strategy`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that can change results (`training.environment.NUMERIC_VARIABLES`)."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By split (`train`, `validation`, `test`): `fingerprint`, `bytes`, and `documents` and `blocks`, or `examples`.
    Validation and test data with labels have `constant_answer`: every metric of the answer that needs no training
    (`data.constant_answer`)."""
    notes: list[str] = field(default_factory=list)
    """Sentences on the data: splits, duplicates, the majority class."""
    batching: dict[str, Any] = field(default_factory=dict)
    """`micro_batches` per optimizer step, `padding_fraction` of training and validation batches, the `attention` that
    `model.attention=auto` chose (`name`, `reason`), and `too_large`: micro-batches that ran out of memory."""
    base: dict[str, Any] = field(default_factory=dict)
    """`path`, `fingerprint`, `parameters`."""
    started_at: str = ""
    """UTC, ISO 8601."""
    ended_at: str | None = None
    wall_s: float = 0.0
    """Seconds of training, also before a resume. In a pack: the pack's seconds divided by the number of used slots."""
    steps_planned: int = 0
    steps_done: int = 0
    tokens_trained: int = 0
    tokens_per_s: float = 0.0
    """Training tokens per second, without the time of evaluations."""
    trainable_params: int = 0
    total_params: int = 0
    trainable_fraction: float = 0.0
    """Number of trained parameters divided by the number of parameters of the base model."""
    adapter_bytes: int = 0
    """Size of the weights in `best/`: the adapter, the head, or the whole model for `method=full`."""
    peak_memory_bytes: int = 0
    """Maximum resident memory of the process during the run, or on a GPU the maximum allocated memory. In a pack:
    memory of the whole pack."""
    best: dict[str, float] = field(default_factory=dict)
    """Validation metrics at the best step, and `step`."""
    last: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    """Every metric of the best weights on the test split; empty unless the confirm stage scored the run."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`bytes` and `sha256` of each kept file, by its path in the run's folder."""

    @property
    def score(self) -> float | None:
        """The best validation value of the run's metric, or None before its first evaluation."""
        return self.best.get(self.metric)


@dataclass(kw_only=True)
class TrialRow:
    """One trial of a sweep."""

    arm: str
    number: int
    """Number of the trial in its arm."""
    state: TrialState
    params: dict[str, Any]
    """Swept keys (dotted) and their values."""
    value: float | None
    """Best validation value of the sweep's metric; None before the first evaluation."""
    run: str
    """The run's folder, relative to the sweep's."""
    reason: str | None = None
    step: int = 0
    """Optimizer steps at its last evaluation."""
    last_value: float | None = None
    """The sweep's metric on validation data at its last evaluation."""
    slot_steps: float = 0.0
    """The run's share of the slots that its packs were planned with (see `measure_occupancy`); 0 for a run alone."""


@dataclass(kw_only=True)
class Question:
    """A question that the sweep states before it starts. `report.evidence.questions` answers it."""

    name: QuestionName
    arm: str
    key: str | None
    """The `confirm_each` key of the arm, if it has one."""
    subjects: list[str]
    """The subjects that are asked about, from the smallest value to the largest."""
    reference: str | None
    """The subject that they are compared with; None for `smallest`, whose references are the larger values."""


@dataclass(kw_only=True)
class SettingRow:
    """The setting that the confirm stage trains for one subject: for an arm, or for one value of its `confirm_each`."""

    subject: str
    arm: str
    setting: int
    """Number of the setting in its arm's confirm stage."""
    value: Any
    """The value of the arm's `confirm_each` key; null without one."""
    params: dict[str, Any]
    """Swept keys (dotted) and their values."""
    trial: int | None
    """The complete trial of the search that has this setting; null if it was not tried."""
    score: float | None
    """The score on validation data: that of the trial, or the predicted one."""
    rate_ratio: float | None = None
    """The ratio of u, the coordinate of the rate law, to that of the nearest complete trial, at least 1."""
    regret: float | None = None
    """How much better the best setting in the space is expected to be, by the search's model, in the metric's unit."""


@dataclass(kw_only=True)
class LookRow:
    """A look of the confirm stage: the questions were tested with this number of seeds."""

    seeds: int
    open: list[str]
    """The subjects of the questions that were still open."""
    next: list[str]
    """The subjects that trained on the seeds of the next look; empty if this look was the last."""


@dataclass(kw_only=True)
class ConfirmRow:
    """One run of the confirm stage: the setting of a subject is trained with a fresh seed."""

    arm: str
    subject: str
    setting: int
    """Number of the setting in its arm's confirm stage (`SettingRow.setting`)."""
    seed: int
    """Seed of initial values, data order and dropout. All subjects have the same seeds."""
    state: ConfirmState
    run: str
    """The run's folder, relative to the sweep's."""
    value: float | None = None
    """The sweep's metric on test data with the weights of the best evaluation."""
    reason: str | None = None
    step: int = 0
    """Optimizer steps at its last evaluation."""
    last_value: float | None = None
    """The sweep's metric on validation data at its last evaluation."""
    slot_steps: float = 0.0
    """The run's share of the slots that its packs were planned with (see `measure_occupancy`); 0 for a run alone."""


@dataclass(kw_only=True)
class ArmRow:
    """One arm of a sweep."""

    name: str
    method: str
    trials: int
    """Number of trials that the user asked for."""
    steps: int = 0
    """Optimizer steps of a complete run, unless `trainer.max_steps` is swept."""
    settings: dict[str, Any]
    """Dotted keys and values that differ from the defaults."""
    space: dict[str, Any]
    """Swept keys: a list of choices or a mapping `low`, `high`, and `log` or `step`."""
    sampler: str
    pruner: str
    confirm_each: str | None = None
    """The swept key whose values are confirmed one by one."""


@dataclass(kw_only=True)
class SweepChange:
    """What `--resume` changed in a sweep."""

    at: str
    """UTC, ISO 8601."""
    stage: Literal["search", "confirm"]
    """The last stage that had begun."""
    settings: dict[str, Any]
    """The overrides that were typed."""
    file: str | None
    """The sweep file that was given; null keeps the earlier one."""
    trials: dict[str, int]
    """Number of trials of each arm that is new or got more trials."""


@dataclass(kw_only=True)
class SweepRecord:
    """The definition of one sweep and the state of each trial."""

    format: str = "lorasweep.sweep"
    version: int = VERSION
    status: Literal["running", "complete", "interrupted"]
    name: str
    description: str = ""
    metric: str
    metric_range: list[float] = field(default_factory=list)
    """Lowest and highest possible value of a metric that is set by `_target_`; null is no limit. Empty for others."""
    direction: Direction
    constant_answer: float | None = None
    """The metric of the answer that needs no training (`data.constant_answer`) on validation data.

    Null for data without labels, and if the trials have different data. At rungs, trials that are no better count as
    equal in the metric."""
    definition: dict[str, Any]
    """Content of the sweep file (`file`) and `overrides`, which `--resume` composes again. `rounds` has the sweep as it
    was each time before it grew: `trials` of each arm, and `confirm_seeds`, 0 if no winner had run again by then."""
    changes: list[SweepChange] = field(default_factory=list)
    """What each `--resume` changed, in order."""
    source: str | None = None
    """Path of the sweep file."""
    source_sha256: str | None = None
    """SHA-256 of the sweep file when the sweep began."""
    arms: list[ArmRow]
    trials: list[TrialRow] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    """The questions, as they were stated before the first trial."""
    looks: list[int] = field(default_factory=list)
    """Numbers of seeds at which the questions are tested, as planned beforehand; empty without a confirm stage."""
    confirm_seeds: list[int] = field(default_factory=list)
    """The seeds of all planned looks."""
    settings: list[SettingRow] = field(default_factory=list)
    """The setting that the confirm stage trains for each subject; empty before the stage."""
    looks_done: list[LookRow] = field(default_factory=list)
    confirm: list[ConfirmRow] = field(default_factory=list)
    margin: float | str
    """`confirm.margin` as it was stated before the first trial."""
    notes: list[str] = field(default_factory=list)
    """Sentences on the data (splits, duplicates, the majority class and its score), on packs, and on how it grew."""
    warnings: list[str] = field(default_factory=list)
    """Sentences on settings and results that may mislead a reader."""
    started_at: str = ""
    ended_at: str | None = None
    makespan_s: float = 0.0
    """Seconds from start to end, summed over the sessions of a resumed sweep."""
    device: str = ""
    """Device of the last trials: `cpu`, `cuda:0`, ..."""
    threads: int = 0
    """Number of CPU threads of one operation."""
    telemetry: dict[str, float] = field(default_factory=dict)
    """Time and memory by purpose, with the keys of `training.telemetry`."""


T = TypeVar("T")


def utc_now() -> str:
    """Returns the present time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def name_subject(arm: str, key: str | None, value: Any) -> str:
    """Returns the name of what is confirmed: an arm, or one value of its `confirm_each` key, such as `lora-rank-16`."""
    if key is None:
        return arm
    return f"{arm}-{short_key(key)}-" + re.sub(r"[^\w.-]+", "_", format_setting(value))


def measure_occupancy(rows: Iterable[TrialRow | ConfirmRow]) -> float | None:
    """Returns the share of the slots of packs that trained, from 0 to 1; None if no run trained in a pack.

    In a step of a pack, all slots of its planned size could train, but some may be empty. So the share is the number of
    steps of all runs, divided by the sum of the planned sizes over all steps of the packs. Each run that trains in a
    step has an equal share of the planned size in its `slot_steps`. Runs alone don't count.
    """
    packed = [row for row in rows if row.slot_steps]
    return sum(row.step for row in packed) / sum(row.slot_steps for row in packed) if packed else None


def measure_stage_occupancy(record: SweepRecord) -> dict[str, float]:
    """Returns `measure_occupancy` of each stage in which a run trained in a pack."""
    stages: dict[str, Sequence[TrialRow | ConfirmRow]] = {"search": record.trials, "confirm": record.confirm}
    shares = {stage: measure_occupancy(rows) for stage, rows in stages.items()}
    return {stage: share for stage, share in shares.items() if share is not None}


def add_telemetry(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Adds up the values of two processes, or of two sessions of a sweep.

    Of two peaks, returns the higher peak. Of two first steps, returns the earlier step.
    """
    total = dict(first)
    for name, value in second.items():
        combine = max if "peak" in name else min if name == "first_step_at" else operator.add
        total[name] = combine(total[name], value) if name in total else value
    return total


def write_record(record: RunRecord | SweepRecord, folder: Path) -> None:
    """Writes `run.json` or `sweep.json` without secrets. NaN and infinity become null, because JSON has neither."""
    name = RUN_FILE if isinstance(record, RunRecord) else SWEEP_FILE
    text = redact(_as_text({f.name: getattr(record, f.name) for f in fields(record)}))
    write_atomically(folder / name, text + "\n")


def _as_text(content: dict[str, Any]) -> str:
    """Returns JSON with one line per trial. Indented trials would slow down a sweep of 10,000 trials."""
    entries = (f" {json.dumps(key)}: {_value_text(value)}" for key, value in content.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def _value_text(value: Any) -> str:
    if isinstance(value, list) and value and (is_dataclass(value[0]) or isinstance(value[0], dict)):
        return "[\n  " + ",\n  ".join(map(dump_row, value)) + "\n ]"
    return json.dumps(_finite(value), indent=1).replace("\n", "\n ")


def dump_row(row: Any) -> str:
    """Returns a row or a mapping as one line of JSON. NaN and infinity become null."""
    plain = row if isinstance(row, dict) else vars(row)
    try:
        return json.dumps(plain, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(plain))


def read_run(folder: Path) -> RunRecord:
    """Reads a run's record.

    Raises:
        RecordError: The folder has no record, or the record is damaged or of another version.
    """
    return _read(RunRecord, folder / RUN_FILE)


def read_sweep(folder: Path) -> SweepRecord:
    """Reads a sweep's record; errors as in `read_run`."""
    return _read(SweepRecord, folder / SWEEP_FILE)


def get_run_folder(sweep: Path, run: str) -> Path:
    """Returns the folder of a run, from its relative path in the sweep's record.

    Raises:
        RecordError: The path leads out of the sweep's folder, where commands must not write.
    """
    try:
        is_inside = (sweep / run).resolve().is_relative_to(sweep.resolve())
    except ValueError:  # no file system has such a name
        is_inside = False
    if not is_inside:
        raise RecordError(f"a trial's run must be inside the sweep's folder, but {run!r} is not. Restore sweep.json.")
    return sweep / run


def read_steps(folder: Path, *, having: str = "") -> Iterator[dict[str, Any]]:
    """Yields the rows of `steps.jsonl`: `{"step", "loss", "lr"}` and `{"step", "validation": {..}}`.

    It stops at the first damaged line, because a killed process may leave an incomplete last line.

    Args:
        folder: The run's folder.
        having: Text that a line must contain. Other lines are skipped without parsing, which is much faster.
    """
    path = folder / STEPS_FILE
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        if having in line:
            row = parse_step_row(line)
            if row is None:
                return
            yield row


def parse_step_row(line: str) -> dict[str, Any] | None:
    """Returns a row of `steps.jsonl`, or None if the line is damaged."""
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not _has_type(row.get("step"), int):
        return None
    hints = {"step": int, "validation": dict[str, float]}
    return row if all(_has_type(value, hints.get(name, float)) for name, value in row.items()) else None


def compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(kind: type[T], path: Path) -> T:
    if not path.is_file():
        raise RecordError(
            f"a {path.stem}'s folder must contain {path.name}, but {str(path.parent)!r} does not. Name another folder."
        )
    try:
        raw = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{str(path)!r} must be a JSON file, but is damaged: {error}.") from error
    expected = {"format": f"lorasweep.{path.stem}", "version": VERSION}
    found = {key: raw.get(key) for key in expected} if isinstance(raw, dict) else {}
    if found != expected:
        raise RecordError(
            f"{str(path)!r} must have {expected}, but has {found}. Read it with the lorasweep that wrote it."
        )
    record: T = _build(kind, raw, path=path)
    return record


def _build(kind: Any, raw: Any, *, path: Path) -> Any:
    """Returns a record or a row from JSON. Unknown keys are ignored, and null numbers have their default."""
    values = {}
    try:
        for name, hint in _field_types(kind).items():
            if name not in raw or (raw[name] is None and hint is float):  # NaN was written as null
                continue
            value = values[name] = raw[name]
            if not _has_type(value, hint):
                raise TypeError(f"`{name}` is {shorten(value)}")
            if get_origin(hint) is list and is_dataclass(row := get_args(hint)[0]):
                values[name] = [_build(row, item, path=path) for item in value]
        return kind(**values)
    except TypeError as error:
        raise RecordError(
            f"{str(path)!r} must be a whole record, but is damaged: {error}. Restore the file."
        ) from error


@cache  # a sweep has thousands of rows of one kind
def _field_types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _has_type(value: Any, hint: Any) -> bool:
    """Returns whether a JSON value has a field's type. Rows are checked by `_build`."""
    kind = get_origin(hint) or hint
    if kind is Any:
        return _is_nested_at_most(MAX_NESTING, value)
    if kind is Literal:
        return value in get_args(hint)
    if kind is UnionType:
        return any(_has_type(value, option) for option in get_args(hint))
    if kind is float:  # in a mapping NaN was written as null
        return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    if is_dataclass(kind):
        return type(value) is dict
    if type(value) is not kind:  # not isinstance: True is an int
        return False
    items = value.values() if kind is dict else value if kind is list else ()
    return all(_has_type(item, get_args(hint)[-1]) for item in items)


def _is_nested_at_most(depth: int, value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_nested_at_most(depth - 1, item) for item in items)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

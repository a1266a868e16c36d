"""What runs and sweeps leave on disk: `run.json` and `sweep.json`, whole or not at all.

A record is data: reading one runs nothing. Written by `training` and `sweep`, read by them and by `report`. Its form is
in `run.schema.json` and `sweep.schema.json`; a secret is never written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from lorasweep.config.data import Direction
from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError
from lorasweep.redaction import may_hold_secret, redact

RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
TEST_SCORES_FILE = "test_scores.csv"
SWEEP_FILE = "sweep.json"
PATCH_FILE = "code.patch"
VERSION = 1
"""Version of the records' form. Records of another version are refused."""
MAX_RECORD_BYTES = 256 * 2**20
"""A larger file is no record of ours: a sweep of 10,000 trials has some 10 MiB."""

MAX_RECORD_DEPTH = 64
"""Levels of lists and mappings in a record; its readers go through them by recursion."""

RunStatus = Literal["running", "complete", "paused", "pruned", "failed", "infeasible", "interrupted"]
"""`paused`: left at an evaluation, may go on from its checkpoint. `pruned`: paused until its sweep ended."""
TrialState = Literal["running", "paused", "complete", "pruned", "failed", "infeasible"]
ConfirmState = Literal["running", "complete", "failed", "infeasible"]


@dataclass(kw_only=True)
class RunRecord:
    """One run, from which it can be repeated and checked. Rewritten whole at each change of status."""

    format: str = "lorasweep.run"
    version: int = VERSION
    status: RunStatus
    reason: str | None = None
    """Why the run is failed, infeasible, paused, pruned or interrupted, or complete before its last step."""
    config: dict[str, Any]
    """The resolved `RunConfig`, nested."""
    arm: str | None = None
    trial: int | None = None
    """Number of the trial in its arm; in the confirm stage that of the arm's winner; null for a single run."""
    pack: dict[str, Any] | None = None
    """`slot`, `slots` of the pack when the run joined it, and `shared_draws`: whether something was drawn for all slots
    at once (dropout of attention probabilities in a fused kernel), so otherwise than alone. Null for a run alone."""
    metric: str
    """The score's name, such as `bits_per_byte`."""
    direction: Direction
    command: dict[str, Any] = field(default_factory=dict)
    """`words` of the command line and the `folder` it was typed in, from which relative paths are meant."""
    code: dict[str, Any] = field(default_factory=dict)
    """`version`, and where the code is a git checkout `commit` and `modified`; if it was modified also `patch`
    (`bytes`, `sha256` and, unless it is too large, `file`) and the names of `untracked` files."""
    packages: dict[str, str] = field(default_factory=dict)
    platform: dict[str, Any] = field(default_factory=dict)
    """`python`, `os`, `processor`, `instructions`, `cores`, `threads`, `device`, `gpu`, `cuda`, `cudnn`, `precision`,
    `matmul_precision`; of a run of several processes also `processes` and `strategy`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that can change numbers (`training.environment.NUMERIC_VARIABLES`), no others."""
    data: dict[str, Any] = field(default_factory=dict)
    """Per part (`train`, `validation`, `test`): `fingerprint`, `bytes`, and `documents` and `blocks` or `rows`."""
    notes: list[str] = field(default_factory=list)
    """Sentences on how the data was made: what was split off, duplicates, the majority class."""
    batching: dict[str, Any] = field(default_factory=dict)
    """`micro_batches` per optimizer step, `padding_fraction` of training and validation batches, the `attention` that
    `model.attention=auto` chose (`name`, `reason`), and where memory ran out `too_large`: the micro-batches tried
    before."""
    base: dict[str, Any] = field(default_factory=dict)
    """`path`, `fingerprint`, `parameters`."""
    started_at: str = ""
    """UTC, ISO 8601."""
    ended_at: str | None = None
    wall_s: float = 0.0
    """Seconds of all sessions of this run together; in a pack its share, the time over the slots in use."""
    steps_planned: int = 0
    steps_done: int = 0
    tokens_trained: int = 0
    tokens_per_s: float = 0.0
    """Training tokens per second of training time, evaluation left out."""
    trainable_params: int = 0
    total_params: int = 0
    trainable_fraction: float = 0.0
    """Trained parameters over those of the base model."""
    adapter_bytes: int = 0
    """Size of the weights that a run keeps (`best/`): the adapter, the head, or under `full` the whole model."""
    peak_memory_bytes: int = 0
    """Largest resident memory of the process during the run; on a GPU, largest allocated memory of the device. In a
    pack, that of the whole pack."""
    best: dict[str, float] = field(default_factory=dict)
    """Validation metrics at the best step, and `step`."""
    last: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    """Every metric of the best weights on the test part; empty until a confirm stage scored the run."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per kept file, relative to the run's folder: `bytes` and `sha256`."""

    @property
    def score(self) -> float | None:
        """The best validation value of the run's metric, or None before its first evaluation."""
        return self.best.get(self.metric)


@dataclass(kw_only=True)
class TrialRow:
    """One trial of a sweep as its record lists it."""

    arm: str
    number: int
    state: TrialState
    params: dict[str, Any]
    """Swept keys (dotted) and their values."""
    value: float | None
    """Best value of the sweep's metric, or None where none was measured."""
    run: str
    """The run's folder, relative to the sweep's."""
    reason: str | None = None
    step: int = 0
    """Optimizer steps at its last evaluation."""
    last_value: float | None = None
    """The sweep's metric on validation data at its last evaluation."""


@dataclass(kw_only=True)
class ConfirmRow:
    """One run of the confirm stage: the best configuration of an arm on a fresh seed, scored once on test data."""

    arm: str
    trial: int
    """Number of the arm's winner in its search."""
    seed: int
    """The run's seed, of initial values, data order and dropout alike; that of the same row of every other arm."""
    state: ConfirmState
    run: str
    """The run's folder, relative to the sweep's."""
    value: float | None = None
    """The sweep's metric on the test part, with the weights of the best evaluation."""
    reason: str | None = None
    """Why it failed or does not fit in memory."""
    step: int = 0
    """Optimizer steps at its last evaluation."""
    last_value: float | None = None
    """The sweep's metric on validation data at its last evaluation."""


@dataclass(kw_only=True)
class ArmRow:
    """One arm of a sweep as its record lists it."""

    name: str
    method: str
    trials: int
    """Number of trials asked for."""
    steps: int = 0
    """Optimizer steps of a run to its end, unless `trainer.max_steps` is swept."""
    settings: dict[str, Any]
    """Dotted keys and values that differ from the defaults."""
    space: dict[str, Any]
    """Swept keys: a list of choices or a mapping `low`, `high`, and `log` or `step`."""
    sampler: str
    pruner: str
    importance: dict[str, float] = field(default_factory=dict)
    """Share of the score's variance per swept key (Optuna), where it could be computed."""
    expanded_from: str | None = None
    """The arm in the sweep file whose `expand` made this one."""
    expanded: dict[str, Any] = field(default_factory=dict)
    """Keys and values that tell it from the other arms of that `expand`."""


@dataclass(kw_only=True)
class SweepRecord:
    """One sweep: what was asked for and what became of each trial."""

    format: str = "lorasweep.sweep"
    version: int = VERSION
    status: Literal["running", "complete", "interrupted"]
    name: str
    description: str = ""
    metric: str
    direction: Direction
    definition: dict[str, Any]
    """The sweep as composed: what `--resume` checks against."""
    study_prefix: str = ""
    """Before the names of its studies, where they are in a database that other sweeps share."""
    source: str | None = None
    """The sweep file it was read from, and `source_sha256` its content then."""
    source_sha256: str | None = None
    arms: list[ArmRow]
    trials: list[TrialRow] = field(default_factory=list)
    confirm: list[ConfirmRow] = field(default_factory=list)
    confirm_seeds: list[int] = field(default_factory=list)
    """Seeds on which the best configuration of each arm is to run again, once the search is over."""
    notes: list[str] = field(default_factory=list)
    """Sentences on how the data was made: what was split off, duplicates, the majority class and its score."""
    warnings: list[str] = field(default_factory=list)
    """What may mislead a reader of the results, a sentence each."""
    started_at: str = ""
    ended_at: str | None = None
    makespan_s: float = 0.0
    """Seconds from start to end, summed over the sessions of a resumed sweep."""
    device: str = ""
    """Where its trials were trained last, such as `cpu` or `cuda:0`."""
    threads: int = 0
    """Processor threads of one operation."""
    telemetry: dict[str, float] = field(default_factory=dict)
    """What time and memory of all sessions went to; the keys are those of `training.telemetry`."""


T = TypeVar("T")


def utc_now() -> str:
    """Returns the time now as records hold it: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def winners(record: SweepRecord) -> dict[str, TrialRow | None]:
    """Returns the best complete trial of each arm that trains, the earlier of equals; None where none is complete."""
    sign = 1 if record.direction == "minimize" else -1
    best: dict[str, TrialRow | None] = {arm.name: None for arm in record.arms if arm.method != "frozen"}
    for trial in sorted(record.trials, key=lambda trial: trial.number):
        if trial.arm not in best or trial.state != "complete" or trial.value is None or not math.isfinite(trial.value):
            continue
        before = best[trial.arm]
        if before is None or before.value is None or sign * trial.value < sign * before.value:
            best[trial.arm] = trial
    return best


def write_record(record: RunRecord | SweepRecord, folder: Path) -> None:
    """Writes `run.json` or `sweep.json` into the folder, without secrets.

    NaN and infinity become null: JSON has neither.
    """
    name = RUN_FILE if isinstance(record, RunRecord) else SWEEP_FILE
    text = _as_text({f.name: getattr(record, f.name) for f in fields(record)})
    if may_hold_secret(text):
        text = _as_text(redact(json.loads(text)))
    write_atomically(folder / name, text + "\n")


def _as_text(content: dict[str, Any]) -> str:
    """JSON that people can read, a line for each row: a sweep of 10,000 trials is written whenever one of them ends."""
    entries = (f" {json.dumps(key)}: {_value_text(value)}" for key, value in content.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def _value_text(value: Any) -> str:
    if isinstance(value, list) and value and (is_dataclass(value[0]) or isinstance(value[0], dict)):
        return "[\n  " + ",\n  ".join(map(_row_text, value)) + "\n ]"
    return json.dumps(_finite(value), indent=1).replace("\n", "\n ")


def _row_text(row: Any) -> str:
    plain = row if isinstance(row, dict) else vars(row)
    try:
        return json.dumps(plain, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(plain))


def read_run(folder: Path) -> RunRecord:
    """Reads a run's record.

    Raises:
        RecordError: There is none, it is damaged, or a newer version wrote it.
    """
    path = folder / RUN_FILE
    return _known(RunRecord, _read_json(path, "lorasweep.run"), path=path)


def read_sweep(folder: Path) -> SweepRecord:
    """Reads a sweep's record.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged or of a newer version.
    """
    path = folder / SWEEP_FILE
    raw = _read_json(path, "lorasweep.sweep")
    rows = {"arms": ArmRow, "trials": TrialRow, "confirm": ConfirmRow}
    read: dict[str, Any] = {key: _known_rows(kind, raw.get(key, []), path=path) for key, kind in rows.items()}
    return _known(SweepRecord, raw | read, path=path)


def folder_of_run(sweep: Path, run: str) -> Path:
    """Returns the folder of a run that a sweep's record lists.

    Args:
        sweep: The sweep's folder.
        run: `run` of its row.

    Raises:
        RecordError: It would lie outside of the sweep.
    """
    try:
        inside = (sweep / run).resolve().is_relative_to(sweep.resolve())
    except (OSError, ValueError):  # a name that no file can have
        inside = False
    if not inside:
        raise RecordError(f"a trial's run must lie in its sweep's folder, but {run!r} does not. Restore sweep.json.")
    return sweep / run


@cache
def read_schema(kind: Literal["run", "sweep"]) -> dict[str, Any]:
    """Returns the JSON schema of a record."""
    schema: dict[str, Any] = json.loads((Path(__file__).parent / f"{kind}.schema.json").read_text())
    return schema


def read_steps(folder: Path, *, having: str = "") -> Iterator[dict[str, Any]]:
    """Yields the rows of `steps.jsonl` as written: `{"step", "loss", "lr"}` and `{"step", "validation": {..}}`.

    A last line that was cut off by a killed process is left out.

    Args:
        folder: The run's.
        having: Only rows whose line contains this text, which is much faster than to parse them all.
    """
    path = folder / STEPS_FILE
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        if having not in line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(row, dict):
            yield row


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    if not path.is_file():
        kind = expected.removeprefix("lorasweep.")
        raise RecordError(
            f"a {kind}'s folder must contain {path.name}, but {str(path.parent)!r} does not. Name another folder."
        )
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise RecordError(f"{str(path)!r} must be a record of at most {MAX_RECORD_BYTES >> 20} MiB, but is larger.")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, a number of too many digits; too deep
        raise RecordError(f"{str(path)!r} must be a JSON file, but is damaged: {error}.") from error
    if _is_deeper(raw, MAX_RECORD_DEPTH):
        raise RecordError(f"{str(path)!r} must be at most {MAX_RECORD_DEPTH} levels deep, but is deeper.")
    if not isinstance(raw, dict) or raw.get("format") != expected:
        raise RecordError(f"{str(path)!r} must be a record of format {expected!r}, but is not.")
    if raw.get("version") != VERSION:
        raise RecordError(
            f"{str(path)!r} must have version {VERSION}, but has {raw.get('version')!r}. Read it with the lorasweep "
            "that wrote it."
        )
    return raw


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return bool(level)


def _known_rows(kind: type[T], rows: Any, *, path: Path) -> list[T]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"a record must have a list of {kind.__name__}s, but has {str(rows)[:60]!r}.")
    return [_known(kind, row, path=path) for row in rows]


def _known(kind: type[T], raw: dict[str, Any], *, path: Path) -> T:
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    known = {key: value for key, value in raw.items() if key in names}
    try:
        made = kind(**known)
    except TypeError as error:
        raise RecordError(f"a record must have every field of {kind.__name__}: {error}.") from error
    for key, form in _properties(kind).items():
        if key in known and not _fits(known[key], form):
            raise RecordError(f"`{key}` in {str(path)!r} must be {_wanted(form)}, but is not. Restore the file.")
    return made


JSON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
JSON_WORDS = {"object": "a mapping", "array": "a list", "string": "a text", "number": "a number"} | {
    "integer": "a whole number",
    "boolean": "true or false",
    "null": "null",
}


def _properties(kind: type) -> dict[str, Any]:
    """What the schema says of each field of a record or of one of its rows."""
    whole: dict[type, Literal["run", "sweep"]] = {RunRecord: "run", SweepRecord: "sweep"}
    part = read_schema(whole[kind]) if kind in whole else read_schema("sweep")["$defs"][kind.__name__]
    properties: dict[str, Any] = part["properties"]
    return properties


def _fits(value: Any, form: dict[str, Any]) -> bool:
    """Whether a value is of the type, or one of the words, that a schema gives; what it holds is for its reader."""
    if "enum" in form:
        return value in form["enum"]
    names = _type_names(form)
    if isinstance(value, bool):
        return not names or "boolean" in names
    return not names or isinstance(value, tuple(kind for name in names for kind in JSON_TYPES[name]))


def _wanted(form: dict[str, Any]) -> str:
    if "enum" in form:
        return f"one of {', '.join(map(str, form['enum']))}"
    return " or ".join(JSON_WORDS[name] for name in _type_names(form))


def _type_names(form: dict[str, Any]) -> list[str]:
    names = form.get("type", [])
    return [names] if isinstance(names, str) else list(names)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

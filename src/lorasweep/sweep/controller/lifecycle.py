"""Creates a sweep's folder, and opens the folder again to resume the sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lorasweep.config.build import as_settings, flatten
from lorasweep.config.data import ScoreMetric
from lorasweep.disk import remove_leftovers, take_lock
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import (
    JOURNAL_FILE,
    SWEEP_FILE,
    ArmRow,
    RetainedRow,
    SweepChange,
    SweepRecord,
    compute_sha256,
    read_sweep,
    utc_now,
    write_record,
)
from lorasweep.sweep.controller.folder import (
    RUNS_FOLDER,
    SweepFolder,
    damaged_journal,
    name_study,
    open_storage,
)
from lorasweep.sweep.definition.arms import Arm, Definition, restore_definition
from lorasweep.sweep.definition.confirm import draw_confirm_seeds, has_fixed_score, list_questions
from lorasweep.sweep.definition.ranges import describe_space
from lorasweep.wording import ABSENT

CHANGEABLE_KEYS = ("sweep.trials", "confirm.seeds")
"""Settings that change no trial that has begun, beside those of `worker`. Numbers of trials and seeds are checked
separately."""


def create_sweep(
    definition: Definition,
    path: Path,
    *,
    metric: ScoreMetric,
    test_metrics: Sequence[ScoreMetric] = (),
    retained: Sequence[RetainedRow] = (),
    constant_answer: Mapping[str, float] = MappingProxyType({}),
    fingerprints: Mapping[str, dict[str, str]] = MappingProxyType({}),
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> SweepFolder:
    """Creates the folder, the record and the studies of a sweep, and returns the open sweep.

    Raises ConfigError if the folder can't be created; no record was written.
    """
    record = SweepRecord(
        status="running",
        name=definition.name,
        description=definition.description,
        search_metric=metric,
        constant_answer=dict(constant_answer),
        fingerprints=dict(fingerprints),
        definition=definition.raw,
        source=str(definition.source) if definition.source else None,
        source_sha256=compute_sha256(definition.source) if definition.source else None,
        arms=[build_arm_row(arm) for arm in definition.arms],
        questions=list_questions(definition),
        looks=list(definition.sweep_config.confirm.list_looks()),
        confirm_seeds=draw_confirm_seeds(definition),
        margin=definition.sweep_config.confirm.margin,
        test_metrics=list(test_metrics),
        retained=list(retained),
        retain_margin=definition.sweep_config.retain.margin,
        notes=list(notes),
        warnings=list(warnings),
        started_at=utc_now(),
    )
    with ExitStack() as undo:
        (path / RUNS_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = take_lock(path, undo)
        opened = SweepFolder(path=path, definition=definition, record=record, storage=open_storage(path), lock=lock)
        for arm in definition.arms:
            opened.open_study(arm.name)
        write_record(record, path)  # last: a folder that has it can be resumed
        undo.pop_all()
    return opened


def read_saved_definition(path: Path) -> Definition:
    """Returns the definition of the sweep in a folder. Raises RecordError if its record is missing or damaged."""
    record = read_sweep(path)
    if not isinstance(record.definition.get("overrides"), dict) or "file" not in record.definition:
        raise RecordError(f"`definition` in {str(path / SWEEP_FILE)!r} must have `file` and `overrides`. Restore it.")
    return restore_definition(record.definition, source=Path(record.source) if record.source else None)


def load_study(path: Path, arm: str) -> optuna.Study:
    """Returns the study of an arm's search in the sweep in a folder, for reading.

    Raises RecordError if the folder is not a sweep, has no study of this arm, or its journal is damaged.
    """
    read_sweep(path)
    name = name_study(arm, "search")
    _require_journal(path)
    try:
        # Optuna's journal, because ours would cut off a line that another process is writing at the end
        storage = JournalStorage(JournalFileBackend(str(path / JOURNAL_FILE)))
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise RecordError(
            f"the storage of a sweep must have a study of each arm, but that of {str(path)!r} has no study `{name}`. "
            "Restore it, or start a new sweep."
        ) from error
    except Exception as error:  # a wrong operation raises errors of many classes in Optuna
        raise damaged_journal(path, error) from error


def reopen_sweep(path: Path, *, changes: Mapping[str, Any] | None = None) -> SweepFolder:
    """Opens a sweep to resume it. The record is not written yet; what a killed process left unfinished is removed.

    `changes` are overrides: other settings of the workers, more trials or more confirm seeds.

    Raises:
        RecordError: The folder is not a sweep, its record or journal is damaged, or another process runs it.
        ConfigError: A trial or confirm run that has begun would change, or the sweep file has changed.
    """
    record, old = read_sweep(path), read_saved_definition(path)
    source = old.source
    if source is not None and source.is_file() and record.source_sha256 != compute_sha256(source):
        raise ConfigError(
            f"the sweep file must be as it was when {str(path)!r} began, but {str(source)!r} has changed. Restore it. "
            f"For more trials, type `lorasweep sweep --resume {path} arms.ARM.trials=N`."
        )
    definition = grow_definition(old, changes=changes or {})
    if [row.name for row in record.arms] != [arm.name for arm in old.arms]:
        raise RecordError(f"`arms` in {str(path / SWEEP_FILE)!r} must be those of its `definition`. Restore it.")
    with ExitStack() as undo:
        lock = take_lock(path, undo)
        remove_leftovers(path)
        _require_journal(path)
        storage = open_storage(path)
        counts = {summary.study_name: summary.n_trials for summary in optuna.get_all_study_summaries(storage)}
        for arm, number in Counter(row.arm for row in record.trials).items():
            stored = counts.get(name_study(arm, "search"), 0)
            if stored < number:  # the storage is always written before the record
                raise RecordError(
                    f"the storage of a sweep must have the {number} trials of `{arm}` in {SWEEP_FILE}, but has "
                    f"{stored}. Its end was cut off. Restore it, or start a new sweep."
                )
        has_confirm = any(name_study(arm.name, "confirm") in counts for arm in definition.arms)
        undo.pop_all()
    if definition.raw != record.definition:
        change = SweepChange(
            at=utc_now(),
            stage="confirm" if has_confirm else "search",
            settings=dict(changes or {}),
            trials={arm.name: arm.trials for arm in definition.arms if arm.trials != old.find_arm(arm.name).trials},
        )
        record.changes.append(change)
        record.status = "interrupted"  # until a controller has found that nothing is left to do
    record.definition = definition.raw
    record.confirm_seeds = draw_confirm_seeds(definition)
    record.questions = list_questions(definition)
    done, planned = [look.seeds for look in record.looks_done], definition.sweep_config.confirm.list_looks()
    record.looks = sorted({*done, *(look for look in planned if look > max(done, default=0))})
    record.arms = [build_arm_row(arm) for arm in definition.arms]
    return SweepFolder(path=path, definition=definition, record=record, storage=storage, lock=lock)


def build_arm_row(arm: Arm) -> ArmRow:
    config = arm.base
    return ArmRow(
        name=arm.name,
        method=config.method.kind,
        trials=arm.trials,
        steps=config.num_steps,
        settings=dict(arm.settings),
        space=describe_space(arm.space),
        has_fixed_score=has_fixed_score(arm),
        subjects=list(arm.subjects),
    )


def _require_journal(path: Path) -> None:
    if not (path / JOURNAL_FILE).is_file():
        raise RecordError(f"a sweep's folder must contain {JOURNAL_FILE}, but {str(path)!r} does not.")


def grow_definition(old: Definition, *, changes: Mapping[str, Any]) -> Definition:
    """Returns the definition of a sweep that has begun, with changes such as `{"arms.lora.trials": 20}` applied.

    Raises ConfigError if a key is wrong, or a trial that has begun would change.
    """
    if not changes:
        return old
    new = old.with_overrides(changes)
    names, kept_names = ([arm.name for arm in definition.arms] for definition in (new, old))
    if names != kept_names:
        raise ConfigError(
            f"a sweep that has begun must keep its arms ({', '.join(kept_names)}), but got {', '.join(names)}. Start a "
            "new sweep."
        )
    for before, after in zip(old.arms, new.arms, strict=True):
        kept_settings, settings = _list_settings(before), _list_settings(after)
        for key in dict.fromkeys([*kept_settings, *settings]):
            if (value := settings.get(key, ABSENT)) != (kept := kept_settings.get(key, ABSENT)):
                raise ConfigError(
                    f"arm `{before.name}`: `{key}` must stay {kept!r}, because its trials have begun, but got "
                    f"{value!r}. Start a new sweep."
                )
    numbers = {f"arms.{arm.name}.trials": (arm.trials, new.find_arm(arm.name).trials) for arm in old.arms}
    seeds = tuple(max(definition.sweep_config.confirm.list_looks(), default=0) for definition in (old, new))
    for key, (kept_number, number) in {**numbers, "confirm.seeds": seeds}.items():
        if number < kept_number:
            shared, got = changes.get("sweep.trials"), f"got {number}"
            if shared is not None and key in numbers and key not in changes:
                half = "" if number == shared else ", half of that, because the arm searches one key"
                got = f"`sweep.trials={shared}` sets it to {number}{half}"
            raise ConfigError(
                f"`{key} >= {kept_number}` must hold, because the sweep has that many, but {got}. Start a new sweep "
                "for fewer."
            )
    return new


def _list_settings(arm: Arm) -> dict[str, Any]:
    """Returns all settings on which an arm's trials depend by dotted key, the ranges of swept keys first."""
    settings = flatten({**as_settings(arm.base), **as_settings(arm.sweep_config)})
    free = {key for key in settings if key in (*arm.space, *CHANGEABLE_KEYS) or key.startswith("worker.")}
    return describe_space(arm.space) | {key: value for key, value in settings.items() if key not in free}

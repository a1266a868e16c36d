"""A finished run: restores its settings, base model and weights, and scores it.

When a run ends, its best weights are scored on all validation examples. Test data is scored once, in a confirm run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lorasweep.config.build import as_settings, build, flatten
from lorasweep.config.run import RunConfig
from lorasweep.data.batching import choose_part
from lorasweep.disk import open_inside, write_atomically
from lorasweep.errors import ConfigError, RecordError
from lorasweep.methods import bind, copy_sharing_weights
from lorasweep.models.load import BaseModel, Labels, load_base
from lorasweep.record import (
    ANSWERS_FILE,
    RETAINED_SCORES_FILE,
    TEST_SCORES_FILE,
    RunRecord,
    compute_sha256,
    read_run,
    restore_config,
    write_record,
)
from lorasweep.tasks.splits import DataSplits
from lorasweep.training.environment import DTYPES, fork_random_streams, get_device
from lorasweep.training.evaluation import evaluate_model, score_split
from lorasweep.training.generation import score_answers
from lorasweep.training.memory import convert_memory_errors
from lorasweep.training.open_run import OpenRun, check_score
from lorasweep.training.own_module import load_own_base, score_own_module
from lorasweep.training.run_inputs import RunInputs

CHANGEABLE_SETTINGS = tuple(f"trainer.{name}" for name in ("strategy", "devices", "num_nodes", "device", "progress"))
"""Settings that may change when a run resumes, because they do not change what it learns; keys below them too."""


def check_same_run(record: RunRecord, config: RunConfig) -> None:
    """Raises ConfigError if the settings of a run to resume would change what it learns."""
    recorded, now = (flatten(as_settings(one)) for one in (restore_config(record), config))
    for key in {**recorded, **now}:
        if not key.startswith(CHANGEABLE_SETTINGS) and recorded.get(key) != now.get(key):
            raise ConfigError(
                f"`{key}` must be {recorded.get(key)!r} as when the run began, but got {now.get(key)!r}. "
                "For another run remove `resume`."
            )


def restore_base(record: RunRecord, config: RunConfig) -> BaseModel:
    """Loads the base model of a run, in the run's precision.

    Raises:
        RecordError: The model's fingerprint differs from the recorded fingerprint, or the record is damaged.
    """
    base = _load_recorded_base(record, config)
    trained_on = record.base.get("fingerprint")
    if base.fingerprint != trained_on:
        raise RecordError(
            f"`model.path` must be the base model of the run (fingerprint {trained_on!r} in "
            f"{record.platform.get('precision')}), but {config.model.path!r} has {base.fingerprint!r}. Restore the "
            "model that the run trained on."
        )
    return base


def restore_unquantised_base(record: RunRecord, config: RunConfig) -> tuple[RunConfig, BaseModel]:
    """Returns a run's base, loaded as in `restore_base` but never quantised, and its settings without quantisation."""
    base = restore_base(record, config)  # also for its check: the record has the fingerprint of the quantised weights
    if config.model.quantization == "none":
        return config, base
    unquantised = replace(config, model=replace(config.model, quantization="none"))
    return unquantised, _load_recorded_base(record, unquantised)


def _load_recorded_base(record: RunRecord, config: RunConfig) -> BaseModel:
    precision: Any = record.platform.get("precision")
    stored = record.base.get("labels")
    try:
        dtype, labels = DTYPES[precision], None if stored is None else build(Labels, stored)
    except (KeyError, ConfigError, TypeError, AttributeError) as error:
        raise RecordError(
            f"`platform.precision` and `base.labels` in a run's record must be as the run wrote them, but: {error!r}. "
            "Restore the file."
        ) from error
    return load_base(config.model, dtype=dtype, labels=labels) if config.module is None else load_own_base(config)


def restore_model(config: RunConfig, base: BaseModel, *, folder: Path) -> nn.Module:
    """Returns a copy of the base with the weights in `folder` (a run's `best`), in evaluation mode."""
    method = bind(config.method)
    if method.loads_onto_base:
        model = copy_sharing_weights(base.model)
    else:
        model = method.prepare(base, generator=torch.Generator().manual_seed(config.seeds.init))
    method.load(model, folder)
    model.train(False)
    return model


def check_kept_files(record: RunRecord, run_folder: Path) -> None:
    """Raises RecordError if a run's folder has no weights in `best`, or they have changed."""
    paths, found = list((run_folder / "best").glob("*")), "none"
    try:
        for path in paths:
            open_inside(run_folder, path).close()
    except OSError as error:
        paths, found = [], f"other files ({error})"
    if not paths:
        raise RecordError(
            f"a run must have kept weights in `best`, but {str(run_folder)!r} (status {record.status}) has {found}. "
            "Name a run that was evaluated at least once."
        )
    for name, kept in record.files.items():
        file = run_folder / name
        if not name.startswith("best/"):
            continue
        is_same_size = file.is_file() and file.stat().st_size == kept.get("bytes")  # a hash of 5 GB takes 10 s
        if not (is_same_size and compute_sha256(file) == kept.get("sha256")):
            raise RecordError(
                f"{str(file)!r} must be as the run wrote it, but is missing or has changed. Train the run again."
            )


def score_run(
    folder: Path, *, inputs: RunInputs, retained: Mapping[str, DataSplits] = MappingProxyType({})
) -> RunRecord:
    """Scores a run's best weights on the test split, and returns the updated record. Skips a run that has test scores.

    The test splits of `retained` data sets, which the run did not learn, are scored too. If a metric is a mean over
    examples, also writes `test_scores.csv`, or `retained-NAME.csv`. With `data.answers.score`, also answers test
    examples, and writes `test_answers.csv`.

    Raises:
        ConfigError: There is no test split, or it can't be read.
        RecordError: The record or the weights are missing or damaged.
        OutOfMemory: The evaluation does not fit into memory.
    """
    record = read_run(folder)
    if record.test:
        return record
    config = restore_config(record)
    split = inputs.splits.test()
    model = restore_model(config, inputs.base, folder=folder / "best")
    with convert_memory_errors():
        if config.module is None:
            values, lines = score_split(model, inputs.data, config=config, inputs=inputs)
        else:
            values, lines = score_own_module(model, config=config, inputs=inputs)
        files = {TEST_SCORES_FILE: lines}
        if config.data.generated is not None:
            answered = score_answers(model, split, config=config, inputs=inputs)
            values, files[ANSWERS_FILE.format(split.name)] = values | answered.values, answered.lines
            record.answers[split.name] = answered.facts
            model.cpu()
        for name, splits in retained.items():
            found = score_split(model, splits, config=config, inputs=inputs)
            record.retained[name], files[RETAINED_SCORES_FILE.format(name)] = found
            record.data[f"retained-{name}"] = splits.describe(splits.test())
    for file, lines in files.items():
        if lines is not None:
            write_atomically(folder / file, lines)
            size, sha256 = (folder / file).stat().st_size, compute_sha256(folder / file)
            record.files[file] = {"bytes": size, "sha256": sha256}
    record.data[split.name] = inputs.splits.describe(split)
    record.notes += [note for note in split.notes if note not in record.notes]
    record.test = values
    write_record(record, folder)  # last, because a record with test scores is not scored again
    return record


def score_best_weights(run: OpenRun) -> None:
    """Scores the best weights on all validation examples when a run ends, if its evaluations used a part of them.

    With `data.answers.on_validation`, they also answer validation examples. The model stays on its device, because a
    pack may train on the same base. Random streams stay as they are.

    Raises:
        Diverged: The score is NaN or infinite.
    """
    config, record, folder, inputs = run.config, run.record, run.folder, run.inputs
    split, answers = inputs.splits.validation, config.data.generated
    is_part = len(choose_part(len(split), config.eval_fraction)) < len(split)
    is_answered = answers is not None and answers.on_validation
    if not (is_part or is_answered):
        return
    with fork_random_streams(get_device(config.trainer)):
        model = restore_model(config, inputs.base, folder=folder / "best")
        if is_part:
            data = inputs.data
            values, _ = evaluate_model(model, data.validation, objective=data.objective, config=config, inputs=inputs)
            check_score(values, metric=record.metric, step=int(record.best["step"]))
            record.best = {"step": record.best["step"], **values}
        if is_answered:
            answered = score_answers(model, split, config=config, inputs=inputs)
            record.best |= answered.values
            record.answers[split.name] = answered.facts
            if answered.lines is not None:
                write_atomically(folder / ANSWERS_FILE.format(split.name), answered.lines)


def write_base_answers(folder: Path, config: RunConfig, *, inputs: RunInputs) -> None:
    """Writes the base model's answers to test examples into a sweep's folder, once, to show them beside others."""
    file = folder / ANSWERS_FILE.format("base")
    if config.data.generated is not None and not file.exists():
        model = copy_sharing_weights(inputs.base.model)
        lines = score_answers(model, inputs.splits.test(), config=config, inputs=inputs).lines
        model.cpu()
        write_atomically(file, lines or "")  # also without answers, so that they are not tried again

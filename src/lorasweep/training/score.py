"""Scores a finished run on test data, its best weights on all validation examples, and the answers of the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import choose_part
from lorasweep.disk import write_atomically
from lorasweep.methods import copy_sharing_weights
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
from lorasweep.training.environment import fork_random_streams, get_device
from lorasweep.training.evaluation import evaluate_model, score_split
from lorasweep.training.failures import convert_memory_errors
from lorasweep.training.generation import score_answers
from lorasweep.training.own_module import score_own_module
from lorasweep.training.restore import restore_model
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.run_log import check_score


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


def score_best_weights(config: RunConfig, record: RunRecord, folder: Path, *, inputs: RunInputs) -> None:
    """Scores the best weights of a run that ends on all validation examples, if its evaluations used a part of them.

    With `data.answers.on_validation`, they also answer validation examples. The model stays on its device, because a
    pack may train on the same base. Random streams stay as they are.

    Raises:
        Diverged: The score is NaN or infinite.
    """
    split, answers = inputs.splits.validation, config.data.generated
    is_part = len(choose_part(len(split), config.eval_fraction)) < len(split)
    is_answered = answers is not None and answers.on_validation
    if not (is_part or is_answered):
        return
    inputs.telemetry.switch("evaluating")
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
    inputs.telemetry.switch("saving")


def write_base_answers(folder: Path, config: RunConfig, *, inputs: RunInputs) -> None:
    """Writes the base model's answers to test examples into a sweep's folder, once, to show them beside others."""
    file = folder / ANSWERS_FILE.format("base")
    if config.data.generated is not None and not file.exists():
        model = copy_sharing_weights(inputs.base.model)
        lines = score_answers(model, inputs.splits.test(), config=config, inputs=inputs).lines
        model.cpu()
        write_atomically(file, lines or "")  # also without answers, so that they are not tried again

"""Scores a finished run on the test split: its best weights, once. The only place where a test split is read."""

from __future__ import annotations

from pathlib import Path

import torch

from lorasweep.data.tasks import ExampleScores, Task
from lorasweep.disk import csv_text, write_atomically
from lorasweep.errors import OutOfMemory, first_line
from lorasweep.record import TEST_SCORES_FILE, RunRecord, read_run, sha256_of, write_record
from lorasweep.training.answers import score_answers, wants_answers
from lorasweep.training.evaluate import evaluate_model
from lorasweep.training.inputs import RunInputs
from lorasweep.training.restore import restore_config, restore_model
from lorasweep.training.run_log import is_out_of_memory


def score_run(folder: Path, *, inputs: RunInputs) -> RunRecord:
    """Scores a run's best weights on the test split and returns its record; one that has been scored is left as it is.

    Writes `test_scores.csv` where the run's metric is a mean over rows, then the record.

    Args:
        folder: A finished run.
        inputs: Base model and data of that run.

    Raises:
        ConfigError: There is no test split, or it can't be read.
        RecordError: The record or the weights are missing or damaged.
        OutOfMemory: It does not fit.
    """
    record = read_run(folder)
    if record.test:
        return record
    config = restore_config(record)
    split = inputs.splits.test()
    task = inputs.splits.task_of(split)
    model = restore_model(config, inputs.whole_base(config), folder=folder / "best")
    generated: dict[str, float] = {}
    try:
        with inputs.telemetry.phase("evaluating"):
            scored = evaluate_model(model, split, task=task, config=config, precision=inputs.precision)
            if wants_answers(config.data):
                generated = score_answers(model, split, config=config, inputs=inputs)
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(first_line(error)) from error
        raise
    lines = row_scores_csv(record.metric, scored.examples, task=task, value=scored.values[record.metric])
    if lines is not None:
        path = folder / TEST_SCORES_FILE
        write_atomically(path, lines)
        record.files[TEST_SCORES_FILE] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    record.data[split.name] = split.describe()
    record.notes += [note for note in split.notes if note not in record.notes]
    record.test = scored.values | generated  # last: it says that the run has been scored
    write_record(record, folder)
    return record


def row_scores_csv(metric: str, rows: ExampleScores, *, task: Task, value: float) -> str | None:
    """Returns `row,score,weight` for each row, whose weighted mean is the metric; None where no such mean is.

    Rows of perplexity are losses, and it is the exponential of their mean.

    Args:
        metric: The run's metric.
        rows: Every row of the split, in its order.
        task: What they were scored by.
        value: The metric over all of them.
    """
    per_example = task.per_example(metric, rows)
    if per_example is None:
        return None
    scores, weights = (column.double() for column in per_example)
    mean = (scores * weights).sum() / weights.sum()
    told = mean.exp() if metric == "perplexity" else mean  # whose rows are losses
    if not torch.isclose(told, torch.tensor(value, dtype=torch.float64), rtol=1e-6, atol=1e-9):
        return None
    columns = range(len(scores)), scores.tolist(), weights.tolist()
    return csv_text(("row", "score", "weight"), zip(*columns, strict=True))

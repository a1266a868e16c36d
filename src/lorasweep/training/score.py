"""Scores a model outside of training: on any split, or a finished run on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.split import Split, move_batch
from lorasweep.data.tasks import Evaluation, ExampleScores, Task
from lorasweep.disk import csv_text, write_atomically
from lorasweep.record import TEST_SCORES_FILE, RunRecord, read_run, sha256_of, write_record
from lorasweep.training.environment import device_of
from lorasweep.training.failures import memory_errors_as_ours
from lorasweep.training.generation import is_generating, score_answers
from lorasweep.training.inputs import RunInputs
from lorasweep.training.restore import restore_config, restore_model


class Scores(NamedTuple):
    """Every metric of a model on a split, and the scores of its examples in the order of the split."""

    values: dict[str, float]
    examples: ExampleScores


def score_run(folder: Path, *, inputs: RunInputs) -> RunRecord:
    """Scores a run's best weights on the test split and returns its record. A run that has test scores stays as it is.

    Writes `test_scores.csv` if the run's metric is a mean over examples, then the record.

    Raises:
        ConfigError: There is no test split, or it can't be read.
        RecordError: The record or the weights are missing or damaged.
        OutOfMemory: The evaluation does not fit.
    """
    record = read_run(folder)
    if record.test:
        return record
    config = restore_config(record)
    split = inputs.splits.test()
    task = inputs.splits.task_of(split)
    model = restore_model(config, inputs.whole_base(config), folder=folder / "best")
    with memory_errors_as_ours(), inputs.telemetry.phase("evaluating"):
        values, examples = evaluate_model(model, split, task=task, config=config, inputs=inputs)
        answers = score_answers(model, split, config=config, inputs=inputs) if is_generating(config.data) else {}
    lines = _row_scores_csv(record.metric, examples, task=task, value=values[record.metric])
    if lines is not None:
        path = folder / TEST_SCORES_FILE
        write_atomically(path, lines)
        record.files[TEST_SCORES_FILE] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    record.data[split.name] = split.describe()
    record.notes += [note for note in split.notes if note not in record.notes]
    record.test = values | answers
    write_record(record, folder)  # last, because a record with test scores is not scored again
    return record


def evaluate_model(model: nn.Module, split: Split, *, task: Task, config: RunConfig, inputs: RunInputs) -> Scores:
    """Evaluates a prepared model on every example of a split, in the precision and batch size of its run.

    `task` must be the task of that split (`DataSplits.task_of`). The model is on the CPU and in evaluation mode
    afterwards. No random numbers are drawn.
    """
    device = device_of(config.trainer)
    batches = EvaluationSampler(split, batch_size=config.trainer.eval_batch_size)
    evaluation = Evaluation(task)
    model.to(device).eval()
    with torch.no_grad(), inputs.autocast(config):
        for micro in batches:
            evaluation.update(task.score(model, move_batch(split.batch(micro.indices), device)))
    model.cpu()
    values = {name: float(value) for name, value in evaluation.compute().items()}
    by_example = torch.tensor(batches.order).argsort()  # the batches came sorted by length
    return Scores(values, evaluation.examples.map(lambda column: column.cpu()[by_example]))


def _row_scores_csv(metric: str, examples: ExampleScores, *, task: Task, value: float) -> str | None:
    """Returns lines `row,score,weight` for the examples; None if the metric is not the weighted mean of such scores.

    For perplexity the scores are losses, and the metric is the exponential of their mean.
    """
    per_example = task.per_example(metric, examples)
    if per_example is None:
        return None
    scores, weights = (column.double().cpu() for column in per_example)
    mean = (scores * weights).sum() / weights.sum()
    implied = mean.exp() if metric == "perplexity" else mean
    if not torch.isclose(implied, torch.tensor(value, dtype=torch.float64), rtol=1e-6, atol=1e-9):
        return None  # for example if class weights change the loss and not the metric
    columns = range(len(scores)), scores.tolist(), weights.tolist()
    return csv_text(("row", "score", "weight"), zip(*columns, strict=True))

"""Evaluates the model of a finished run on a split."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.rows import Rows, move_batch
from lorasweep.disk import csv_text
from lorasweep.objectives.objective import EXAMPLE_FIELDS, Evaluation, ExampleScores, Objective, read_metrics
from lorasweep.tasks.splits import DataSplits
from lorasweep.training.environment import get_device
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.step import SlotNumbers


class Scores(NamedTuple):
    """Every metric of a model on a split, and the scores of its examples in the order of the split."""

    values: dict[str, float]
    examples: ExampleScores


class ScoresOnTest(NamedTuple):
    """The scores of a model on test data."""

    values: dict[str, float]
    lines: str | None
    """CSV lines `row,score,weight,group`; None if the metric is not the weighted mean of scores."""


def score_split(model: nn.Module, splits: DataSplits, *, config: RunConfig, inputs: RunInputs) -> ScoresOnTest:
    """Scores a model on the test split, and leaves it on the CPU.

    A score is the value that `Objective.per_example` returns: for perplexity, the loss of an example.
    """
    split, metric = splits.test(), splits.metric
    objective = splits.objective.for_split(split)
    values, examples = evaluate_model(model, split, objective=objective, config=config, inputs=inputs)
    model.cpu()
    per_example = objective.per_example(metric, examples)
    if per_example is None:
        return ScoresOnTest(values, None)
    scores, weights = (column.double().cpu() for column in per_example)
    implied = objective.from_mean(metric, (scores * weights).sum() / weights.sum())
    if not torch.isclose(implied, torch.tensor(values[metric], dtype=torch.float64), rtol=1e-6, atol=1e-9):
        return ScoresOnTest(values, None)  # for example if class weights change the loss and not the metric
    groups = split.groups or tuple(map(str, range(len(split))))
    rows = zip(range(len(scores)), scores.tolist(), weights.tolist(), groups, strict=True)
    return ScoresOnTest(values, csv_text(("row", "score", "weight", "group"), rows))


def evaluate_model(
    model: nn.Module, split: Rows, *, objective: Objective, config: RunConfig, inputs: RunInputs
) -> Scores:
    """Evaluates a prepared model on every example of a split, in the precision and batch size of its run.

    `objective` must be that of the split (`Objective.for_split`). Afterwards the model is on the run's device and in
    evaluation mode. Draws no random numbers.
    """
    batches = EvaluationSampler(split, batch_size=config.trainer.eval_batch_size)
    device = get_device(config.trainer)
    model.to(device).eval()
    evaluation = Evaluation(objective, sync_on_compute=False)  # in this process alone
    numbers = SlotNumbers([config], objective)
    with inputs.autocast(config), torch.no_grad():
        for micro in batches:
            batch = move_batch(split.batch(micro.indices), device)
            evaluation.update(objective.score(model, numbers.add_to(batch)))
    [values] = read_metrics([evaluation.compute()])
    by_example = torch.tensor(batches.order).argsort()  # back to the order of the split; batches are sorted by length
    return Scores(values, evaluation.examples.map(lambda values: values.cpu()[by_example], names=EXAMPLE_FIELDS))

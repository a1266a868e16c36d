"""Scores a model on a split of the data outside of training: the test split, or a model that was changed afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.split import Split, move_batch
from lorasweep.data.tasks import Evaluation, ExampleScores, Task
from lorasweep.methods import METHODS
from lorasweep.training.environment import Precision, device_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """What a model scores on a split."""

    values: dict[str, float]
    """Every metric of the task."""
    examples: ExampleScores
    """Per row, in the split's own order."""


def evaluate_model(model: nn.Module, split: Split, *, task: Task, config: RunConfig, precision: Precision) -> Scored:
    """Evaluates a prepared model on every row of a split, in the precision and batches of its run.

    The model is on the CPU and in evaluation mode afterwards; torch's random stream is left as it is.

    Args:
        model: What `prepare_model` gives, trained or with weights loaded.
        split: The rows.
        task: What they are scored by; for another split than validation, that split's (`DataSplits.task_of`).
        config: The run's settings.
        precision: That of the inputs.
    """
    device = device_of(config.trainer)
    mixed = precision == "bf16" and METHODS[config.method.name].needs_autocast
    batches = EvaluationSampler(split, batch_size=config.trainer.eval_batch_size)
    evaluation = Evaluation(task)
    model.to(device).eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        for micro in batches:
            evaluation.update(task.score(model, move_batch(split.batch(micro.indices), device)))
    values = {name: float(value) for name, value in evaluation.compute().items()}
    examples = in_order(evaluation.examples, batches.order)
    model.cpu()
    return Scored(values=values, examples=examples)


def in_order(rows: ExampleScores, order: list[int]) -> ExampleScores:
    """Returns rows that came in this order in the order of their numbers, on the CPU."""
    places = torch.tensor(order).argsort()
    return rows.map(lambda values: values.cpu()[places])

"""Records complete runs with test scores, on which `bench_answers.py` replays whole sweeps up to their verdicts.

    python benchmarks/record_answers.py --task stdlib_docs --seed 0 [--quarter | --rung] [key=value ...]

Trains LoRA at every rank × learning rate of a grid and full fine-tuning at every learning rate, with one seed, and
scores the frozen base. Each run goes to its end without a stopping rule; the weights of its best evaluation on
validation data are scored on test data, as the product does. Writes benchmarks/answers/TASK_seedN.csv with one row per
run. `values` and `losses` have the metric and the loss on validation data at each evaluation. `test` has the mean test
score of each group of examples (a document), in the order of TASK.json, or one digit per example. With `--quarter`,
runs have a quarter of the steps and no test scores, and go to benchmarks/answers/quarter. With `--rung`, runs end at
half, and benchmarks/answers/rung has the metric on all validation examples and on the part of them that sweeps use
there. A file that exists is left as it is.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from curves.record import LoraPack, Point, SoloTrial
from torch import Tensor

from lorasweep.config.compose import compose_run
from lorasweep.config.run import SEED_KEYS
from lorasweep.data.batching import EvaluationSampler, choose_part
from lorasweep.data.tasks import ExampleScores, Task
from lorasweep.training.environment import deterministic_algorithms
from lorasweep.training.inputs import RunInputs, build_inputs
from lorasweep.training.module import prepare_model
from lorasweep.training.optim import schedule_factor
from lorasweep.training.score import evaluate_model

FOLDER = Path(__file__).parent / "answers"
ALPHA = 16.0
DECADES = 2.0
LANGUAGE = {
    "model": "tiny",
    "data.max_validation_blocks": 96,
    "trainer.max_steps": 60,
    "trainer.batch_size": 8,
    "trainer.eval_every_steps": 10,
}


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """Settings of a task, and its grid of ranks and learning rates. Rates cover two decades from the lowest rate."""

    settings: Mapping[str, Any]
    ranks: tuple[int, ...]
    num_rates: int
    lora_lr_low: float
    full_lr_low: float

    def list_rates(self, low: float) -> list[float]:
        return [float(f"{low * 10 ** (DECADES * n / (self.num_rates - 1)):.5g}") for n in range(self.num_rates)]


TASKS = {
    "stdlib_docs": AnswerTask(
        settings={**LANGUAGE, "data": "stdlib_docs"},
        ranks=(1, 2, 4, 8, 16, 64),
        num_rates=8,
        lora_lr_low=1e-3,
        full_lr_low=1e-4,
    ),
    "stdlib_code": AnswerTask(
        settings={**LANGUAGE, "data": "stdlib_code"},
        ranks=(1, 2, 4, 8, 16, 64),
        num_rates=8,
        lora_lr_low=1e-3,
        full_lr_low=1e-4,
    ),
    "movie_snippets": AnswerTask(
        settings={
            "model": "minilm",
            "model.attention": "eager",
            "data": "table",
            "data.max_length": 48,
            "data.max_validation_examples": 500,
            "trainer.max_steps": 84,
            "trainer.batch_size": 16,
            "trainer.eval_every_steps": 42,
        },
        ranks=(1, 4, 16, 64),
        num_rates=6,
        lora_lr_low=1e-4,
        full_lr_low=1e-5,
    ),
}


def take_quarter(task: AnswerTask) -> AnswerTask:
    """Returns the task with runs of a quarter of the steps, which are evaluated three times."""
    steps = task.settings["trainer.max_steps"] // 4
    return replace(task, settings={**task.settings, "trainer.max_steps": steps, "trainer.eval_every_steps": steps // 3})


def record(
    task: AnswerTask, *, seed: int, overrides: Mapping[str, Any], has_test: bool = True
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains all runs of a task with one seed. Returns their rows, and the groups of the test examples."""
    shared = {**task.settings, **dict.fromkeys(SEED_KEYS, seed), **overrides}
    base = compose_run({**shared, "method": "frozen"})
    inputs = build_inputs(base)
    test = inputs.splits.test()
    groups = list(dict.fromkeys(test.groups)) if test.groups else []
    owner = torch.tensor([groups.index(group) for group in test.groups]) if groups else None
    metric = inputs.splits.metric
    rows = []

    def add(method: str, point: Point, curve: Sequence[Mapping[str, float]], best: int, test_scores: str) -> None:
        rows.append(
            {
                "method": method,
                "rank": point.rank or "",
                "alpha": "" if point.alpha is None else f"{point.alpha:g}",
                "lr": f"{point.lr:.5g}",
                "seed": seed,
                "best_evaluation": best,
                "values": " ".join(f"{values[metric]:.5g}" for values in curve),
                "losses": " ".join(f"{values['loss']:.5g}" for values in curve),
                "test": test_scores,
            }
        )

    with deterministic_algorithms(base.trainer.deterministic):
        model = prepare_model(base, inputs.base)
        scored = [
            evaluate_model(model, split, task=inputs.splits.get_task(split), config=base, inputs=inputs)
            for split in (inputs.splits.validation, test)
        ]
        text = _describe_scores(inputs.splits.get_task(test), metric, scored[1].examples, owner)
        add("frozen", Point(number=-1, lr=0.0), [scored[0].values], 0, text)
        weights = torch.zeros(len(groups)).index_add_(0, owner, test.weights) if owner is not None else None
        for method, trials in _list_trials(task, shared, inputs):
            curves, best, texts = train(trials, metric=metric, owner=owner, has_test=has_test)
            for slot, point in enumerate(trials.points):
                add(method, point, curves[slot], best[slot], texts[slot])
    return rows, {
        "metric": metric,
        "settings": dict(task.settings),
        "groups": groups,
        "weights": [] if weights is None else weights.tolist(),
    }


def record_rungs(task: AnswerTask, *, seed: int, overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Trains all runs of a task with one seed to their half. Returns their rows, with two values each."""
    shared = {**task.settings, **dict.fromkeys(SEED_KEYS, seed), **overrides}
    base = compose_run({**shared, "method": "frozen"})
    inputs = build_inputs(base)
    split, metric, rows = inputs.splits.validation, inputs.splits.metric, []
    part = torch.tensor(choose_part(len(split), base.trainer.eval_fraction))
    with deterministic_algorithms(base.trainer.deterministic):
        for method, trials in _list_trials(task, shared, inputs):
            config = trials.configs[0] if isinstance(trials, LoraPack) else trials.config
            steps, task_ = config.trainer.max_steps, inputs.splits.task
            for step in range(steps // 2):
                trials.train_step(
                    step, factor=schedule_factor(config.schedule, step, max_steps=steps, lr=config.optim.lr)
                )
            if isinstance(trials, LoraPack):
                order = torch.tensor(
                    EvaluationSampler(split, batch_size=config.trainer.eval_batch_size).order
                ).argsort()
                scored = [evaluation.examples.reorder(order) for evaluation in trials.score(split)]
            else:
                scored = [evaluate_model(trials.model, split, task=task_, config=config, inputs=inputs).examples]
            for point, examples in zip(trials.points, scored, strict=True):
                parts = {"full": examples, "part": examples.reorder(part)}
                values = {name: f"{float(task_.compute(each)[metric]):.5g}" for name, each in parts.items()}
                rows.append(
                    {"method": method, "rank": point.rank or "", "lr": f"{point.lr:.5g}", "seed": seed, **values}
                )
    return rows


def train(
    trials: LoraPack | SoloTrial, *, metric: str, owner: Tensor | None, has_test: bool
) -> tuple[list[list[dict[str, float]]], list[int], list[str]]:
    """Trains trials to their end.

    Returns for each trial its validation metrics at each evaluation, the number of its best evaluation, and the test
    scores of the weights at that evaluation.
    """
    inputs, config = trials.inputs, trials.configs[0] if isinstance(trials, LoraPack) else trials.config
    test, steps, every = inputs.splits.test(), config.trainer.max_steps, config.trainer.eval_every_steps
    sign = -1 if metric == "accuracy" else 1
    num = len(trials.points)
    parameters = (
        [optimizer.parameters for optimizer in trials.optimizers]
        if isinstance(trials, LoraPack)
        else [trials.trained()]
    )
    curves: list[list[dict[str, float]]] = [[] for _ in range(num)]
    best, weights = [0] * num, [[p.detach().clone() for p in own] for own in parameters]
    for step in range(steps):
        factor = schedule_factor(config.schedule, step, max_steps=steps, lr=config.optim.lr)  # the same at each rate
        trials.train_step(step, factor=factor)
        if (step + 1) % every:
            continue
        for slot, values in enumerate(trials.evaluate()):
            curve = curves[slot]
            curve.append(values)
            if len(curve) == 1 or sign * values[metric] < sign * curve[best[slot]][metric]:
                best[slot], weights[slot] = len(curve) - 1, [p.detach().clone() for p in parameters[slot]]
    if not has_test:
        return curves, best, [""] * num
    with torch.no_grad():
        for own, kept in zip(parameters, weights, strict=True):
            for parameter, value in zip(own, kept, strict=True):
                parameter.copy_(value)
    task = inputs.splits.get_task(test)
    if isinstance(trials, LoraPack):
        order = torch.tensor(EvaluationSampler(test, batch_size=config.trainer.eval_batch_size).order).argsort()
        examples = [evaluation.examples.reorder(order) for evaluation in trials.score(test)]
    else:
        examples = [evaluate_model(trials.model, test, task=task, config=config, inputs=inputs).examples]
    return curves, best, [_describe_scores(task, metric, each, owner) for each in examples]


def _list_trials(
    task: AnswerTask, shared: Mapping[str, Any], inputs: RunInputs
) -> Iterator[tuple[str, LoraPack | SoloTrial]]:
    for rank in task.ranks:
        points = [
            Point(number=n, rank=rank, alpha=ALPHA, lr=lr) for n, lr in enumerate(task.list_rates(task.lora_lr_low))
        ]
        own = {"method": "lora", "method.rank": rank, "method.alpha": ALPHA}
        yield (
            "lora",
            LoraPack(
                points,
                [compose_run({**shared, **own, "optim.lr": point.lr}) for point in points],
                inputs=inputs,
            ),
        )
    for n, lr in enumerate(task.list_rates(task.full_lr_low)):
        config = compose_run({**shared, "method": "full", "optim.lr": lr})
        yield "full", SoloTrial(Point(number=n, lr=lr), config, inputs=inputs)


def _describe_scores(task: Task, metric: str, examples: ExampleScores, owner: Tensor | None) -> str:
    """Returns the mean score of each group, or one digit per example of an accuracy."""
    per_example = task.per_example(metric, examples)
    assert per_example is not None
    scores, weights = (column.double().cpu() for column in per_example)
    if owner is None:
        return "".join(str(int(score)) for score in scores)
    size = int(owner.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, owner, scores * weights)
    totals = torch.zeros(size, dtype=torch.float64).index_add_(0, owner, weights)
    return " ".join(f"{value:.5g}" for value in (sums / totals).tolist())


def main() -> None:
    """Reads the arguments and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--quarter", action="store_true", help="runs of a quarter of the steps")
    parser.add_argument("--rung", action="store_true", help="runs to their half, scored on two sets of examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as data.train=train.tsv")
    args = parser.parse_args()
    task, folder = TASKS[args.task], FOLDER
    if args.quarter:
        task, folder = take_quarter(task), FOLDER / "quarter"
    elif args.rung:
        folder = FOLDER / "rung"
    path = folder / f"{args.task}_seed{args.seed}.csv"
    if path.exists():
        return
    began = time.monotonic()
    overrides = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in args.overrides)}
    folder.mkdir(exist_ok=True)
    if args.rung:
        rows = record_rungs(task, seed=args.seed, overrides=overrides)
    else:
        rows, groups = record(task, seed=args.seed, overrides=overrides, has_test=not args.quarter)
        (folder / f"{args.task}.json").write_text(json.dumps(groups, indent=1) + "\n")
    with path.with_suffix(".part").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".part").rename(path)
    print(f"{path.name}: {len(rows)} runs, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

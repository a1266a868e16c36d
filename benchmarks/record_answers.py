"""Records complete runs with test scores, on which `bench_answers.py` replays whole sweeps up to their verdicts.

    python benchmarks/record_answers.py --task stdlib_docs --seed 0 [key=value ...]
    python benchmarks/record_answers.py --task movie_snippets --seed 0 --rates 0.0025 [key=value ...]

Trains LoRA at every rank × learning rate of a grid and full fine-tuning at every learning rate, with one seed, and
scores the frozen base. Each run goes to its end; the weights of its best evaluation on validation data are scored on
test data, as the product does. Writes benchmarks/answers/TASK_seedN.csv with one row per run. `values` and `losses`
have the metric and the loss on validation data at each evaluation. `test` has the mean test score of each group of
examples (a document), in the order of TASK.json, or one digit per example. `--ranks` and `--rates` choose LoRA's runs
and leave out full fine-tuning; `--full-rates` chooses its runs. Rows that are stored already are not recorded again.
With `--recipe NAME` the file is benchmarks/answers/recipes/TASK-NAME_seedN.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from curves.record import NUM_SLOTS, LoraPack, Point, SoloTrial
from torch import Tensor

from lorasweep.config.compose import compose_run
from lorasweep.config.run import SEED_KEYS
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.tasks import ExampleScores, Task
from lorasweep.training.environment import deterministic_algorithms
from lorasweep.training.inputs import RunInputs, build_inputs
from lorasweep.training.module import prepare_model
from lorasweep.training.optim import schedule_factor
from lorasweep.training.score import evaluate_model

FOLDER = Path(__file__).parent / "answers"
COLUMNS = ("method", "rank", "alpha", "lr", "seed", "best_evaluation", "values", "losses", "test")
ALPHA = 16.0
DECADES = 2.0
LANGUAGE = {
    "model": "tiny",
    "data.max_validation_blocks": 96,
    "trainer.max_steps": 60,
    "trainer.batch_size": 8,
    "trainer.eval_every_steps": 10,
}


SENTENCES = {
    "model": "minilm",
    "model.attention": "eager",
    "data": "table",
    "data.max_length": 48,
    "data.max_validation_examples": 500,
    "trainer.max_steps": 84,
    "trainer.batch_size": 16,
    "trainer.eval_every_steps": 42,
}
Key = tuple[str, str, str]
"""Method, rank and learning rate of a stored run, as its row has them."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs that are trained: LoRA at ranks × rates, full fine-tuning at its rates."""

    ranks: Sequence[int]
    rates: Sequence[float]
    full_rates: Sequence[float]


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
        settings=SENTENCES,
        ranks=(1, 4, 16, 64),
        num_rates=6,
        lora_lr_low=1e-4,
        full_lr_low=1e-5,
    ),
    "news_topics": AnswerTask(  # AG News: title and description of an article, four topics
        settings=SENTENCES,
        ranks=(1, 4, 16, 64),
        num_rates=6,
        lora_lr_low=1e-4,
        full_lr_low=1e-5,
    ),
    "e2e_nlg": AnswerTask(
        settings={
            "model": "tiny",
            "data": "chat",
            "data.max_length": 320,
            "data.max_validation_examples": 128,
            "data.max_test_examples": 600,
            "trainer.max_steps": 60,
            "trainer.batch_size": 8,
            "trainer.eval_every_steps": 30,
        },
        ranks=(1, 4, 16, 64),
        num_rates=6,
        lora_lr_low=1e-3,
        full_lr_low=1e-4,
    ),
}


def record(
    task: AnswerTask, *, seed: int, grid: Grid, known: Collection[Key], overrides: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains the runs of a grid that are not known with one seed.

    Returns their rows, and the groups of the test examples.
    """
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
        if ("frozen", "", "0") not in known:
            add("frozen", Point(number=-1, lr=0.0), [scored[0].values], 0, text)
        weights = torch.zeros(len(groups)).index_add_(0, owner, test.weights) if owner is not None else None
        for method, trials in _list_trials(grid, known, shared, inputs):
            curves, best, texts = train(trials, metric=metric, owner=owner)
            for slot, point in enumerate(trials.points):
                add(method, point, curves[slot], best[slot], texts[slot])
    return rows, {
        "metric": metric,
        "settings": dict(task.settings),
        "groups": groups,
        "weights": [] if weights is None else weights.tolist(),
    }


def train(
    trials: LoraPack | SoloTrial, *, metric: str, owner: Tensor | None
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
    grid: Grid, known: Collection[Key], shared: Mapping[str, Any], inputs: RunInputs
) -> Iterator[tuple[str, LoraPack | SoloTrial]]:
    """Yields packs of LoRA's runs that are not known, and each such run of full fine-tuning."""
    wanted = [(rank, lr) for rank in grid.ranks for lr in grid.rates if ("lora", str(rank), f"{lr:.5g}") not in known]
    for first in range(0, len(wanted), NUM_SLOTS):
        points = [
            Point(number=first + n, rank=rank, alpha=ALPHA, lr=lr)
            for n, (rank, lr) in enumerate(wanted[first : first + NUM_SLOTS])
        ]
        own = [{"method": "lora", "method.rank": p.rank, "method.alpha": ALPHA, "optim.lr": p.lr} for p in points]
        yield "lora", LoraPack(points, [compose_run({**shared, **each}) for each in own], inputs=inputs)
    for n, lr in enumerate(grid.full_rates):
        if ("full", "", f"{lr:.5g}") not in known:
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
    parser.add_argument("--ranks", type=int, nargs="+", help="default: those of the task")
    parser.add_argument("--rates", type=float, nargs="+", help="LoRA's learning rates; default: those of the task")
    parser.add_argument("--full-rates", type=float, nargs="*", help="those of full fine-tuning")
    parser.add_argument("--recipe", help="name of the settings that differ from the defaults, such as warmup15")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as data.train=train.tsv")
    args = parser.parse_args()
    task, folder, name = TASKS[args.task], FOLDER, args.task
    if args.recipe:
        folder, name = FOLDER / "recipes", f"{args.task}-{args.recipe}"
    chooses_lora = args.ranks is not None or args.rates is not None
    full_rates = [] if chooses_lora else task.list_rates(task.full_lr_low)
    grid = Grid(
        ranks=args.ranks or task.ranks,
        rates=args.rates or task.list_rates(task.lora_lr_low),
        full_rates=full_rates if args.full_rates is None else args.full_rates,
    )
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}_seed{args.seed}.csv"
    stored: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            stored = list(csv.DictReader(file))
    began = time.monotonic()
    overrides = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in args.overrides)}
    known = {(row["method"], row["rank"], row["lr"]) for row in stored}
    rows, about = record(task, seed=args.seed, grid=grid, known=known, overrides=overrides)
    if not args.recipe:
        (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    with path.with_suffix(".part").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*stored, *rows], key=_sort_key))
    path.with_suffix(".part").rename(path)
    print(f"{path.name}: {len(rows)} runs, {time.monotonic() - began:.0f} s", flush=True)


def _sort_key(row: Mapping[str, Any]) -> tuple[int, int, float]:
    return ("frozen", "lora", "full").index(row["method"]), int(row["rank"] or 0), float(row["lr"])


if __name__ == "__main__":
    main()

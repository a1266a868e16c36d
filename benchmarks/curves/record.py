"""Records complete learning curves of many LoRA trials, which `bench_proposals.py` replays searches on.

    python benchmarks/curves/record.py --task stdlib_docs_lora --seed 0 --out FILE.csv [--grid] [key=value]

Trains every trial of a task to its end and writes one CSV row per trial and evaluation: `value` (the task's metric) and
`val_loss`. With `--grid` the trials are a grid of rank × α/r × learning rate. Data order, initial values, dropout
streams, schedule and clipping are those of the product; trials share a pack. A file that is complete is left as it is.

`record_answers.py` trains with the same classes, also full fine-tuning.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lorasweep.config.compose import compose_run
from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.data.batching import StepBatchSampler, build_evaluation_loader
from lorasweep.data.split import Split, repeat_batch
from lorasweep.data.tasks import Evaluation
from lorasweep.lora import inject_packed_lora, set_dropout_streams, slot_model
from lorasweep.lora.packed.inject import find_slots
from lorasweep.methods import METHODS, add_head_to_modules_to_save, copy_sharing_weights, draw_head
from lorasweep.training.environment import deterministic_algorithms
from lorasweep.training.inputs import RunInputs, build_inputs
from lorasweep.training.module import prepare_model
from lorasweep.training.optim import build_optimizer, schedule_factor
from lorasweep.training.packs.pack import build_pack_batch, compute_slot_losses
from lorasweep.training.packs.slot_run import SlotOptimizer
from lorasweep.training.score import evaluate_model
from lorasweep.training.unpadded import unpadded

NUM_EVALUATIONS = 12
NUM_TRIALS = 24
NUM_SLOTS = 8
SPACE_SEED = 0
"""Seed of the scrambled Sobol points; the trials of a task are the same for all seeds of training."""
COLUMNS = (
    *("task", "seed", "trial", "rank", "alpha", "lr"),
    *("evaluation", "step", "value", "val_loss"),
)
GRID_RANKS = (1, 2, 4, 8, 16, 32)
GRID_RATIOS = (0.5, 1.0, 2.0, 4.0)
GRID_RATES = 10
GRID_SETTINGS = {"trainer.max_steps": 36}
GRID_EVALUATIONS = (2, 4, 6, 8, 10, 12)

LANGUAGE = {
    "model": "tiny",
    "data.metric": "bits_per_byte",
    "trainer.max_steps": 60,
    "trainer.batch_size": 8,
}
DOCUMENTS = {**LANGUAGE, "data.block_length": 64, "data.max_validation_blocks": 48}
SENTENCES = {
    "model": "minilm",
    "model.attention": "eager",
    "data": "table",
    "data.metric": "accuracy",
    "data.max_length": 24,
    "data.max_validation_examples": 200,
    "trainer.max_steps": 84,
    "trainer.batch_size": 16,
}


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What is trained, and over which learning rates."""

    settings: Mapping[str, Any]
    lr_low: float
    """Lower end of two decades of learning rate."""
    evaluations: tuple[int, ...] = tuple(range(1, NUM_EVALUATIONS + 1))
    """Twelfths of the run at which trials are evaluated."""


TASKS = {
    "stdlib_docs_lora": TaskSettings(settings={**DOCUMENTS, "data": "stdlib_docs", "method": "lora"}, lr_low=5e-4),
    "stdlib_code_lora": TaskSettings(settings={**DOCUMENTS, "data": "stdlib_code", "method": "lora"}, lr_low=5e-4),
    "e2e_nlg_lora": TaskSettings(
        settings={
            **LANGUAGE,
            "data": "chat",
            "method": "lora",
            "data.max_length": 320,
            "data.max_validation_examples": 20,
            "trainer.batch_size": 3,
        },
        lr_low=5e-4,
    ),
    "movie_snippets_lora": TaskSettings(
        settings={**SENTENCES, "method": "lora"},
        lr_low=2e-4,
        evaluations=(2, 4, 6, 8, 12),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial's parameters; rank and alpha are None under full fine-tuning."""

    number: int
    lr: float
    rank: int | None = None
    alpha: float | None = None


def draw_points(task: TaskSettings) -> list[Point]:
    """Returns the trials of a task: rank 1 to 64 and α/r 1 to 4 on log scales, and two decades of learning rate."""
    engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=SPACE_SEED)
    points = []
    for number, unit in enumerate(engine.draw(NUM_TRIALS, dtype=torch.float64).tolist()):
        lr = _round(task.lr_low * 100 ** unit[0])
        rank = round(64 ** unit[1])
        alpha = _round(rank * 4 ** unit[2])
        points.append(Point(number=number, lr=lr, rank=rank, alpha=alpha))
    return points


def grid_points(task: TaskSettings) -> list[Point]:
    """Returns a grid of ranks, α/r and learning rates over two decades."""
    rates = [_round(task.lr_low * 100 ** (n / (GRID_RATES - 1))) for n in range(GRID_RATES)]
    settings = itertools.product(GRID_RANKS, GRID_RATIOS, rates)
    return [
        Point(number=number, rank=rank, alpha=rank * ratio, lr=lr) for number, (rank, ratio, lr) in enumerate(settings)
    ]


class LoraPack:
    """LoRA trials in the slots of one packed model; does what `PackTrainer` does in a step and an evaluation."""

    def __init__(self, points: Sequence[Point], configs: Sequence[RunConfig], *, inputs: RunInputs) -> None:
        """Fills a slot with each trial."""
        self.points, self.configs, self.inputs = points, configs, inputs
        seeds = configs[0].seeds
        torch.manual_seed(seeds.dropout)
        self.model: nn.Module = copy_sharing_weights(inputs.base.model)
        start = functools.partial(draw_head, names=inputs.base.new_head_names)
        generators = [torch.Generator().manual_seed(seeds.init) for _ in configs]
        methods = [add_head_to_modules_to_save(_lora(config), inputs.base.new_head_names) for config in configs]
        inject_packed_lora(self.model, methods, generators=generators, prepare_copy=start)
        self.model.train()
        self.optimizers = [SlotOptimizer(slot_model(self.model, slot), config) for slot, config in enumerate(configs)]
        self.streams = [torch.Generator().manual_seed(seeds.dropout) for _ in configs]
        set_dropout_streams(self.model, self.streams)
        self.order = _order(configs[0], inputs)

    def train_step(self, step: int, *, factor: float) -> None:
        """Makes one step in every slot; all slots see the same rows, since their seeds are the same."""
        slots = len(self.points)
        for micro in self.order.get_step(step):
            rows = build_pack_batch(self.inputs.splits.train, [micro] * slots, model=self.model)
            layout = self.inputs.lay_out(rows, self.configs[0].trainer, model=self.model, slots=slots)
            with unpadded(self.model, layout, note_lengths=find_slots(self.model).note_lengths):
                losses = compute_slot_losses(self.inputs.splits.task, self.model, rows, slots=slots)
            (losses / micro.step_weight).sum().backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            for group in optimizer.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()

    def evaluate(self) -> list[dict[str, float]]:
        """Evaluates all slots batch by batch."""
        return [_floats(evaluation.compute()) for evaluation in self.score(self.inputs.splits.validation)]

    @torch.no_grad()
    def score(self, split: Split) -> list[Evaluation]:
        """Evaluates all slots on a split; examples are in the order of the evaluation's batches."""
        slots, task = len(self.points), self.inputs.splits.get_task(split)
        evaluations = [Evaluation(task) for _ in self.points]
        self.model.eval()
        find_slots(self.model).note_lengths(None)
        rows_per_batch = self.configs[0].trainer.eval_batch_size
        for batch in build_evaluation_loader(split, batch_size=rows_per_batch):
            scores = task.score(self.model, repeat_batch(batch, slots=slots))
            for slot, evaluation in enumerate(evaluations):
                evaluation.update(scores.select_slot(slot, slots=slots))
        self.model.train()
        return evaluations


class SoloTrial:
    """One trial alone; does what `TrainingModule` and Lightning do in a step and an evaluation."""

    def __init__(self, point: Point, config: RunConfig, *, inputs: RunInputs) -> None:
        """Prepares the model as the method says."""
        self.points, self.config, self.inputs = (point,), config, inputs
        method = METHODS[config.method.name]
        self.model = prepare_model(config, inputs.base)
        groups = method.trainable_groups(self.model, lr_ratio_b=config.optim.lr_ratio_b)
        self.optimizer = build_optimizer(config.optim, groups)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.mixed = inputs.precision == "bf16" and method.needs_autocast
        self.order = _order(config, inputs)

    def train_step(self, step: int, *, factor: float) -> None:
        """Makes one step."""
        for micro in self.order.get_step(step):
            with self._autocast():
                losses = self.inputs.splits.task.losses(self.model, self.inputs.splits.train.batch(micro.indices))
                loss = losses.sum() / micro.step_weight
            loss.backward()  # type: ignore[no-untyped-call]
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> list[dict[str, float]]:
        """Evaluates the model."""
        inputs = self.inputs
        scored = evaluate_model(
            self.model, inputs.splits.validation, task=inputs.splits.task, config=self.config, inputs=inputs
        )
        self.model.train()
        return [scored.values]

    def trained(self) -> list[nn.Parameter]:
        """Returns the parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one evaluation of one trial gave."""

    point: Point
    evaluation: int
    step: int
    values: Mapping[str, float]


def record_curves(trials: LoraPack, *, evaluations: Sequence[int]) -> Iterator[Row]:
    """Trains under the runs' own schedule and yields each trial's evaluations."""
    config = trials.configs[0]
    steps = config.trainer.max_steps
    every = steps // NUM_EVALUATIONS
    for evaluation in range(1, NUM_EVALUATIONS + 1):
        for step in range((evaluation - 1) * every, evaluation * every):
            trials.train_step(step, factor=schedule_factor(config.schedule, step, max_steps=steps, lr=config.optim.lr))
        if evaluation in evaluations:
            for point, values in zip(trials.points, trials.evaluate(), strict=True):
                yield Row(point=point, evaluation=evaluation, step=evaluation * every, values=values)


def record(args: argparse.Namespace) -> None:
    """Trains the trials of a task and writes their rows."""
    if args.out.exists():
        print(f"{args.out} is there already.")
        return
    task = TASKS[args.task]
    own = GRID_SETTINGS if args.grid else {}
    settings = {**task.settings, **own, "seed": args.seed, **_parse(args.overrides)}
    points = grid_points(task) if args.grid else draw_points(task)
    points = [point for point in points[: args.trials] if args.ranks is None or point.rank in args.ranks]
    configs = [_config_of(settings, point) for point in points]
    inputs = build_inputs(configs[0])
    metric = inputs.splits.task.metrics[0] if settings["data.metric"] == "auto" else settings["data.metric"]
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    with deterministic_algorithms(configs[0].trainer.deterministic):
        frozen = compose_run({**settings, "method": "frozen"})
        values = evaluate_model(
            prepare_model(frozen, inputs.base),
            inputs.splits.validation,
            task=inputs.splits.task,
            config=frozen,
            inputs=inputs,
        ).values
        rows.append(_csv_row(args, metric, Row(point=Point(number=-1, lr=0.0), evaluation=0, step=0, values=values)))
        for trials in _build_packs(points, configs, inputs):
            found = record_curves(trials, evaluations=GRID_EVALUATIONS if args.grid else task.evaluations)
            rows += [_csv_row(args, metric, row) for row in found]
            print(f"{args.out.name}: {len(rows)} rows, {time.monotonic() - started:.0f} s", flush=True)
    rows.sort(key=lambda row: (row["trial"], row["evaluation"]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    whole = args.out.with_suffix(".part")
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    whole.rename(args.out)


def _build_packs(points: Sequence[Point], configs: Sequence[RunConfig], inputs: RunInputs) -> Iterator[LoraPack]:
    """Yields packs of neighbours in rank, since each pays for its greatest rank."""
    order = sorted(range(len(points)), key=lambda n: points[n].rank or 0)
    for first in range(0, len(order), NUM_SLOTS):
        chosen = order[first : first + NUM_SLOTS]
        yield LoraPack([points[n] for n in chosen], [configs[n] for n in chosen], inputs=inputs)


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    return {key: yaml.safe_load(value) for key, value in (override.split("=", 1) for override in overrides)}


def _config_of(settings: Mapping[str, Any], point: Point) -> RunConfig:
    own = {"method.rank": point.rank, "method.alpha": point.alpha, "optim.lr": point.lr}
    return compose_run({**settings, **own})


def _lora(config: RunConfig) -> LoraConfig:
    assert isinstance(config.method, LoraConfig)
    return config.method


def _order(config: RunConfig, inputs: RunInputs) -> StepBatchSampler:
    return StepBatchSampler(
        inputs.splits.train,
        batch_size=config.trainer.batch_size,
        num_steps=config.trainer.max_steps,
        seed=config.seeds.data_order,
    )


def _csv_row(args: argparse.Namespace, metric: str, row: Row) -> dict[str, Any]:
    point = row.point
    return {
        "task": args.task,
        "seed": args.seed,
        "trial": point.number,
        "rank": "" if point.rank is None else point.rank,
        "alpha": "" if point.alpha is None else f"{point.alpha:g}",
        "lr": f"{point.lr:.5g}",
        "evaluation": row.evaluation,
        "step": row.step,
        "value": f"{row.values[metric]:.5g}",
        "val_loss": f"{row.values['loss']:.5g}",
    }


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def main() -> None:
    """Reads the arguments and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, help="only so many of the trials, to try it out")
    parser.add_argument("--ranks", type=int, nargs="+", help="only the trials of these ranks")
    parser.add_argument("--grid", action="store_true", help="a grid of rank, α/r and learning rate")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as data.train=train.jsonl")
    record(parser.parse_args())


if __name__ == "__main__":
    main()

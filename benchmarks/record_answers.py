"""Records complete runs with test scores, on which `bench_answers.py` and `bench_proposals.py` replay searches.

    python benchmarks/record_answers.py --task stdlib_docs --seed 0 [key=value ...]
    python benchmarks/record_answers.py --task movie_snippets --seed 0 data.train=train.tsv data.test=test.tsv ...

Trains LoRA at every rank × learning rate of a grid and full fine-tuning at every learning rate, with one seed, each to
its end, and scores the weights of its best evaluation on test data, with the product's own code. Writes
benchmarks/answers/TASK_seedN.csv with a row per run, and TASK.json with the groups of the test examples. `values` and
`losses` have the metric and the loss on validation data at each evaluation, `test` the mean test score of each group.
Rows that are stored already are not recorded again. LoRA's runs were recorded in packs, which round differently.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorasweep.config.compose import compose_run
from lorasweep.config.run import SEED_KEYS
from lorasweep.record import read_steps
from lorasweep.training.finished_run import score_run
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone
from lorasweep.training.run_inputs import RunInputs

FOLDER = Path(__file__).parent / "answers"
COLUMNS = ("method", "rank", "alpha", "lr", "seed", "best_evaluation", "values", "losses", "test")
ALPHA = 16.0
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
CHAT = {
    "model": "tiny",
    "data": "chat",
    "data.max_length": 320,
    "data.max_validation_examples": 128,
    "data.max_test_examples": 600,
    "trainer.max_steps": 60,
    "trainer.batch_size": 8,
    "trainer.eval_every_steps": 30,
}
REPLIES = {
    "model": "tiny",
    "data": "preferences",
    "data.test_fraction": 0.3,
    "trainer.max_steps": 24,
    "trainer.batch_size": 8,
    "trainer.eval_every_steps": 12,
}
GRID = {
    **LANGUAGE,
    "data": "stdlib_docs",
    "data.block_length": 64,
    "data.max_validation_blocks": 48,
    "trainer.max_steps": 36,
    "trainer.eval_every_steps": 6,
}


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """Settings of a task, and its grid: LoRA at ranks × α × rates, full fine-tuning at rates."""

    settings: Mapping[str, Any]
    ranks: tuple[int, ...]
    ratios: tuple[float, ...] = ()
    """Values of α/r. Empty: α is `ALPHA` at every rank."""
    num_rates: int
    lora_lr_low: float
    """The lowest rate; the rates cover two decades."""
    full_lr_low: float | None

    def list_points(self) -> Iterator[dict[str, Any]]:
        """Yields the settings of each run, the frozen base first."""
        yield {"method": "frozen"}
        for rank in self.ranks:
            for alpha in [ratio * rank for ratio in self.ratios] or [ALPHA]:
                for lr in self._list_rates(self.lora_lr_low):
                    yield {"method": "lora", "method.rank": rank, "method.alpha": alpha, "optim.lr": lr}
        if self.full_lr_low is not None:
            for lr in self._list_rates(self.full_lr_low):
                yield {"method": "full", "optim.lr": lr}

    def _list_rates(self, low: float) -> list[float]:
        return [float(f"{low * 100 ** (n / (self.num_rates - 1)):.5g}") for n in range(self.num_rates)]


RANKS = (1, 4, 16, 64)
TEXT = {"ranks": (1, 2, 4, 8, 16, 64), "num_rates": 8, "lora_lr_low": 1e-3, "full_lr_low": 1e-4}
TASKS = {
    "stdlib_docs": AnswerTask(settings={**LANGUAGE, "data": "stdlib_docs"}, **TEXT),
    "stdlib_code": AnswerTask(settings={**LANGUAGE, "data": "stdlib_code"}, **TEXT),
    "movie_snippets": AnswerTask(settings=SENTENCES, ranks=RANKS, num_rates=6, lora_lr_low=1e-4, full_lr_low=1e-5),
    "e2e_nlg": AnswerTask(settings=CHAT, ranks=RANKS, num_rates=6, lora_lr_low=1e-3, full_lr_low=1e-4),
    "cafe_replies": AnswerTask(settings=REPLIES, ranks=RANKS, num_rates=5, lora_lr_low=3e-4, full_lr_low=3e-5),
    "grid_stdlib_docs": AnswerTask(  # for `bench_proposals.py`; it was stored without test scores
        settings=GRID,
        ranks=(1, 2, 4, 8, 16, 32),
        ratios=(0.5, 1.0, 2.0, 4.0),
        num_rates=10,
        lora_lr_low=5e-4,
        full_lr_low=None,
    ),
}
Row = dict[str, Any]


def record(point: Mapping[str, Any], shared: Mapping[str, Any], *, inputs: RunInputs) -> tuple[Row, dict[str, float]]:
    """Trains a run and returns its row, and the weight of each group of test examples."""
    config = compose_run({**shared, **point})
    metric = inputs.splits.metric
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        best_step = train_alone(config, RunFolder(path=folder), inputs=inputs).best["step"]
        score_run(folder, inputs=inputs)
        curve = [(row["step"], row["validation"]) for row in read_steps(folder, having='"validation"')]
        with (folder / "test_scores.csv").open(newline="") as file:
            examples = list(csv.DictReader(file))
    totals, weights = defaultdict[str, float](float), defaultdict[str, float](float)
    for example in examples:
        weights[example["group"]] += float(example["weight"])
        totals[example["group"]] += float(example["weight"]) * float(example["score"])
    row = {
        "method": point["method"],
        "rank": point.get("method.rank", ""),
        "alpha": f"{point['method.alpha']:g}" if "method.alpha" in point else "",
        "lr": f"{point.get('optim.lr', 0):.5g}",
        "seed": config.seed,
        "best_evaluation": [step for step, _ in curve].index(best_step),
        "values": " ".join(f"{values[metric]:.5g}" for _, values in curve),
        "losses": " ".join(f"{values['loss']:.5g}" for _, values in curve),
        "test": " ".join(f"{totals[group] / weights[group]:.5g}" for group in weights),
    }
    return row, weights


def main() -> None:
    """Reads the arguments and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--num-runs", type=int, help="record at most this many runs; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as data.train=train.tsv")
    args = parser.parse_args()
    task, path = TASKS[args.task], args.folder / f"{args.task}_seed{args.seed}.csv"
    rows: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    known = {_find_key(row) for row in rows}
    overrides = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in args.overrides)}
    shared = {**task.settings, "trainer.eval_fraction": 1.0, **dict.fromkeys(SEED_KEYS, args.seed), **overrides}
    config = compose_run(shared)
    inputs = load_inputs(config).prepare(config, folder=None)
    num_recorded = 0
    for point in task.list_points():
        lr, alpha = f"{point.get('optim.lr', 0):.5g}", point.get("method.alpha")
        if (point["method"], str(point.get("method.rank", "")), f"{alpha:g}" if alpha else "", lr) in known:
            continue
        if num_recorded == args.num_runs:
            break
        row, weights = record(point, shared, inputs=inputs)
        num_recorded += 1
        rows.append(row)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=_find_place))
        about = {"metric": inputs.splits.metric, "settings": dict(task.settings), "weights": [*weights.values()]}
        path.with_name(f"{args.task}.json").write_text(json.dumps(about, indent=1) + "\n")
        print(f"{path.name}: {len(rows)} runs", flush=True)


def _find_key(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return row["method"], str(row["rank"]), row["alpha"], row["lr"]


def _find_place(row: Mapping[str, Any]) -> tuple[int, int, float, float]:
    rank, alpha = int(row["rank"] or 0), float(row["alpha"] or 0)
    return ("frozen", "lora", "full").index(row["method"]), rank, alpha, float(row["lr"])


if __name__ == "__main__":
    main()

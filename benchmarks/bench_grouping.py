"""Compares training on batches of similar lengths with training on random batches, with the same seeds.

    python benchmarks/bench_grouping.py --task sentences|chats [--seeds 20] [--rates 1e-3 2e-3 4e-3] [--out FILE.csv]
        [key=value ...]

Trains LoRA at each rate with each seed in both ways, in packs, and scores the final weights on the validation split.
Prints for each rate the mean gain over the base in both ways, their paired difference with its 95 % interval, and the
rate that each way finds best: the vertex of a parabola through the means in the logarithm of the rate, and what the
other way loses at the best tried rate of this one. `sentences` needs `data.train=` and `data.validation=`. `chats`
writes conversations of two lengths from a file of prompts and completions: `--source train.jsonl test.jsonl`; every
second one has six turns. Rows that are stored in the file are not trained again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import yaml
from real_weights import minilm_folder

from lorasweep.config.compose import compose_run
from lorasweep.config.run import SEED_KEYS
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.run import train_alone, train_runs
from lorasweep.training.run_inputs import RunInputs

SLOTS = 5
TURNS = 6
"""Turns of a long conversation. A short one has one."""
COLUMNS = ("grouped", "lr", "seed", "score")
SHARED = {"method": "lora", "method.rank": 8, "method.alpha": 16, "trainer.eval_fraction": 1.0}
TASKS: Mapping[str, Mapping[str, Any]] = {
    "sentences": {
        "model": "classifier",
        "model.path": None,
        "data": "table",
        "data.max_length": 128,
        "trainer.max_steps": 125,
        "trainer.batch_size": 16,
    },
    "chats": {
        "model": "tiny",
        "data": "chat",
        "data.max_length": 1024,
        "trainer.max_steps": 60,
        "trainer.batch_size": 8,
    },
}
RATES = {"sentences": (1e-3, 2e-3, 4e-3), "chats": (4e-3, 8e-3, 16e-3)}


def write_conversations(source: Path, target: Path, *, limit: int) -> None:
    """Writes conversations of one turn and of `TURNS` turns by turns."""
    rows = iter([json.loads(line) for line in source.read_text().splitlines()])
    with target.open("w") as file:
        for number in range(limit):
            turns = list(itertools.islice(rows, TURNS if number % 2 else 1))
            if not turns:
                break
            messages = [
                {"role": role, "content": turn[column]}
                for turn in turns
                for role, column in (("user", "prompt"), ("assistant", "completion"))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def train(settings: Mapping[str, Any], points: Sequence[tuple[float, int]]) -> Iterator[tuple[float, int, float]]:
    """Trains a run for each rate and seed, and yields rate, seed and final score."""
    configs = [compose_run({**settings, "optim.lr": lr, **dict.fromkeys(SEED_KEYS, seed)}) for lr, seed in points]
    inputs: RunInputs = load_inputs(configs[0]).prepare(configs[0], folder=None)
    for first in range(0, len(points), SLOTS):
        scores: dict[int, float] = {}

        def note(evaluations: Sequence[Any], scores: dict[int, float] = scores) -> list[None]:
            for one in evaluations:
                scores[id(one.run)] = one.metrics[inputs.splits.metric]
            return [None] * len(evaluations)

        with tempfile.TemporaryDirectory() as name:
            requests = [
                RunRequest(config=config, run_folder=RunFolder(path=Path(name) / str(number)))
                for number, config in enumerate(configs[first : first + SLOTS])
            ]
            train_runs(
                requests,
                inputs=inputs,
                on_evaluation=note,
                on_end=lambda run, outcome: None,
                checkpoint_file=Path(name) / "pack.ckpt",
            )
            for (lr, seed), request in zip(points[first : first + SLOTS], requests, strict=True):
                yield lr, seed, scores.get(id(request), math.nan)


def report(rows: Sequence[Mapping[str, str]], *, base: float, sign: int) -> None:
    """Prints the gains by rate and way, their differences, and the rate that each way finds best."""
    scores = {(row["grouped"], float(row["lr"]), int(row["seed"])): float(row["score"]) for row in rows}
    rates, seeds = sorted({lr for _, lr, _ in scores}), sorted({seed for _, _, seed in scores})
    gain = {
        way: np.array([[sign * (base - scores.get((way, lr, seed), math.nan)) for seed in seeds] for lr in rates])
        for way in ("False", "True")
    }
    best = max(float(np.nanmean(gain["False"], axis=1).max()), 1e-9)
    print(f"base {base:.4g}, gains in % of the best mean gain of random batches ({best:.4g})")
    for index, lr in enumerate(rates):
        difference = (gain["True"] - gain["False"])[index]
        difference = 100 * difference[~np.isnan(difference)] / best
        half = scipy.stats.t.ppf(0.975, len(difference) - 1) * statistics.stdev(difference) / math.sqrt(len(difference))
        random, grouped = (100 * np.nanmean(gain[way][index]) / best for way in ("False", "True"))
        mean = difference.mean()
        print(
            f"lr {lr:g}: random {random:.1f} %, grouped {grouped:.1f} %, grouped - random {mean:+.2f} "
            f"[{mean - half:+.2f}, {mean + half:+.2f}] ({len(difference)} seeds)"
        )
    means = {way: np.nanmean(gain[way], axis=1) for way in gain}
    if len(rates) >= 3:
        generator = np.random.default_rng(0)
        logs = np.log(rates)

        def vertex(values: np.ndarray[Any, Any]) -> float:
            curvature, slope, _ = np.polyfit(logs, values, 2)
            inside = -slope / (2 * curvature) if curvature < 0 else logs[values.argmax()]
            return float(np.clip(inside, logs[0], logs[-1]))

        shift = math.exp(vertex(means["True"]) - vertex(means["False"]))
        draws = []
        for _ in range(2000):
            chosen = generator.integers(len(seeds), size=len(seeds))
            drawn = {way: np.nanmean(gain[way][:, chosen], axis=1) for way in gain}
            draws.append(math.exp(vertex(drawn["True"]) - vertex(drawn["False"])))
        low, high = np.quantile(draws, [0.025, 0.975])
        print(f"best rate, grouped / random: {shift:.2f} [{low:.2f}, {high:.2f}]")
    found = {way: int(means[way].argmax()) for way in means}
    for way, other in (("True", "False"), ("False", "True")):
        regret = 100 * (means[way].max() - means[way][found[other]]) / best
        name = "grouped" if way == "True" else "random"
        print(f"{name} batches at the rate that the other way finds: {regret:.2f} % of the gain lost")


def main() -> None:
    """Reads the arguments, trains what is missing, and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--source", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    settings = {**SHARED, **TASKS[args.task]}
    if args.task == "sentences":
        settings["model.path"] = str(minilm_folder())
    settings |= {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in args.overrides)}
    with tempfile.TemporaryDirectory() as name:
        if args.source is not None:
            for source, split, limit in zip(args.source, ("train", "validation"), (1000, 80), strict=True):
                settings[f"data.{split}"] = str(Path(name) / f"{split}.jsonl")
                write_conversations(source, Path(settings[f"data.{split}"]), limit=limit)
        settings["trainer.eval_every_steps"] = settings["trainer.max_steps"]
        rows: list[dict[str, str]] = []
        if args.out.exists():
            with args.out.open(newline="") as file:
                rows = list(csv.DictReader(file))
        known = {(row["grouped"], row["lr"], row["seed"]) for row in rows}
        rates = args.rates or RATES[args.task]
        # one chunk of seeds after another, in both ways, so that the file is paired whenever it is stopped
        for first in range(0, args.seeds, SLOTS):
            for lr, grouped in itertools.product(rates, (False, True)):
                seeds = range(first, min(first + SLOTS, args.seeds))
                points = [(lr, seed) for seed in seeds if (str(grouped), f"{lr:g}", str(seed)) not in known]
                for rate, seed, score in train({**settings, "data.group_by_length": grouped}, points) if points else ():
                    rows.append(dict(zip(COLUMNS, (str(grouped), f"{rate:g}", str(seed), f"{score:.6g}"), strict=True)))
                with args.out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
        base, sign = score_base(settings)
    report([row for row in rows if float(row["lr"]) in rates], base=base, sign=sign)


def score_base(settings: Mapping[str, Any]) -> tuple[float, int]:
    """Returns the score without training, of the constant answer or of the frozen base, and the sign of the metric."""
    rest = {key: value for key, value in settings.items() if not key.startswith("method")}
    config = compose_run({**rest, "method": "frozen"})
    inputs = load_inputs(config)
    metric = inputs.splits.score_metric
    constant = inputs.data.score_constant_answer(inputs.splits.validation)
    if metric.name in constant:
        return constant[metric.name], metric.sign
    with tempfile.TemporaryDirectory() as name:
        return train_alone(config, RunFolder(path=Path(name)), inputs=inputs).best[metric.name], metric.sign


if __name__ == "__main__":
    main()

r"""Does the best u = lr · √α depend on rank, α or β? Trains a grid in packs and prints the best u of each cell.

    python benchmarks/rate_law.py --ranks 1 8 64 --alphas 4 64 --table grid.csv model=causal_lm model.path=FOLDER \
        data=preferences data.train=train.jsonl data.validation=validation.jsonl data.test=test.jsonl \
        trainer.max_steps=40 trainer.batch_size=8
    python benchmarks/rate_law.py --ranks 8 --alphas 16 --betas 0.03 0.1 0.3 1 --table beta.csv ...

All runs have one seed, the same examples and the same steps, and are scored once, at their end, on all validation
examples. A cell is a rank, an α and perhaps a β. Its best u is the vertex of the parabola in log u through the lowest
validation loss and its two neighbours; `<` and `>` mark a lowest loss at an end of the grid. Rows in the table are
not trained again, so a second call may add values of u. Losses of different β must not be compared.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from side_by_side import print_head, print_row

from lorasweep.config.compose import compose_run
from lorasweep.errors import Diverged
from lorasweep.record import RunRecord
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.run import train_runs
from lorasweep.training.run_inputs import RunInputs

COLUMNS = ("rank", "alpha", "beta", "u", "lr", "loss", "preference_accuracy")
DEFAULT_U = (1.1e-4, 3.3e-4, 1e-3, 3e-3, 9e-3)


class Point(NamedTuple):
    """A run of the grid."""

    rank: int
    alpha: float
    beta: float | None
    u: float

    @property
    def lr(self) -> float:
        return float(f"{self.u / math.sqrt(self.alpha):.4g}")

    def list_settings(self) -> dict[str, Any]:
        settings = {"method.rank": self.rank, "method.alpha": self.alpha, "optim.lr": self.lr}
        return settings if self.beta is None else {**settings, "objective.beta": self.beta}


Losses = dict[Point, dict[str, float]]
"""The metrics of each run; infinite or missing where it diverged."""


def read_table(path: Path) -> Losses:
    """Returns the runs that a table has; none if there is no table."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        Point(int(row["rank"]), float(row["alpha"]), float(row["beta"]) if row["beta"] else None, float(row["u"])): {
            name: float(row[name]) for name in COLUMNS[5:] if row[name]
        }
        for row in rows
    }


def write_table(path: Path, losses: Losses) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for point in sorted(losses, key=lambda point: (point.beta or 0, *point)):
            writer.writerow({**point._asdict(), "lr": point.lr, **losses[point]})


def train_grid(
    points: Sequence[Point],
    shared: Mapping[str, Any],
    *,
    slots: int,
    num_runs: int | None,
    losses: Losses,
    table: Path,
) -> None:
    """Trains points that `losses` lacks, in packs, and adds each to `losses` and to the table when it ends."""
    missing = [point for point in points if point not in losses][:num_runs]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = compose_run(shared)
        inputs: RunInputs = load_inputs(config).prepare(config, folder=table.parent)  # a later call reads the reference
        asked: dict[Path, Point] = {}

        def make_request(point: Point) -> RunRequest:
            path = folder / str(len(asked))
            asked[path] = point
            return RunRequest(config=compose_run({**shared, **point.list_settings()}), run_folder=RunFolder(path=path))

        def end(request: RunRequest, record: RunRecord | Diverged) -> None:
            point = asked[request.run_folder.path]
            values: Mapping[str, float] = {"loss": math.inf} if isinstance(record, Diverged) else record.last
            losses[point] = {column: values[column] for column in COLUMNS[5:] if column in values}
            write_table(table, losses)
            print(f"{point}: {losses[point]}", flush=True)

        for number in range(0, len(missing), slots):
            train_runs(
                [make_request(point) for point in missing[number : number + slots]],
                inputs=inputs,
                on_evaluation=lambda evaluations: [None] * len(evaluations),
                on_end=end,
                checkpoint_file=folder / "pack.ckpt",
            )


def find_best_u(losses: Mapping[float, float]) -> tuple[float, str]:
    """Returns the vertex of the parabola in log u through the lowest loss and its neighbours.

    If the lowest loss is at an end, returns that u, with `<` or `>` for where the best one may be.
    """
    values = sorted(losses)
    best = min(range(len(values)), key=lambda n: losses[values[n]])
    if best in (0, len(values) - 1) or not all(math.isfinite(losses[values[n]]) for n in (best - 1, best + 1)):
        return values[best], "<" if best == 0 else ">" if best == len(values) - 1 else ""
    x, y = zip(*((math.log(values[n]), losses[values[n]]) for n in (best - 1, best, best + 1)), strict=True)
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - left / (2 * curvature)), ""


def print_cells(losses: Losses) -> None:
    """Prints for each cell the loss at each u, the best u, and the lowest loss."""
    all_u = sorted({point.u for point in losses})
    print_head("rank", "α", "α/r", "β", *(f"u {u:g}" for u in all_u), "best u", "best lr", "lowest loss", "accuracy")
    for cell, points in group_cells(losses):
        by_u = {point.u: losses[point]["loss"] for point in points}
        best, mark = find_best_u(by_u)
        lowest = min(points, key=lambda point: losses[point]["loss"])
        rank, alpha, beta = cell
        print_row(
            rank,
            f"{alpha:g}",
            f"{alpha / rank:g}",
            "" if beta is None else f"{beta:g}",
            *(f"{by_u[u]:.4f}" if u in by_u else "" for u in all_u),
            f"{mark}{best:.2g}",
            f"{best / math.sqrt(alpha):.2g}",
            f"{by_u[lowest.u]:.4f}",
            f"{losses[lowest].get('preference_accuracy', math.nan):.3f}",
        )


def group_cells(losses: Losses) -> Iterator[tuple[tuple[int, float, float | None], list[Point]]]:
    """Yields each rank, α and β, with its points."""
    ordered = sorted(losses, key=lambda point: (point.beta or 0, *point))
    for cell, points in itertools.groupby(ordered, key=lambda point: (point.rank, point.alpha, point.beta)):
        yield cell, list(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="CSV file of the runs, which is continued")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--alphas", nargs="+", type=float, default=[4.0, 64.0])
    parser.add_argument("--betas", nargs="+", type=float, default=[None], help="values of objective.beta")
    parser.add_argument("--u", nargs="+", type=float, default=list(DEFAULT_U), help="values of lr · √α")
    parser.add_argument("--slots", type=int, default=8, help="runs of a pack")
    parser.add_argument("--num-runs", type=int, help="train at most this many runs; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    overrides = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in arguments.overrides)}
    shared = {"method": "lora", "trainer.eval_fraction": 1.0, "logger": "none", **overrides}
    shared["trainer.eval_every_steps"] = shared["trainer.max_steps"] = shared.get("trainer.max_steps", 40)
    points = [
        Point(rank, alpha, beta, u)
        for beta, rank, alpha, u in itertools.product(arguments.betas, arguments.ranks, arguments.alphas, arguments.u)
    ]
    losses = read_table(arguments.table)
    train_grid(points, shared, slots=arguments.slots, num_runs=arguments.num_runs, losses=losses, table=arguments.table)
    print_cells({point: values for point, values in losses.items() if point in set(points)} or losses)


if __name__ == "__main__":
    main()

"""Records how the best learning rate moves with steps, batch size and width, and fits a power to it.

    python benchmarks/transfer.py --record NAME --seed 0 [key=value ...]    # one condition of CONDITIONS
    python benchmarks/transfer.py                                           # fits the powers

Each condition trains one rank (or full fine-tuning) at every rate of a grid, without a stopping rule, and stores the
metric on validation data at the end: one row per run in benchmarks/transfer/NAME_seedN.csv. The best rate of a
condition and seed is the minimum of a parabola in log(rate) through the best stored rate and its two neighbours.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import yaml
from curves.record import LoraPack, Point, SoloTrial
from scipy import stats

from lorasweep.config.compose import compose_run
from lorasweep.config.run import SEED_KEYS
from lorasweep.training.environment import deterministic_algorithms
from lorasweep.training.inputs import build_inputs
from lorasweep.training.optim import schedule_factor

FOLDER = Path(__file__).parent / "transfer"
COLUMNS = ("condition", "method", "model", "steps", "batch", "seed", "lr", "value", "loss")
NUM_RATES = 9
RATIO = 1.6
"""Between two rates of the grid."""
TINY = {"model": "tiny", "data": "stdlib_docs", "data.max_validation_blocks": 96, "trainer.batch_size": 8}
SENTENCES = {
    "model": "minilm",
    "model.attention": "eager",
    "data": "table",
    "data.max_length": 48,
    "data.max_validation_examples": 500,
    "trainer.batch_size": 16,
}
LORA = {"method": "lora", "method.rank": 16, "method.alpha": 16}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What is trained, and the middle of its grid of learning rates."""

    settings: Mapping[str, Any]
    middle: float

    def list_rates(self) -> list[float]:
        return [float(f"{self.middle * RATIO ** (n - NUM_RATES // 2):.5g}") for n in range(NUM_RATES)]


def _tiny(steps: int, *, batch: int = 8, middle: float = 5e-3, **own: Any) -> Condition:
    return Condition(
        settings={**TINY, **LORA, "trainer.max_steps": steps, "trainer.batch_size": batch, **own}, middle=middle
    )


CONDITIONS = {
    **{f"steps{steps}": _tiny(steps) for steps in (40, 80, 160, 320, 640)},
    **{f"code{steps}": _tiny(steps, data="stdlib_code") for steps in (40, 160)},
    **{f"batch{batch}": _tiny(80, batch=batch) for batch in (4, 16)},
    **{f"width{width}": _tiny(80) for width in (96, 160)},
    **{
        f"full{steps}": Condition(settings={**TINY, "method": "full", "trainer.max_steps": steps}, middle=1e-3)
        for steps in (40, 80, 160, 320)
    },
    **{
        f"minilm{steps}": Condition(settings={**SENTENCES, **LORA, "trainer.max_steps": steps}, middle=1.5e-3)
        for steps in (42, 84, 168)
    },
}

TASKS = {"steps": "far", "batch": "far", "code": "near", "minilm": "sentences", "full": "full, far"}
"""The task of a condition, by the letters of its name."""
FITS = (
    (("far",), ("steps", "batch")),
    (("near",), ("steps",)),
    (("sentences",), ("steps",)),
    (("far", "near", "sentences"), ("steps", "batch")),
    (("full, far",), ("steps",)),
)
"""Tasks that are fitted together, and the settings whose powers are fitted."""


def record(name: str, *, seed: int, overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Trains every rate of a condition with one seed and returns a row per run."""
    condition = CONDITIONS[name]
    shared = {**condition.settings, **dict.fromkeys(SEED_KEYS, seed), **overrides}
    points = [Point(number=n, lr=lr, rank=16, alpha=16.0) for n, lr in enumerate(condition.list_rates())]
    configs = [compose_run({**shared, "optim.lr": point.lr}) for point in points]
    inputs = build_inputs(configs[0])
    is_lora = configs[0].method.name == "lora"
    steps = configs[0].trainer.max_steps
    rows = []
    with deterministic_algorithms(configs[0].trainer.deterministic):
        packs = (
            [LoraPack(points, configs, inputs=inputs)]
            if is_lora
            else (SoloTrial(point, config, inputs=inputs) for point, config in zip(points, configs, strict=True))
        )
        for trials in packs:
            for step in range(steps):
                config = configs[0]
                trials.train_step(
                    step, factor=schedule_factor(config.schedule, step, max_steps=steps, lr=config.optim.lr)
                )
            for point, values in zip(trials.points, trials.evaluate(), strict=True):
                rows.append(
                    {
                        "condition": name,
                        "method": configs[0].method.name,
                        "model": shared["model"],
                        "steps": steps,
                        "batch": shared["trainer.batch_size"],
                        "seed": seed,
                        "lr": point.lr,
                        "value": f"{values[inputs.splits.metric]:.5g}",
                        "loss": f"{values['loss']:.5g}",
                    }
                )
    return rows


def find_best_rate(rates: Sequence[float], costs: Sequence[float]) -> float | None:
    """Returns the minimum of a parabola through the lowest cost and its neighbours; None at an end of the grid."""
    index = int(np.argmin(costs))
    if not 0 < index < len(rates) - 1:
        return None
    a, b, _ = np.polyfit(np.log(rates[index - 1 : index + 2]), costs[index - 1 : index + 2], 2)
    return math.exp(-b / (2 * a))


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best learning rate of one condition and seed."""

    condition: str
    seed: int
    steps: int
    batch: int
    rate: float

    @property
    def task(self) -> str:
        return TASKS.get(self.condition.rstrip("0123456789"), "")


def read_best_rates() -> list[Best]:
    found = []
    for path in sorted(FOLDER.glob("*.csv")):
        rows = pandas.read_csv(path).sort_values("lr")
        name = str(rows.condition[0])
        sign = -1 if name.startswith("minilm") else 1  # accuracy
        rate = find_best_rate(list(rows.lr), list(sign * rows.value))
        if rate is not None:
            seed, steps, batch = int(rows.seed[0]), int(rows.steps[0]), int(rows.batch[0])
            found.append(Best(condition=name, seed=seed, steps=steps, batch=batch, rate=rate))
    return found


def fit_powers(found: Sequence[Best], keys: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Returns each power with its 95 % interval: least squares in logarithms, with an offset per task and seed."""
    groups = sorted({(best.task, best.seed) for best in found})
    design = np.array(
        [
            [*(math.log(getattr(best, key)) for key in keys), *((best.task, best.seed) == group for group in groups)]
            for best in found
        ],
        dtype=np.float64,
    )
    rates = np.log([best.rate for best in found])
    if not found:
        return {}
    freedom = len(found) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return {}
    powers, *_ = np.linalg.lstsq(design, rates)
    variance = ((rates - design @ powers) ** 2).sum() / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design))) * stats.t.ppf(0.975, freedom)
    return {key: (p, p - e, p + e) for key, p, e in zip(keys, powers, errors, strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", choices=CONDITIONS, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as data.train=train.tsv")
    args = parser.parse_args()
    if args.record:
        path = FOLDER / f"{args.record}_seed{args.seed}.csv"
        if path.exists():
            return
        began = time.monotonic()
        overrides = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in args.overrides)}
        rows = record(args.record, seed=args.seed, overrides=overrides)
        FOLDER.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"{path.name}: {len(rows)} runs, {time.monotonic() - began:.0f} s", flush=True)
        return
    found = read_best_rates()
    for name in dict.fromkeys(best.condition for best in found):
        print(f"{name}: best rate {', '.join(f'{best.rate:.2g}' for best in found if best.condition == name)}")
    for tasks, keys in FITS:
        chosen = [best for best in found if best.task in tasks]
        for key, (power, low, high) in fit_powers(chosen, keys).items():
            print(
                f"{' + '.join(tasks)}: power of {key} {power:.2f} [{low:.2f}, {high:.2f}] from {len(chosen)} best rates"
            )


if __name__ == "__main__":
    main()

"""Measures the spreads that a plan's prediction assumes, and compares predicted half-widths with those of replays.

    python benchmarks/bench_power.py [--replays 40] [--tasks movie_snippets ...]

Searches are replayed as in `bench_answers.py`. `measured` has the standard
deviations of LoRA minus full fine-tuning at the settings that a search chose, on all recorded seeds: over seeds, over
groups of test examples, of one seed on one group, and of the search; medians over replays of ranks 16 and 64, in the
unit of the metric. `assumed` are those of `sweep/power.py`. `half-width` is half of the interval that the product's
test uses with 10 seeds: predicted, and the median over replayed sweeps that came to their last look.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping

import numpy as np
import optuna
from bench_answers import QUESTIONS, Table, build_arms, choose_settings, name_subject, read_table, replay_sweep

from lorasweep.config.sweep import parse_margin
from lorasweep.report.evidence.estimates import ConfirmScores
from lorasweep.report.evidence.questions import MarginScale, compute_level
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.power import TEXT_SPREADS, Spread, assume_accuracy

TASKS = ("movie_snippets", "stdlib_docs", "stdlib_code")
"""The tasks whose spreads `sweep/power.py` assumes."""
LOOKS = (3, 6, 10)
MEASURED_RANKS = (16, 64)
"""Smaller ranks are often worse than full fine-tuning, and then easy to tell apart."""


def measure_spreads(table: Table, arms: Mapping[str, Arm], *, number: int) -> list[Spread]:
    """Returns the spread of each measured rank after one replayed search, on all recorded seeds and groups."""
    rng = np.random.default_rng(number)
    chosen = choose_settings(table, arms, ranks=MEASURED_RANKS, number=number, rng=rng)
    values = {"frozen": {seed: run.test for seed, run in table.frozen.items()}}
    for rank, rate in chosen.rates.items():
        inside = min(max(rate, table.rates[rank][0]), table.rates[rank][-1])
        values[name_subject(rank)] = {seed: table.find_run(rank, inside, seed).test for seed in table.seeds}
    errors = {name_subject(rank): regret for rank, regret in chosen.regrets.items()}
    scores = ConfirmScores(
        values=values, shares=table.shares, num_examples=len(table.shares), problems=(), search_errors=errors
    )
    scale = MarginScale(margin=parse_margin("5%"), sign=table.sign, base="frozen", full="full")
    num_seeds, num_groups, spreads = len(table.seeds), 1 / float((table.shares**2).sum()), []
    for rank in MEASURED_RANKS:
        estimate = scale.estimate_advantage(scores, name_subject(rank), "full", margins=1.0)
        assert estimate is not None
        both = estimate.interaction_variance
        parts = (
            (estimate.seeds_variance - both) * num_seeds,
            (estimate.groups_variance - both) * num_groups,
            both * num_seeds * num_groups,
            estimate.search_variance,
        )
        spreads.append(Spread(*(max(part, 0.0) ** 0.5 for part in parts)))
    return spreads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--replays", type=int, default=40)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    level = compute_level(QUESTIONS, LOOKS)
    for task in args.tasks:
        table = read_table(task)
        arms = build_arms(table)
        found = [one for number in range(args.replays) for one in measure_spreads(table, arms, number=number)]
        measured = Spread(*(statistics.median(parts) for parts in zip(*found, strict=True)))
        if table.sign == -1:
            _, assumed = assume_accuracy(table.base)
        else:
            shares = TEXT_SPREADS[TASKS[1:].index(task)]
            assumed = Spread(*(table.gain * share for share in shares))
        outcomes = [replay_sweep(table, arms, number=number, looks=LOOKS) for number in range(args.replays)]
        subjects = [name_subject(rank) for rank in MEASURED_RANKS]
        answers = [answer for one in outcomes for answer in one.answers if answer.name == QUESTIONS[0].name]
        widths = [
            (answer.interval[1] - answer.interval[0]) / 2 * table.gain
            for answer in answers
            if answer.subject in subjects and answer.num_seeds == LOOKS[-1] and answer.interval
        ]
        num_groups = 1 / float((table.shares**2).sum())
        interval = assumed.estimate(num_seeds=LOOKS[-1], num_groups=num_groups).find_interval(1 - 2 * level)
        assert interval is not None
        real = statistics.median(widths) if widths else float("nan")
        print(f"{task}: gain {table.gain:.4g}, score of full {table.best[0]:.4g}, {num_groups:.0f} groups")
        print("  measured:", *(f"{name} {value:.4g}" for name, value in measured._asdict().items()))
        print("   of gain:", *(f"{value / table.gain:.3f}" for value in measured))
        print("   assumed:", *(f"{name} {value:.4g}" for name, value in assumed._asdict().items()))
        print(f"  half-width: predicted {interval[1]:.4g}, real {real:.4g} ({len(widths)} intervals)", flush=True)


if __name__ == "__main__":
    main()

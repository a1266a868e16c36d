"""Replays whole sweeps on stored runs, follows the advice on each open line, and counts how often that settles it.

    python benchmarks/bench_advice.py [--replays 100] [--tasks stdlib_docs ...]

Tables and replays are those of `bench_answers.py`. For each line that is open at the end of a replayed sweep, the
product's `find_step` chooses a number of seeds and says its chance; it may cost at most twice the steps of the sweep.
Then these seeds continue the confirm stage. It succeeds if the line is settled and no other settled line opened.

Prints for ranges of the chance how many steps succeeded. `no step`: of the lines for which nothing is advised, how many
the largest affordable number of seeds would have settled.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import optuna
from bench_answers import (
    QUESTIONS,
    RANKS,
    Confirmation,
    build_arms,
    choose_settings,
    confirm,
    is_line_settled,
    list_tasks,
    read_table,
)

from lorasweep.config.compose import compose_sweep
from lorasweep.report.evidence.advice import SEED_NUMBERS, find_step
from lorasweep.report.evidence.evidence import Evidence

MAX_COST = 2.0
"""Largest cost of a step, in costs of the sweep."""
Row = tuple[str, str, float, bool]
"""Line, `seeds` or `no step`, the chance, and whether it succeeded."""


def follow_advice(task: str, looks: Sequence[int], numbers: Sequence[int]) -> list[Row]:
    """Returns a row for each open line of the replays with these numbers."""
    table = read_table(task)
    arms = build_arms(table)
    rows: list[Row] = []
    for number in numbers:
        rng = np.random.default_rng(number)
        chosen = choose_settings(table, arms, ranks=RANKS, number=number, rng=rng)
        stage = confirm(table, chosen, looks=looks, rng=rng)
        search_runs = sum(search.steps for search in chosen.searches.values()) / table.num_steps
        for question in QUESTIONS:
            if is_line_settled(question.name, stage.answers):
                continue
            others = [one.name for one in QUESTIONS if is_line_settled(one.name, stage.answers)]
            rows.append(follow(question.name, others, stage, search_runs=search_runs, rng=rng))
    return rows


def follow(
    name: str, others: Sequence[str], stage: Confirmation, *, search_runs: float, rng: np.random.Generator
) -> Row:
    """Returns the row of an open line: the number of seeds that is advised, and whether they settled it."""
    present = Evidence(
        questions=QUESTIONS,
        answers=stage.answers,
        scores=stage.scores,
        scale=stage.scale,
        looks=stage.looks,
        looks_done=stage.looks_done,
    )
    line = [question for question in QUESTIONS if question.name == name]
    trained = present.list_trained() - {"frozen"}
    last = max(stage.looks_done)

    def cost(num_seeds: int) -> float:
        return sum(num_seeds - len(stage.values[name]) for name in trained)

    limit = MAX_COST * (search_runs + stage.num_runs)
    step = find_step(line, present, cost=cost, max_cost=limit)
    if step is None:
        most = max(stage.looks)
        affordable = [seeds for seeds in (most, *SEED_NUMBERS) if seeds >= most and seeds > last]
        num_seeds = max(seeds for seeds in affordable if cost(seeds) <= limit)
        kind, chance = "no step", 0.0
    else:
        (num_seeds, chance), kind = step, "seeds"
    stage.looks = [*stage.looks_done, num_seeds]
    stage.seeds = [*stage.seeds[:last], *map(int, rng.choice(stage.table.seeds, size=num_seeds - last))]
    stage.train(present.list_trained(), num_seeds)
    return name, kind, chance, all(is_line_settled(one, stage.answers) for one in (name, *others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help="default: all with enough recorded seeds")
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    looks = compose_sweep({}).confirm.list_looks()
    rows: list[Row] = []
    for task in args.tasks or list_tasks():
        parts = [range(start, args.replays, args.processes) for start in range(args.processes)]
        with multiprocessing.get_context("spawn").Pool(
            args.processes, optuna.logging.set_verbosity, [optuna.logging.ERROR]
        ) as pool:
            found = [row for part in pool.map(functools.partial(follow_advice, task, looks), parts) for row in part]
        print(task)
        print_rows(found)
        rows += found
    print("all tasks")
    print_rows(rows)


def print_rows(rows: Sequence[Row]) -> None:
    groups: defaultdict[tuple[str, str, str], list[bool]] = defaultdict(list)
    ends = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 1.01)
    for line, kind, chance, succeeded in rows:
        place = sum(chance >= end for end in ends)
        groups[line, kind, f"{ends[place - 1]:g} to {ends[place]:g}"].append(succeeded)
    for key, found in sorted(groups.items()):
        print(f"  {' | '.join(key):40} {len(found):5} {statistics.fmean(found):.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Replays whole sweeps on stored runs, follows the advice on each open line, and counts how often that settles it.

    python benchmarks/bench_advice.py [--replays 100] [--tasks stdlib_docs ...]

Tables and replays are those of `bench_answers.py`. For each line that is open at the end of a replayed sweep, the
product's `find_step` chooses a step and says its chance; a step may cost at most twice the steps of the sweep. Then the
step is taken: further seeds continue the confirm stage, twice the trials continue the search and repeat that stage, and
more test examples are a new sweep on more groups. It succeeds if the line is settled and no other settled line opened.

Prints for each kind of step, and for ranges of the chance, how many steps succeeded. `no step`: of the lines for which
nothing is advised, how many the largest affordable number of seeds would have settled. `setting`: by the ratio of the
expected regret to the margin, how many settings have a small regret after twice the trials.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import optuna
from bench_answers import (
    QUESTIONS,
    RANKS,
    Chosen,
    Confirmation,
    build_arms,
    choose_settings,
    confirm,
    is_line_settled,
    list_tasks,
    read_table,
)

from lorasweep.config.compose import compose_sweep
from lorasweep.report.evidence.advice import SEED_NUMBERS, CurrentEvidence, Extension, find_step

MAX_FACTOR = 4.0
"""Largest factor on the number of test examples."""
MAX_COST = 2.0
"""Largest cost of a step, in costs of the sweep."""
Row = tuple[str, str, float, bool]
"""Line, kind of step, its chance, and whether it succeeded."""


def follow_advice(task: str, looks: Sequence[int], numbers: Sequence[int]) -> list[Row]:
    """Returns a row for each open line of the replays with these numbers, and one for each setting."""
    table = read_table(task)
    arms = build_arms(table)
    larger = {name: replace(arm, trials=2 * arm.trials) for name, arm in arms.items()}
    rows: list[Row] = []
    for number in numbers:
        rng = np.random.default_rng(number)
        chosen = choose_settings(table, arms, ranks=RANKS, number=number, rng=rng)
        after = choose_settings(table, larger, ranks=RANKS, number=number, rng=np.random.default_rng(number))
        margin = 0.05 * table.gain
        rows += [
            ("setting", "trials", chosen.regrets[rank] / margin, after.regrets[rank] <= margin)
            for rank in RANKS
            if chosen.regrets[rank] > margin
        ]
        rows += [
            ("regret", "ratio", after.regrets[rank] / chosen.regrets[rank], True)
            for rank in (0, *RANKS)
            if chosen.regrets[rank] > 0
        ]
        stage = confirm(table, chosen, looks=looks, rng=rng)
        search_runs = sum(search.steps for search in chosen.searches.values()) / table.num_steps
        for question in QUESTIONS:
            if is_line_settled(question.name, stage.answers):
                continue
            others = [one.name for one in QUESTIONS if is_line_settled(one.name, stage.answers)]
            rows.append(follow(question.name, others, stage, after, search_runs=search_runs, rng=rng))
    return rows


def follow(
    name: str,
    others: Sequence[str],
    stage: Confirmation,
    after: Chosen,
    *,
    search_runs: float,
    rng: np.random.Generator,
) -> Row:
    """Returns the row of an open line: the step that is advised, and what came of it."""
    present = CurrentEvidence(
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

    def cost(extension: Extension) -> float:
        if extension.examples != 1:
            return search_runs + stage.num_runs
        if extension.trials > 1:
            return search_runs + (len(RANKS) + 1) * extension.seeds
        return sum(extension.seeds - len(stage.values[name]) for name in trained)

    limit = MAX_COST * (search_runs + stage.num_runs)
    step = find_step(line, present, has_space=True, max_examples=MAX_FACTOR, cost=cost, max_cost=limit)
    if step is None:
        most = max(stage.looks)
        affordable = [Extension(seeds) for seeds in (most, *SEED_NUMBERS) if seeds >= most and seeds > last]
        extension = max(one for one in affordable if cost(one) <= limit)
        kind, chance = "no step", 0.0
    else:
        extension, chance = step
        kind = "examples" if extension.examples != 1 else "trials" if extension.trials > 1 else "seeds"
    if extension.examples != 1:
        chosen = stage.chosen
        found = confirm(stage.table, chosen, looks=stage.looks, rng=rng, factor=extension.examples)
    elif extension.trials > 1:
        found = confirm(stage.table, after, looks=sorted({*stage.looks, extension.seeds}), rng=rng)
    else:
        found, stage.looks = stage, [*stage.looks_done, extension.seeds]
        found.seeds = [*stage.seeds[:last], *map(int, rng.choice(stage.table.seeds, size=extension.seeds - last))]
        stage.train(present.list_trained(), extension.seeds)
    return name, kind, chance, all(is_line_settled(one, found.answers) for one in (name, *others))


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
    for line, kind, chance, succeeded in rows:
        if line == "regret":
            continue
        ends = (1, 1.25, 1.5, 2, 3, 5, 1e9) if line == "setting" else (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 1.01)
        place = sum(chance >= end for end in ends)
        span = f"{ends[place - 1]:g} to {ends[place]:g}"
        groups[line, kind, span].append(succeeded)
    for key, found in sorted(groups.items()):
        print(f"  {' | '.join(key):40} {len(found):5} {statistics.fmean(found):.2f}")
    ratios = [chance for line, _, chance, _ in rows if line == "regret"]
    print(f"  regret after twice the trials: median ratio {statistics.median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main()

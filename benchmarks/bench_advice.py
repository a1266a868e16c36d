"""Replays whole sweeps on stored runs, follows the advice on each open line, and counts how often that settles it.

    python benchmarks/bench_advice.py [--replays 100] [--tasks stdlib_docs ...]

Tables and replays are those of `bench_answers.py`. For each line that is open at the end of a replayed sweep, the
product says whether twice the seeds may settle it (`Evidence.may_settle`). Then these seeds continue the confirm stage.
They succeed if the line is settled and no other settled line opened.

Prints for lines with and without this advice how many succeeded.
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
from lorasweep.record import Question
from lorasweep.report.evidence.evidence import Evidence

Row = tuple[str, str, bool]
"""Line, `twice the seeds` or `no step`, and whether the seeds succeeded."""


def follow_advice(task: str, looks: Sequence[int], numbers: Sequence[int]) -> list[Row]:
    """Returns a row for each open line of the replays with these numbers."""
    table = read_table(task)
    arms = build_arms(table)
    rows: list[Row] = []
    for number in numbers:
        rng = np.random.default_rng(number)
        chosen = choose_settings(table, arms, ranks=RANKS, number=number, rng=rng)
        stage = confirm(table, chosen, looks=looks, rng=rng)
        for question in QUESTIONS:
            if is_line_settled(question.name, stage.answers):
                continue
            others = [one.name for one in QUESTIONS if is_line_settled(one.name, stage.answers)]
            rows.append(follow(question, others, stage, rng=rng))
    return rows


def follow(question: Question, others: Sequence[str], stage: Confirmation, *, rng: np.random.Generator) -> Row:
    """Returns the row of an open line: whether more seeds are advised, and whether they settled it."""
    present = Evidence(
        questions=QUESTIONS,
        answers=stage.answers,
        scores=stage.scores,
        scale=stage.scale,
        looks=stage.looks,
        looks_done=stage.looks_done,
    )
    last, num_seeds = max(stage.looks_done), 2 * max(stage.looks)
    is_advised = present.may_settle(present.find_answer(question.name, question.arm), seeds=num_seeds)
    stage.looks = [*stage.looks_done, num_seeds]
    stage.seeds = [*stage.seeds[:last], *map(int, rng.choice(stage.table.seeds, size=num_seeds - last))]
    stage.train(num_seeds)
    succeeded = all(is_line_settled(one, stage.answers) for one in (question.name, *others))
    return question.name, "twice the seeds" if is_advised else "no step", succeeded


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
    groups: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
    for line, kind, succeeded in rows:
        groups[line, kind].append(succeeded)
    for key, found in sorted(groups.items()):
        print(f"  {' | '.join(key):40} {len(found):5} {statistics.fmean(found):.2f}", flush=True)


if __name__ == "__main__":
    main()

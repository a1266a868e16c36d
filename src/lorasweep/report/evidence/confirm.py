"""Answers the questions of a sweep from the test scores of its confirm runs."""

from __future__ import annotations

import math
from pathlib import Path

from lorasweep.config.data import METRIC_RANGES
from lorasweep.config.ranges import is_number
from lorasweep.config.sweep import parse_margin
from lorasweep.record import TEST_SCORES_FILE, SweepRecord
from lorasweep.report.evidence.estimates import estimate_sum
from lorasweep.report.evidence.questions import Answer, Scale, answer_questions
from lorasweep.report.evidence.scores import (
    UNBOUNDED,
    ConfirmScores,
    ExampleScores,
    RunKey,
    build_scores,
    read_examples,
)


def read_confirm_scores(record: SweepRecord, folder: Path) -> ConfirmScores:
    """Returns the test scores of the complete runs of the settings that are confirmed now."""
    current = {(row.subject, row.setting) for row in record.settings}
    values: dict[RunKey, float] = {}
    examples: dict[RunKey, ExampleScores] = {}
    problems = []
    for row in record.confirm:
        if row.state != "complete" or (row.subject, row.setting) not in current or not is_number(row.value):
            continue
        values[row.subject, row.seed] = float(row.value or 0.0)
        path = folder / row.run / TEST_SCORES_FILE
        try:
            if path.is_file():
                examples[row.subject, row.seed] = read_examples(path)
        except (OSError, ValueError) as error:
            problems.append(f"`{row.run}/{TEST_SCORES_FILE}` is not used: {error}.")
    frozen = {arm.name for arm in record.arms if arm.method == "frozen"}
    num_runs = {name: sum(subject == name for subject, _ in values) for name in frozen}
    return build_scores(
        values,
        examples,
        deterministic={name for name, count in num_runs.items() if count == 1},
        is_perplexity=record.metric == "perplexity",
        score_range=find_metric_range(record),
        problems=problems,
        search_errors={row.subject: row.regret for row in record.settings if row.regret is not None},
    )


def answer_sweep(record: SweepRecord, scores: ConfirmScores, *, groups: str | None = None) -> list[Answer]:
    """Returns the answers to the questions of a sweep; `groups` names the groups of its test examples."""
    if not record.looks:
        return []
    return answer_questions(record.questions, scores, build_scale(record, scores), looks=record.looks, groups=groups)


def build_scale(record: SweepRecord, scores: ConfirmScores) -> Scale:
    """Returns the margin with the best scored arm of `frozen` and of `full`."""
    sign = 1 if record.direction == "minimize" else -1

    def find_best(method: str) -> str | None:
        arms = {arm.name for arm in record.arms if arm.method == method}
        names = [row.subject for row in record.settings if row.arm in arms]
        means = {name: sign * found.value for name in names if (found := estimate_sum(scores, {name: 1.0}))}
        return min(means, key=means.__getitem__, default=None)

    return Scale(margin=parse_margin(record.margin), sign=sign, base=find_best("frozen"), full=find_best("full"))


def find_metric_range(record: SweepRecord) -> tuple[float, float]:
    """Returns the lowest and the highest possible value of the sweep's metric."""
    if len(record.metric_range) != 2:
        return METRIC_RANGES.get(record.metric, UNBOUNDED)
    low, high = record.metric_range  # infinity was written as null
    return (low if is_number(low) else -math.inf, high if is_number(high) else math.inf)

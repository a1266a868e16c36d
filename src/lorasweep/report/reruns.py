"""Reads the confirm stage for the report: each rerun with its run's record, and the test scores as numbers.

Comes after `runs` and `evidence`, before `tables`. A file that can't be used gives a sentence in place of an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasweep.record import TEST_SCORES_FILE, ArmRow, ConfirmRow, ConfirmState, RunRecord, SweepRecord
from lorasweep.report.evidence import ConfirmScores, build_scores, read_examples
from lorasweep.report.evidence.scores import ExampleScores, Key
from lorasweep.report.runs import misfits, read_usable_run, value_of


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """One rerun of an arm's winner with its run's record."""

    arm: str
    trial: int
    """Number of the winner in the arm's search."""
    seed: int
    state: ConfirmState
    value: float | None
    """Finite value of the sweep's metric on test data."""
    run: str
    """The run's folder, relative to the sweep's."""
    reason: str | None
    record: RunRecord | None
    problem: str | None

    @property
    def is_scored(self) -> bool:
        """Whether it ran to its end and has a score on test data."""
        return self.state == "complete" and self.value is not None


def join_reruns(record: SweepRecord, folder: Path) -> tuple[tuple[Rerun, ...], tuple[str, ...]]:
    """Returns the reruns by arm and seed, and a sentence for each that can't be used."""
    names = {arm.name for arm in record.arms}
    good = [row for row in record.confirm if not misfits(row) and row.arm in names]
    bad = [row for row in record.confirm if row not in good]
    order = {arm.name: place for place, arm in enumerate(record.arms)}
    good.sort(key=lambda row: (order[row.arm], row.seed))
    reruns = tuple(_join(row, record, folder) for row in good)
    problems = [f"A row of the confirm stage is left out: arm {str(row.arm)[:40]!r}, seed {row.seed!r}." for row in bad]
    return reruns, (*problems, *(rerun.problem for rerun in reruns if rerun.problem))


def score_reruns(reruns: Sequence[Rerun], record: SweepRecord, folder: Path) -> tuple[ConfirmScores, tuple[str, ...]]:
    """Returns the scores on test data in numbers, and a sentence for each file or arm that is left out."""
    scored = {(rerun.arm, rerun.seed): rerun for rerun in reruns if rerun.is_scored}
    values = {key: rerun.value for key, rerun in scored.items() if rerun.value is not None}
    examples: dict[Key, ExampleScores] = {}
    problems = [*_unscored(reruns, record.arms)]
    for key, rerun in scored.items():
        path = folder / rerun.run / TEST_SCORES_FILE
        try:
            if rerun.record and path.is_file():
                examples[key] = read_examples(path)
        except (OSError, ValueError) as error:
            problems.append(f"`{rerun.run}/{TEST_SCORES_FILE}` is not used: {error}.")
    chanceless = frozenset(arm.name for arm in record.arms if arm.method == "frozen")
    scores = build_scores(values, examples, chanceless=chanceless, is_perplexity=record.metric == "perplexity")
    return scores, tuple(problems)


def _join(row: ConfirmRow, record: SweepRecord, folder: Path) -> Rerun:
    run, problem = read_usable_run(folder, row.run) if row.run else (None, None)
    return Rerun(
        arm=row.arm,
        trial=row.trial,
        seed=row.seed,
        state=row.state,
        value=value_of(row.value, run, record.metric, part="test"),
        run=row.run,
        reason=row.reason or (run.reason if run else None),
        record=run,
        problem=problem,
    )


def _unscored(reruns: Sequence[Rerun], arms: Sequence[ArmRow]) -> list[str]:
    """Returns a sentence for each arm without a score on test data, or with fewer scores than reruns."""
    sentences = []
    for arm in arms if reruns else ():
        mine = [rerun for rerun in reruns if rerun.arm == arm.name]
        scored = sum(rerun.is_scored for rerun in mine)
        if not mine:
            sentences.append(f"`{arm.name}` was not confirmed: it has no score on test data.")
        elif not scored:
            sentences.append(
                f"`{arm.name}` has no score on test data: none of its {len(mine)} reruns finished with one."
            )
        elif scored < len(mine):
            sentences.append(
                f"{len(mine) - scored} of {len(mine)} reruns of `{arm.name}` have no score on test data; "
                "its mean is over those that do."
            )
    return sentences

"""The evidence without the training: verdicts on scores of runs that were trained elsewhere.

The tests are those of a sweep's confirm stage (`evidence.questions`). The search that chose the settings is not known,
so the intervals do not include the chance in that search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorasweep.config.data import METRIC_RANGES, ScoreMetric
from lorasweep.config.sweep import parse_margin
from lorasweep.errors import ConfigError
from lorasweep.record import Question, QuestionName, Subject, is_number
from lorasweep.report.evidence.estimates import (
    UNBOUNDED,
    ConfirmScores,
    RunExampleScores,
    RunKey,
    build_scores,
)
from lorasweep.report.evidence.questions import MarginScale, answer_questions, compute_level
from lorasweep.report.evidence.verdicts import AnswerRow
from lorasweep.report.text import build_entry
from lorasweep.wording import join_words, shorten

if TYPE_CHECKING:
    import pandas

REQUIRED_COLUMNS = ("arm", "seed", "score")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Verdicts on scores of runs that were trained elsewhere. `print` shows the table and the notes."""

    answers: tuple[AnswerRow, ...]
    scores: ConfirmScores
    margin: float | str
    confidence: float
    """The confidence of the intervals; all answers together have 95 %."""

    def table(self) -> pandas.DataFrame:
        """Returns a row per answer: question, subject, reference, verdict, value, interval, and why it is open."""
        import pandas  # noqa: PLC0415 (slow to import)

        return pandas.DataFrame.from_records([build_entry(answer) for answer in self.answers])

    @property
    def notes(self) -> tuple[str, ...]:
        unknown = "The intervals do not include the chance in the search that chose these settings."
        examples = () if self.scores.num_examples else ("Intervals are over seeds alone: no examples have scores.",)
        return (unknown, *examples, *self.scores.problems)

    def __str__(self) -> str:
        return "\n".join([self.table().to_string(index=False), *self.notes])


def judge(
    scores: pandas.DataFrame,
    *,
    margin: float | str,
    maximize: bool,
    metric: str = "",
    reference: str = "full",
    base: str | None = "frozen",
    key: str = "value",
    looks: Sequence[int] = (),
) -> Judgement:
    """Returns verdicts on the scores of runs that were trained elsewhere.

    >>> rows = [(arm, seed, score + seed / 1e3) for arm, score in (("full", 0.9), ("lora", 0.8)) for seed in range(5)]
    >>> scores = pandas.DataFrame(rows, columns=["arm", "seed", "score"])
    >>> [answer.verdict for answer in lorasweep.judge(scores, margin=0.01, maximize=True).answers]
    ['worse']

    Each arm but `reference` and `base` is compared with the reference, on the seeds and examples that both have. If an
    arm has several values, such as ranks, they share one chain of tests, and it is also asked which value is enough.

    Args:
        scores: A row per run, or per run and example of the test data, with the columns `arm`, `seed`, `score`, and
            perhaps `value` (of an arm's setting), `example`, `group` (such as the document) and `weight`. A run's score
            is the mean over its examples, so give losses and not perplexities.
        margin: The smallest difference that matters: a number in the metric's unit, or a percentage of the gain of
            `reference` over `base` such as `5%`.
        maximize: Whether higher scores are better.
        metric: The name of the score. It sets the range of a score that has one, such as `accuracy`.
        reference: The arm with which others are compared.
        base: The arm that is the untrained model, if there is one.
        key: What `value` is, such as `rank`, for the names of subjects.
        looks: All numbers of seeds at which the scores were or will be tested. Empty: this is the only test.

    Raises:
        ConfigError: The table lacks columns, arms or numbers, or has a run twice, or the margin is wrong.
    """
    _check_table(scores, reference=reference, looks=looks)
    parsed = parse_margin(margin, key="margin")
    scores = scores.assign(arm=scores["arm"].astype(str)).reset_index(drop=True)
    base = base if base in set(scores["arm"]) else None
    if parsed.is_share_of_gain and base is None:
        raise ConfigError(
            f"a margin of {margin!r} is a share of the gain over the untrained model, so its scores must be there, but "
            "no arm is named by `base`. Add them, or give the margin as a number."
        )
    questions, scores = _assign_subjects(scores, reference=reference, base=base, key=key)
    scored, examples = _read_runs(scores)
    deterministic = [base] if base and sum(name == base for name, _ in scored) == 1 else []
    found = build_scores(
        scored,
        examples,
        deterministic=deterministic,
        problems=[f"`{name}` has one run, whose score counts for every seed." for name in deterministic],
        score_range=METRIC_RANGES.get(metric, UNBOUNDED),
    )
    num_seeds = max(len(seeds) for seeds in found.values.values())
    planned = tuple(sorted({*looks, num_seeds})) if looks else (num_seeds,)
    judged = ScoreMetric(name=metric, direction="maximize" if maximize else "minimize")
    scale = MarginScale(margin=parsed, metric=judged, base=base, full=reference)
    answers = answer_questions(questions, found, scale, looks=planned)
    return Judgement(
        answers=tuple(answers), scores=found, margin=margin, confidence=1 - 2 * compute_level(questions, planned)
    )


def _assign_subjects(
    scores: pandas.DataFrame, *, reference: str, base: str | None, key: str
) -> tuple[list[Question], pandas.DataFrame]:
    """Returns a question on each arm but `reference` and `base`, and the scores with the `subject` of each row.

    Each value of an arm with several values is a subject, and a second question is which value is enough.
    """
    asked: QuestionName = "as_good_as_full" if reference == "full" else "pair"
    questions: list[Question] = []
    subjects = scores["arm"].copy()
    for arm in [arm for arm in scores["arm"].unique() if arm not in (reference, base)]:
        values = scores.loc[scores["arm"] == arm, "value"].dropna().unique().tolist() if "value" in scores else []
        chain = [Subject(arm=arm, key=key, value=value) for value in sorted(values)] if len(values) > 1 else []
        for one in chain:
            subjects[(scores["arm"] == arm) & (scores["value"] == one.value)] = one.name
        names = [one.name for one in chain] or [arm]
        questions.append(Question(name=asked, arm=arm, key=key, subjects=names, reference=reference))
        if chain:
            questions.append(Question(name="smallest", arm=arm, key=key, subjects=names, reference=None))
    if not questions:
        others = join_words([reference, *([base] if base else [])])
        raise ConfigError(f"the scores must have another arm beside {others}.")
    return questions, scores.assign(subject=subjects)


def _check_table(scores: pandas.DataFrame, *, reference: str, looks: Sequence[int]) -> None:
    if any(look < 1 for look in looks):
        raise ConfigError(f"`looks` must be numbers of seeds of at least 1, but got {shorten(list(looks))}.")
    if missing := [name for name in REQUIRED_COLUMNS if name not in scores]:
        raise ConfigError(
            f"the scores must have the columns {join_words(REQUIRED_COLUMNS)}, but lack {join_words(missing)}: they "
            f"have {join_words([str(name) for name in scores]) or 'no columns'}. Rename yours."
        )
    if scores[["arm", "seed"]].isna().any(axis=None):
        raise ConfigError("each row of the scores must have an arm and a seed, but one is empty.")
    if reference not in set(scores["arm"].astype(str)):
        arms = join_words([str(name) for name in dict.fromkeys(scores["arm"])], last="or")
        raise ConfigError(
            f"`reference`, the arm that others are compared with, must be one of {arms}, but got {reference!r}."
        )
    for name in [name for name in ("score", "weight") if name in scores]:
        for row, value in enumerate(scores[name]):
            if not is_number(value) or (name == "weight" and value < 0):
                raise ConfigError(f"row {row + 1} must have a finite number as its {name}, but has {value!r}.")
    identity = [name for name in ("arm", "value", "seed", "example") if name in scores]
    repeated = scores[scores.duplicated(identity)]
    if len(repeated):
        first = ", ".join(f"{name} {repeated.iloc[0][name]}" for name in identity)
        raise ConfigError(
            f"each run must have one row, or one for each `example`, but there are several with {first}. If they "
            "differ in a setting, such as the rank, name its column `value`, else give other seeds."
        )


def _read_runs(scores: pandas.DataFrame) -> tuple[dict[RunKey, float], dict[RunKey, RunExampleScores]]:
    """Returns the score of each run, and its scores of single examples if it has them."""
    labels = sorted(scores["seed"].astype(str).unique())
    values: dict[RunKey, float] = {}
    examples: dict[RunKey, RunExampleScores] = {}
    for (name, seed), run in scores.assign(weight=scores.get("weight", 1.0)).groupby(["subject", "seed"], sort=False):
        run_key = name, labels.index(str(seed))
        if not run["weight"].sum() > 0:
            raise ConfigError(f"the weights of `{name}`, seed {seed}, must have a positive sum.")
        values[run_key] = float(np.average(run["score"].to_numpy(float), weights=run["weight"].to_numpy(float)))
        if "example" in run and run["example"].notna().all():
            ordered = run.sort_values("example", key=lambda column: column.astype(str))
            identifiers = tuple(ordered["example"].astype(str))
            examples[run_key] = RunExampleScores(
                rows=identifiers,
                scores=ordered["score"].to_numpy(float),
                weights=ordered["weight"].to_numpy(float),
                groups=tuple(ordered["group"].astype(str)) if "group" in ordered else identifiers,
            )
    return values, examples

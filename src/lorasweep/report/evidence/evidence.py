"""The evidence of one sweep: test scores, answers to its questions, and what was forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorasweep.config.data import METRIC_RANGES, ScoreMetric
from lorasweep.config.method import FrozenConfig
from lorasweep.config.sweep import Margin, parse_margin
from lorasweep.errors import RecordError
from lorasweep.record import (
    ANSWERS_FILE,
    RETAINED_SCORES_FILE,
    TEST_SCORES_FILE,
    Question,
    QuestionName,
    RetainedRow,
    SweepRecord,
    get_run_folder,
    is_number,
)
from lorasweep.report.evidence.estimates import (
    UNBOUNDED,
    ConfirmScores,
    Estimate,
    Interval,
    RunExampleScores,
    RunKey,
    build_scores,
    estimate_means,
    estimate_sum,
    read_examples,
)
from lorasweep.report.evidence.questions import (
    MarginScale,
    answer_questions,
    compare_pair,
    compute_level,
    find_largest_part,
    judge_difference,
)
from lorasweep.report.evidence.verdicts import Answer, AnswerName, AnswerRow, Blocker
from lorasweep.wording import format_metric


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """The test scores of the confirm stage, the questions of the sweep, and what the scores say on them."""

    questions: Sequence[Question]
    answers: Sequence[AnswerRow]
    """One row for each subject of each question."""
    scores: ConfirmScores
    """The scores; none if there was no confirm stage."""
    scale: MarginScale
    looks: Sequence[int] = ()
    """The numbers of seeds of all planned looks."""
    looks_done: Sequence[int] = ()

    @property
    def level(self) -> float:
        """The one-sided level of each test."""
        return compute_level(self.questions, self.looks) if self.looks else 0.025

    @property
    def confidence(self) -> float:
        """The confidence of the intervals that the answers use; all answers together have 95 %."""
        return 1 - 2 * self.level

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for found in self.scores.values.values() for seed in found})

    @cached_property
    def means(self) -> Mapping[str, Estimate]:
        """The mean score of each subject alone, over its seeds and the test examples."""
        return estimate_means(self.scores)

    @cached_property
    def gain(self) -> float | None:
        """The leader's gain over the frozen base; None if it is not known or not shown."""
        return self.scale.find_gain(self.scores, level=self.level)

    @property
    def margin(self) -> float | None:
        """The margin in the metric's unit; None if it is a share of a gain that is not known."""
        return self.scale.find_margin(self.gain)

    @cached_property
    def shares(self) -> Mapping[str, tuple[float, Interval | None]]:
        """(base - subject) / (base - full) of each subject, with the interval at the level of the tests."""
        if not self.gain or not self.scale.full:
            return {}
        # 0 and 1 by definition, without error
        shares: dict[str, tuple[float, Interval | None]] = {
            name: (float(name == self.scale.full), None) for name in (self.scale.base, self.scale.full) if name
        }
        for name in [name for name in self.means if name not in shares]:
            value, interval = self.scale.measure_share(self.scores, name, self.scale.full, confidence=self.confidence)
            if value is not None and (interval is not None or not self.means[name].is_testable):
                shares[name] = value, interval
        return shares

    def mean(self, subject: str | None) -> Estimate | None:
        return self.means.get(subject) if subject else None

    def find_answer(self, name: QuestionName, arm: str) -> Answer:
        """Returns the answer about an arm, smallest value first; `not asked` if the sweep does not ask the question."""
        rows = tuple(row for row in self.answers if (row.name, row.arm) == (name, arm))
        return Answer(name=name, arm=arm, rows=rows)

    def may_settle(self, answer: Answer, *, seeds: int) -> bool:
        """Returns whether a further look at this number of seeds settles a question, if all means stay the same."""
        looks = sorted({*self.looks_done, seeds})
        rows = answer_questions(self.questions, self.scores, self.scale, looks=looks, hope=0.0)
        own = [row for row in rows if (row.name, row.arm) == (answer.name, answer.arm) and not row.is_settled]
        return all(row.may_settle for row in own if row.blocker != "another value")

    def estimate_difference(self, first: str, second: str | None) -> Estimate | None:
        """Returns `first - second` on the same seeds and examples, without the chance in the search."""
        return estimate_sum(self.scores.of_settings, {first: 1.0, second: -1.0}) if second else None


def build_evidence(record: SweepRecord, scores: ConfirmScores) -> Evidence:
    return Evidence(
        questions=record.questions,
        answers=answer_sweep(record, scores),
        scores=scores,
        scale=build_scale(record, scores),
        looks=record.looks,
        looks_done=[look.seeds for look in record.looks_done] or record.looks,
    )


def read_confirm_scores(
    record: SweepRecord, folder: Path, *, metric: str = "", retained: RetainedRow | None = None
) -> ConfirmScores:
    """Returns the test scores of the complete confirm runs by `metric`; if it is empty, by the metric of the verdicts.

    Scores on a `retained` data set are in the runs' records, which must be read before.
    """
    if retained:
        metric, file = retained.metric.name, RETAINED_SCORES_FILE.format(retained.name)
    else:
        metric = metric or record.verdict_metric.name
        file = TEST_SCORES_FILE if metric == record.search_metric.name else ANSWERS_FILE.format("test")
    values: dict[RunKey, float] = {}
    examples: dict[RunKey, RunExampleScores] = {}
    problems = []
    for row in record.confirm_runs:
        if row.seed is None or not row.is_complete:
            continue
        scores = (row.record.retained.get(retained.name, {}) if row.record else {}) if retained else row.test_scores
        value = scores.get(metric)
        if not is_number(value):
            on = f"`{retained.name}`" if retained else "test data"
            problems.append(f"`{row.run}` has no {format_metric(metric)} on {on}.")
            continue
        values[row.subject, row.seed] = float(value)
        if metric == "perplexity":
            continue  # exp of a mean is no mean over examples, so intervals are over seeds alone
        try:
            examples[row.subject, row.seed] = read_examples(get_run_folder(folder, row.run) / file)
        except FileNotFoundError:
            pass  # the metric is no mean over examples
        except (OSError, RecordError, ValueError) as error:
            problems.append(f"`{row.run}/{file}` is not used: {error}.")
    num_runs = {arm.name: sum(subject == arm.name for subject, _ in values) for arm in record.arms if arm.is_base}
    regrets = {row.subject: row.regret for row in record.settings if row.regret}
    return build_scores(
        values,
        examples,
        deterministic={name for name, count in num_runs.items() if count == 1},
        score_range=METRIC_RANGES.get(metric, UNBOUNDED),
        problems=problems,
        # in the unit of the metric by which the search chose
        search_errors=regrets if metric == record.search_metric.name else {},
    )


def answer_sweep(record: SweepRecord, scores: ConfirmScores) -> list[AnswerRow]:
    """Returns the answers to the questions of a sweep, a row for each subject."""
    if not record.looks:
        return []
    return answer_questions(record.questions, scores, build_scale(record, scores), looks=record.looks)


def build_scale(record: SweepRecord, scores: ConfirmScores) -> MarginScale:
    """Returns the margin, and the best subjects of `frozen`, of `full`, and of all arms that train."""
    metric, methods = record.verdict_metric, {arm.method for arm in record.arms}

    def find_best(*methods: str) -> str | None:
        arms = {arm.name for arm in record.arms if arm.method in methods}
        names = [row.subject for row in record.settings if row.arm in arms]
        means = {name: metric.sign * found.value for name in names if (found := estimate_sum(scores, {name: 1.0}))}
        return min(means, key=means.__getitem__, default=None)

    return MarginScale(
        margin=parse_margin(record.margin),
        metric=metric,
        base=find_best(FrozenConfig.name),
        full=find_best("full"),
        best=None if "full" in methods else find_best(*methods - {FrozenConfig.name}),
    )


def compare_settings(
    name: AnswerName,
    pairs: Iterable[tuple[str, str]],
    scores: ConfirmScores,
    *,
    metric: ScoreMetric,
    margin: float | None,
    level: float,
) -> Iterator[AnswerRow]:
    """Yields the difference of each pair of subjects, and its verdict. The 5 % of the questions does not cover it.

    Both have the same seeds and examples, and the difference is in the metric's unit. It does not count the chance in
    the search. Without a margin only `better`, `worse` and `open` are possible.
    """
    scores = scores.of_settings
    scale = MarginScale(margin=Margin(value=margin or 0.0, is_share_of_gain=margin is None), metric=metric)
    for subject, reference in pairs:
        if (pair := compare_pair(subject, reference, scores, scale)) is None or subject == reference:
            continue
        value, interval = scale.measure_difference(scores, subject, reference, confidence=1 - 2 * level)
        num_seeds, verdict = len(pair.advantage.seeds), judge_difference([pair], level=level)
        blocker: Blocker = "one seed" if num_seeds < 2 else find_largest_part(pair.advantage)
        yield AnswerRow(
            name=name,
            arm=subject,
            subject=subject,
            reference=reference,
            verdict=verdict,
            value=value,
            interval=interval,
            num_seeds=num_seeds,
            blocker=blocker if verdict == "open" else None,
        )

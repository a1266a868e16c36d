"""The evidence of one sweep: test scores, answers to its questions, and what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorasweep.config.data import METRIC_RANGES
from lorasweep.config.method import FrozenConfig
from lorasweep.config.sweep import Margin, parse_margin
from lorasweep.errors import RecordError
from lorasweep.record import (
    ANSWERS_FILE,
    RETAINED_SCORES_FILE,
    TEST_SCORES_FILE,
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
    estimate_ratio,
    estimate_sum,
    read_examples,
)
from lorasweep.report.evidence.questions import (
    MarginScale,
    answer_questions,
    compare_pair,
    compute_level,
    judge_difference,
)
from lorasweep.report.evidence.verdicts import Answer, AnswerName, Blocker, ChainOutcome
from lorasweep.wording import format_metric

Ratio = tuple[float, Interval | None]
"""A ratio of two sums of scores with its interval."""
NO_EXAMPLE_SCORES = (
    "Single test examples have no scores here, so intervals are over seeds alone: other test data may differ by more."
)
OTHER_SEARCH_METRIC = (
    "The search chose settings by another metric than that of the verdicts, so the intervals do not include the chance "
    "in the search."
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The results of the confirm stage on test data; without means if there was none."""

    means: Mapping[str, Estimate] = field(default_factory=dict)
    """The mean score of each subject alone, over its seeds and the test examples."""
    shares: Mapping[str, Ratio] = field(default_factory=dict)
    """(base - subject) / (base - full) of each subject, with the interval at the level of the tests. Empty if full
    fine-tuning gained nothing."""
    answers: tuple[Answer, ...] = ()
    num_examples: int = 0
    """The number of test examples; 0 if no scores of single examples are known."""
    num_groups: int = 0
    """The number of groups of test examples, such as documents."""
    base: str | None = None
    """The subject that is the frozen base."""
    full: str | None = None
    """The best subject of full fine-tuning."""
    gain: float | None = None
    """Full fine-tuning's gain over the frozen base; None if it is not known or not positive."""
    margin: float | None = None
    """The margin in the metric's unit; None if it is a share of full's gain that is not known."""
    confidence: float = 0.95
    """The confidence of the intervals that the answers use; all answers together have 95 %."""
    notes: tuple[str, ...] = ()
    """One sentence for each reason why the numbers are less certain."""
    scores: ConfirmScores | None = None
    """The test scores, with the errors of the search; None if there was no confirm stage."""

    def mean(self, subject: str | None) -> Estimate | None:
        return self.means.get(subject) if subject else None

    def list_answers(self, name: AnswerName) -> list[Answer]:
        """Returns the answers to the questions of a kind. Within an arm, the smallest value is first."""
        return [answer for answer in self.answers if answer.name == name]

    def find_outcome(self, name: AnswerName, arm: str) -> ChainOutcome:
        """Returns what the answers on an arm's values say together; `not asked` if the sweep does not ask."""
        return ChainOutcome(arm=arm, answers=tuple(one for one in self.list_answers(name) if one.arm == arm))

    def estimate_difference(self, first: str, second: str | None) -> Estimate | None:
        """Returns `first - second` on the same seeds and examples, for pairs that no question compares."""
        if self.scores is None or second is None:
            return None
        return estimate_sum(self.scores.of_settings, {first: 1.0, second: -1.0})


def build_evidence(record: SweepRecord, scores: ConfirmScores) -> Evidence:
    scale = build_scale(record, scores)
    level = compute_level(record.questions, record.looks) if record.looks else 0.025
    means = estimate_means(scores)
    estimate = estimate_sum(scores.of_settings, scale.gain) if scale.base and scale.full else None
    gain = estimate.value if estimate and estimate.value > 0 else None
    margin = None if scale.margin.is_share_of_gain and gain is None else scale.margin.value
    shares: dict[str, Ratio] = {}
    if gain:
        # 0 and 1 by definition, without error
        shares = {name: (float(name == scale.full), None) for name in means if name in (scale.base, scale.full)}
        for name in [name for name in means if name not in shares]:
            kept = {scale.base or "": float(scale.sign), name: -float(scale.sign)}
            if share := estimate_ratio(scores, kept, scale.gain, confidence=1 - 2 * level):
                shares[name] = share
    return Evidence(
        means=means,
        shares=shares,
        answers=tuple(answer_sweep(record, scores)),
        num_examples=scores.num_examples,
        num_groups=scores.num_groups,
        base=scale.base,
        full=scale.full,
        gain=gain,
        margin=margin * gain if margin and gain and scale.margin.is_share_of_gain else margin,
        confidence=1 - 2 * level,
        notes=(
            *([NO_EXAMPLE_SCORES] if means and not scores.num_examples else []),
            *([OTHER_SEARCH_METRIC] if means and record.verdict_metric.name != record.search_metric.name else []),
            *scores.problems,
        ),
        scores=scores,
    )


def read_confirm_scores(
    record: SweepRecord, folder: Path, *, metric: str = "", retained: RetainedRow | None = None
) -> ConfirmScores:
    """Returns the test scores of the complete runs of the settings that are confirmed now, by the verdicts' metric.

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
        is_perplexity=metric == "perplexity",
        score_range=METRIC_RANGES.get(metric, UNBOUNDED),
        problems=problems,
        # in the unit of the metric by which the search chose
        search_errors=regrets if metric == record.search_metric.name else {},
    )


def answer_sweep(record: SweepRecord, scores: ConfirmScores) -> list[Answer]:
    """Returns the answers to the questions of a sweep."""
    if not record.looks:
        return []
    return answer_questions(record.questions, scores, build_scale(record, scores), looks=record.looks)


def build_scale(record: SweepRecord, scores: ConfirmScores) -> MarginScale:
    """Returns the margin, the sign of the metric, and the best subjects of `frozen` and of `full`."""
    sign = record.verdict_metric.sign

    def find_best(method: str) -> str | None:
        arms = {arm.name for arm in record.arms if arm.method == method}
        names = [row.subject for row in record.settings if row.arm in arms]
        means = {name: sign * found.value for name in names if (found := estimate_sum(scores, {name: 1.0}))}
        return min(means, key=means.__getitem__, default=None)

    return MarginScale(
        margin=parse_margin(record.margin), sign=sign, base=find_best(FrozenConfig.name), full=find_best("full")
    )


def compare_retained(
    record: SweepRecord, row: RetainedRow, scores: ConfirmScores, evidence: Evidence
) -> Iterator[Answer]:
    """Yields the change of each other subject's score on a retained data set against the frozen base.

    Both have the same seeds and examples. `equivalent` and `not worse` mean that no more than the margin was forgotten.
    Intervals have the level of the sweep's questions, but these verdicts are not among those that share 5 %.
    """
    base, confidence = evidence.base, evidence.confidence
    if base is None:
        return
    scores = scores.of_settings  # the numbers are about the confirmed setting itself
    margin = Margin(value=record.retain_margin, is_share_of_gain=False)
    scale = MarginScale(margin=margin, sign=row.metric.sign, base=base, full=None)
    for setting in record.settings:
        pair = compare_pair(setting.subject, base, scores, scale)
        change, interval = scale.measure(scores, setting.subject, base, confidence=confidence)
        if pair is None or change is None or setting.subject == base:
            continue
        num_seeds, verdict = len(pair.advantage.seeds), judge_difference([pair], level=(1 - confidence) / 2)
        blocker: Blocker | None = None
        if verdict == "open":
            blocker = "one seed" if num_seeds < 2 else "few seeds"
        yield Answer(
            name="retained",
            arm=setting.arm,
            key=None,
            subject=setting.subject,
            reference=base,
            compared_with=(base,),
            verdict=verdict,
            value=change,
            interval=interval,
            is_share=False,
            num_seeds=num_seeds,
            has_groups=False,
            blocker=blocker,
        )

"""The content of a sweep's report, and `report/summary.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasweep.config.sweep import parse_margin
from lorasweep.record import COST_FIELDS, STATES, is_number
from lorasweep.report.answers import AnswerLine, list_answer_lines
from lorasweep.report.caveats import Learning, describe_unstable_rates, judge_fairness, judge_learning
from lorasweep.report.evidence.questions import ENTRY_FIELDS
from lorasweep.report.recommend import (
    Recommendation,
    choose_arm,
    find_best_arm,
    find_score,
    get_score_sort_key,
    recommend,
)
from lorasweep.report.sweep_data import SubjectData, SweepData, load_sweep_data
from lorasweep.wording import (
    format_count,
    format_metric,
    format_score,
    format_seconds,
    format_share,
    format_share_estimate,
    join_words,
)

EVIDENCE_FIELDS = (
    *("num_examples", "num_groups", "base", "full", "gain", "relative_gain", "margin", "confidence", "notes"),
)
"""The fields of `Evidence` that `summary.json` has under the same names."""

ONE_SEED = (
    "Every score is one seed on validation data, on which the search also picked the winners; "
    "whether the differences are more than chance is not tested yet."
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of a sweep's report."""

    data: SweepData
    answers: tuple[AnswerLine, ...]
    """The three questions with their answers, which every output begins with."""
    learning: Learning
    """Whether the trials are better than an answer that needs no training. Its headline is the report's headline."""
    fairness: dict[str, Any]
    """The result of `judge_fairness`."""
    sentences: tuple[str, ...]
    """The findings that are neither an answer nor a warning."""
    recommended: tuple[Recommendation, ...]
    """The settings to use; a second entry has those for LoRA if another method is recommended. Empty if nothing was
    learned."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on reasons to doubt the numbers: methods that learned nothing, unequal searches, and hot rates."""
        unfair = self.fairness["sentences"][:1] if self.fairness["is_fair"] is False else ()
        return (*self.learning.warnings, *unfair, *describe_unstable_rates(self.data, self.learning))

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `report/summary.json`."""
        data, record, records = self.data, self.data.record, self.data.run_records
        return {
            "sweep": record.name,
            "status": record.status,
            "headline": self.learning.headline,
            "answers": [asdict(line) for line in self.answers],
            "questions": list_question_entries(data, self.learning),
            "warnings": self.warnings,
            "learning": asdict(self.learning),
            "metric": record.metric,
            "direction": record.direction,
            "test_metrics": [asdict(metric) for metric in record.test_metrics],
            "makespan_s": record.makespan_s,
            "tokens_trained": data.tokens_trained,
            "steps_planned": sum(run.steps_planned for run in records),
            "steps_done": sum(run.steps_done for run in records),
            "steps_saved": data.steps_saved,
            "base": {"score": data.best_score("frozen")},
            "arms": [_summarize_arm(arm, data) for arm in data.subjects],
            "sentences": self.sentences,
            "recommended": [asdict(one) for one in self.recommended],
            "retained": [asdict(change) for change in data.retained],
            # The evidence on a subject is in its entry in `arms`, under `confirmed`.
            "evidence": {name: getattr(data.evidence, name) for name in EVIDENCE_FIELDS},
            "fairness": self.fairness,
        }


def summarize(folder: Path) -> Summary:
    """Reads a sweep's folder and returns the content of its report.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    data = load_sweep_data(folder)
    learning = judge_learning(data)
    fairness = judge_fairness(data, has_learned=learning.state != "nothing")
    findings = fairness["sentences"]
    if fairness["is_fair"] is False:
        findings = findings[1:]  # the first one is a warning
    return Summary(
        data=data,
        answers=list_answer_lines(data, learning),
        learning=learning,
        fairness=fairness,
        sentences=tuple(describe_findings(data, findings)),
        recommended=tuple(recommend(data)),
    )


def list_question_entries(data: SweepData, learning: Learning) -> list[dict[str, Any]]:
    """Returns an entry for each answer, and one for the recommended setting of LoRA."""
    entries = [answer.as_entry() for answer in data.evidence.answers]
    choice = choose_arm(data, ["lora"])
    if learning.state == "nothing" or choice is None or choice.arm.setting is None or choice.arm.best is None:
        return entries
    setting = dict.fromkeys(ENTRY_FIELDS) | {
        "name": "setting",
        "subject": choice.arm.name,
        "verdict": "predicted" if choice.arm.best.is_predicted else "tried",
        "value": choice.arm.best.params,
        "interval": None if choice.arm.setting.regret is None else (0.0, choice.arm.setting.regret),
    }
    return [*entries, setting]


def _summarize_arm(arm: SubjectData, data: SweepData) -> dict[str, Any]:
    best, mean = arm.best, data.evidence.mean(arm.name)
    return {
        "name": arm.name,
        "arm": arm.arm,
        "method": arm.row.method,
        "best": {
            "score": best.value if best else None,
            "params": best.params if best else None,
            "run": best.run if best else None,
            "is_predicted": best.is_predicted if best else None,
        },
        "trials": {state: arm.count(state) for state in STATES},
        **{name: arm.cost(name) for name in COST_FIELDS},
        "arm_wall_s": sum(trial.record.wall_s for trial in arm.trials if trial.record),
        "share_of_full_gain": data.share_of_full_gain(best.value if best else None),
        "confirmed": mean.as_json() | {"share_of_full_gain": data.evidence.shares.get(arm.name)} if mean else None,
    }


def describe_findings(data: SweepData, fairness: list[str]) -> list[str]:
    """Returns the sentences, the most important first. Warnings and the headline of a failure stand above them."""
    return [
        *_describe_scores(data),
        *_describe_answers(data),
        *_describe_gain(data),
        *_describe_effort(data),
        *fairness,
        *([_describe_tests(data), _describe_margin(data)] if data.evidence.answers else []),
        *(data.evidence.notes if data.evidence.means else [ONE_SEED]),
        *data.record.warnings,
        *data.record.notes,
    ]


def _describe_scores(data: SweepData) -> list[str]:
    if all(find_score(arm, data) is None for arm in data.subjects):
        return ["No trial is complete, so there is no score to compare."]
    metric, order, evidence = format_metric(data.shown_metric.name), data.shown_metric.order, data.evidence
    sentences = [f"Scores are {metric}, {order} is better."]
    if evidence.means:
        counts = sorted({len(mean.seeds) for name, mean in evidence.means.items() if name != evidence.base} or {1})
        seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        groups = f" in {evidence.num_groups:,} groups" if evidence.num_groups != evidence.num_examples else ""
        examples = f" and {evidence.num_examples:,} test examples{groups}" if evidence.num_examples else ""
        sentences = [
            f"Scores are {metric} on test data that no search has seen, {order} is better: means over {seeds} fresh "
            f"{'seed' if counts[-1] == 1 else 'seeds'} with 95 % intervals over seeds{examples}."
        ]
    base, full = (find_best_arm(method, data) for method in ("frozen", "full"))
    if base is None or full is None:
        return [*sentences, "No share of full's gain is known, because that needs a score of `frozen` and of `full`."]
    if get_score_sort_key(base, data) <= get_score_sort_key(full, data):
        return [*sentences, "Full fine-tuning gained nothing, so no share of its gain is given."]
    return sentences


def _describe_answers(data: SweepData) -> list[str]:
    """Returns sentences on the metric that decides nothing, and on answers that were cut off; none without answers."""
    if not data.evidence.means or data.other_metric is None:
        return []
    verdict, other = format_metric(data.shown_metric.name), format_metric(data.other_metric.name)
    sentences = [f"Verdicts are about {verdict} (`confirm.metric`); {other} on the same test data decides nothing."]
    found = [run.record.answers.get("test", {}) for run in data.confirm_runs if run.record]
    numbers = ([one[key] for one in found if is_number(one.get(key))] for key in ("examples", "cut_off", "left_out"))
    examples, cut_off, left_out = numbers
    if any(cut_off):
        counts = f"{sum(cut_off):,} of {sum(examples):,} generated answers"
        sentences.append(f"{counts} were cut off at `data.answers.max_new_tokens`.")
    if any(left_out):
        counts = f"{max(left_out):,} test examples are not answered"
        sentences.append(f"{counts}, because prompt and reference are longer than `data.max_length`.")
    return sentences


def _describe_tests(data: SweepData) -> str:
    """Returns a sentence on the planned looks, the seeds and the level of the answers."""
    record, evidence = data.record, data.evidence
    used = max((len(mean.seeds) for mean in evidence.means.values()), default=0)
    count, looks = len(record.questions), join_words([str(look) for look in record.looks])
    planned = f"at {len(record.looks)} planned looks" if len(record.looks) > 1 else "once"
    return (
        f"The {'question is' if count == 1 else f'{count} questions are'} stated in the sweep and tested {planned} "
        f"({looks} seeds; {used} were used). The chance of any false verdict is at most 5 % over all questions and "
        f"looks, so the intervals beside verdicts have {100 * evidence.confidence:.3g} % confidence."
    )


def _describe_gain(data: SweepData) -> list[str]:
    """Returns a sentence on full fine-tuning's gain as a share of the frozen base's score; none without both."""
    found, base = data.evidence.relative_gain, data.find_subject(data.evidence.base)
    if found is None or base is None or (base.best and base.best.record and base.best.record.base.get("head")):
        return []  # a base with a new head gives a constant answer, so the gain says nothing about what the base knows
    verb = "lowers" if data.shown_metric.sign > 0 else "raises"
    return [
        f"Full fine-tuning {verb} the frozen base's {format_metric(data.shown_metric.name)} by "
        f"{format_share_estimate(*found)}: the smaller this share, the nearer is the data to what the base knows."
    ]


def _describe_effort(data: SweepData) -> list[str]:
    saved, planned = data.steps_saved, sum(record.steps_planned for record in data.run_records)
    share = format_share(saved / planned) if saved > 0 else ""
    saving = f"; stopping runs saved {saved:,} of {planned:,} planned steps ({share})" if saved > 0 else ""
    counts = {"trial": data.trials, "confirm run": data.confirm_runs}
    runs = [f"{len(rows):,} {name}{'' if len(rows) == 1 else 's'}" for name, rows in counts.items() if rows]
    sentences = [
        f"{join_words(runs)} in {format_seconds(data.record.makespan_s)}, "
        f"{format_count(data.tokens_trained)} tokens trained{saving}."
    ]
    if data.record.status != "complete":
        asked = sum(row.trials for row in data.record.arms)
        sentences.append(f"The sweep is {data.record.status}: {asked} trials were asked for.")
    return sentences


def _describe_margin(data: SweepData) -> str:
    """Returns a sentence about the smallest difference that matters, or why none is known."""
    setting, margin = data.record.margin, data.evidence.margin
    share = f"{setting} of full fine-tuning's gain over the frozen base"
    if margin is None:
        return (
            f"No margin: {share} is not known, because that needs test scores of both and a gain. So nothing can be "
            "shown to be equivalent, and no rank enough. Set `confirm.margin` to a number in the metric's unit."
        )
    # the gain is uncertain too, and each test counts the error of both
    meaning = f": {share}, whose error counts in each test" if parse_margin(setting).is_share_of_gain else ""
    return (
        f"The margin, the smallest difference that matters, is {format_score(margin)} "
        f"{format_metric(data.shown_metric.name)}, as stated in the sweep{meaning}."
    )

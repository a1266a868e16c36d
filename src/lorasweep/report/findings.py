"""The findings of a sweep, read from its folder once. Every output of the report is rendered from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasweep.config.sweep import parse_margin
from lorasweep.record import COST_FIELDS, STATES, SweepRecord, is_number
from lorasweep.report.answers import AnswerLine, build_entry, list_answer_lines
from lorasweep.report.caveats import (
    Fairness,
    Learning,
    describe_longer_answers,
    judge_fairness,
    judge_learning,
)
from lorasweep.report.recommend import Recommendation, choose_arm, recommend
from lorasweep.report.sweep_data import SubjectData, SweepData, load_sweep_data
from lorasweep.wording import format_count, format_metric, format_score, format_seconds, format_share, join_words

EVIDENCE_FIELDS = ("num_examples", "num_groups", "base", "full", "gain", "margin", "confidence", "notes")
"""The fields of `Evidence` that `summary.json` has under the same names."""

MAX_CUT_OFF_SHARE = 0.1
"""Above this share of generated answers that were cut off, their scores are doubted beside the answers."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a sweep found: its records with the evidence on its questions, and the judgements on them."""

    data: SweepData
    answers: tuple[AnswerLine, ...]
    """The three questions with their answers, which every output begins with."""
    learning: Learning
    """Whether the trials are better than an answer that needs no training. Its headline is the report's headline."""
    fairness: Fairness
    warnings: tuple[str, ...]
    """Reasons to doubt the numbers: methods that learned nothing, and unequal searches."""
    notes: tuple[str, ...]
    """Sentences that are neither an answer nor a warning, the most important first."""
    recommended: tuple[Recommendation, ...]
    """The settings to use; a second entry has those for LoRA if another method is recommended. Empty if nothing was
    learned."""

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `report/summary.json`."""
        data, record, runs = self.data, self.data.record, self.data.run_records
        return {
            "sweep": record.name,
            "status": record.status,
            "headline": self.learning.headline,
            "answers": [asdict(line) for line in self.answers],
            "questions": _list_question_entries(data, self.learning),
            "warnings": self.warnings,
            "learning": asdict(self.learning),
            "metric": record.search_metric.name,
            "direction": record.search_metric.direction,
            "test_metrics": [asdict(metric) for metric in record.test_metrics],
            "makespan_s": record.makespan_s,
            "tokens_trained": data.tokens_trained,
            "steps_planned": sum(run.steps_planned for run in runs),
            "steps_done": sum(run.steps_done for run in runs),
            "steps_saved": data.steps_saved,
            "base": {"score": data.best_score("frozen")},
            "arms": [_summarize_subject(one, data) for one in data.subjects],
            "sentences": self.notes,
            "recommended": [asdict(one) for one in self.recommended],
            "retained": [
                {"data": name, **build_entry(answer)} for name, found in data.retained.items() for answer in found
            ],
            # The evidence on a subject is in its entry in `arms`, under `confirmed`.
            "evidence": {name: getattr(data.evidence, name) for name in EVIDENCE_FIELDS},
            "fairness": asdict(self.fairness),
        }


def read_findings(folder: Path, record: SweepRecord | None = None) -> Findings:
    """Reads a sweep's folder, or only its runs if its record is given, and returns the findings.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    data = load_sweep_data(folder, record)
    learning = judge_learning(data)
    fairness = judge_fairness(data, has_learned=learning.state != "nothing")
    unfair = [f"The comparison of arms is not fair: {'; '.join(fairness.faults)}."] if fairness.faults else []
    return Findings(
        data=data,
        answers=list_answer_lines(data, learning),
        learning=learning,
        fairness=fairness,
        warnings=(
            *learning.warnings,
            *describe_longer_answers(data),
            *_describe_cut_off(data, are_many=True),
            *unfair,
        ),
        notes=(*_describe_cut_off(data, are_many=False), *_list_notes(data, fairness)),
        recommended=tuple(recommend(data, learning)),
    )


def _list_question_entries(data: SweepData, learning: Learning) -> list[dict[str, Any]]:
    """Returns an entry for each answer, and one for the recommended setting of LoRA."""
    entries = [build_entry(answer) for answer in data.evidence.answers]
    choice = choose_arm(data, ["lora"])
    if learning.state == "nothing" or choice is None or choice.data.setting is None:
        return entries
    setting = {
        "name": "setting",
        "subject": choice.data.name,
        "reference": None,
        "verdict": "predicted" if choice.best.is_predicted else "tried",
        "value": choice.best.params,
        "interval": None if choice.data.setting.regret is None else (0.0, choice.data.setting.regret),
        "open_because": None,
    }
    return [*entries, setting]


def _summarize_subject(one: SubjectData, data: SweepData) -> dict[str, Any]:
    best, mean = one.best, data.evidence.mean(one.name)
    return {
        "name": one.name,
        "arm": one.arm,
        "method": one.row.method,
        "best": {name: getattr(best, name, None) for name in ("params", "run", "is_predicted")}
        | {"score": one.search_score},
        "trials": {state: one.count(state) for state in STATES},
        **{name: one.cost(name) for name in COST_FIELDS},
        "arm_wall_s": sum(trial.record.wall_s for trial in one.trials if trial.record),
        "share_of_full_gain": data.share_of_full_gain(one.search_score),
        "confirmed": mean.as_json() | {"share_of_full_gain": data.evidence.shares.get(one.name)} if mean else None,
    }


def _list_notes(data: SweepData, fairness: Fairness) -> Iterator[str]:
    record, evidence = data.record, data.evidence
    yield from _describe_generated(data)
    saved, planned = data.steps_saved, sum(run.steps_planned for run in data.run_records)
    saving = f"; stopping runs saved {format_share(saved / planned)} of the planned steps" if saved > 0 else ""
    counts = {"trial": data.trials, "confirm run": data.confirm_runs}
    runs = [f"{len(rows):,} {name}{'' if len(rows) == 1 else 's'}" for name, rows in counts.items() if rows]
    spent = f"{format_seconds(record.makespan_s)}, {format_count(data.tokens_trained)} tokens trained"
    yield f"{join_words(runs) or 'No run'} in {spent}{saving}."
    if record.status != "complete":
        yield f"The sweep is {record.status}: {sum(row.trials for row in record.arms)} trials were asked for."
    if fairness.is_fair:
        yield f"The comparison of arms is {'' if record.status == 'complete' else 'so far '}fair."
    yield from fairness.edges
    if evidence.answers:
        looks, used = join_words([str(look) for look in record.looks]), max(a.num_seeds for a in evidence.answers)
        looks += " seed" if looks == "1" else " seeds"
        yield (
            f"The questions are stated in the sweep and tested at {looks} ({used} were used). The chance of any "
            f"false verdict is at most 5 % over all questions and looks, so the intervals beside verdicts have "
            f"{100 * evidence.confidence:.3g} % confidence."
        )
        yield _describe_margin(data)
    yield from evidence.notes
    yield from record.warnings
    yield from record.notes


def _describe_generated(data: SweepData) -> Iterator[str]:
    """Yields sentences on the metric that decides nothing, and on examples without an answer; none without answers."""
    if not data.evidence.means or data.other_metric is None:
        return
    verdict, other = format_metric(data.shown_metric.name), format_metric(data.other_metric.name)
    yield f"Verdicts are about {verdict} (`confirm.metric`); {other} on the same test data decides nothing."
    if left_out := max(_count_generated(data, "left_out"), default=0):
        yield (
            f"{left_out:,} test examples are not answered, because prompt and reference are longer than "
            "`data.max_length`."
        )


def _describe_cut_off(data: SweepData, *, are_many: bool) -> list[str]:
    """Returns a sentence on generated test answers that were cut off, if they are many or if they are few."""
    cut_off, examples = (sum(_count_generated(data, name)) for name in ("cut_off", "examples"))
    if not cut_off or (cut_off > MAX_CUT_OFF_SHARE * examples) is not are_many:
        return []
    counts = f"{cut_off:,} of {examples:,} generated answers"
    return [f"{counts} were cut off at `data.answers.max_new_tokens`, so their scores may be too low. Raise it."]


def _count_generated(data: SweepData, name: str) -> list[int]:
    found = [run.record.answers.get("test", {}) for run in data.confirm_runs if run.record]
    return [one[name] for one in found if is_number(one.get(name))]


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
    metric = format_metric(data.shown_metric.name)
    return f"The margin, the smallest difference that matters, is {format_score(margin)} {metric}{meaning}."

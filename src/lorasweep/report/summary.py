"""The content of a sweep's report, and `report/summary.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasweep.record import STATES
from lorasweep.report.answers import AnswerLine, list_answer_lines
from lorasweep.report.choice import choose_arm
from lorasweep.report.fairness import judge_fairness
from lorasweep.report.findings import describe_findings
from lorasweep.report.learning import Learning, judge_learning
from lorasweep.report.recommend import Recommendation, recommend
from lorasweep.report.sweep_data import ArmData, SweepData, load_sweep_data
from lorasweep.wording import short_key

COSTS = ("trainable_params", "trainable_fraction", "adapter_bytes", "peak_memory_bytes", "wall_s")
"""The fields of the best run's record that `summary.json` has for each arm."""

EVIDENCE_FIELDS = (
    *("num_examples", "num_groups", "base", "full", "gain", "relative_gain", "margin", "confidence", "notes"),
)
"""The fields of `Evidence` that `summary.json` has under the same names."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of a sweep's report."""

    data: SweepData
    answers: tuple[AnswerLine, ...]
    """The three questions with their answers, which every output begins with."""
    learning: Learning
    """Whether the trials are better than an answer that needs no training. Its headline is the report's headline."""
    fairness: dict[str, Any]
    """`is_fair` (None if fewer than two arms train), `sentences`, and `arms` (the effort of each arm)."""
    sentences: tuple[str, ...]
    """The findings that are neither an answer nor a warning."""
    recommended: tuple[Recommendation, ...]
    """The settings to use; a second entry has those for LoRA if another method is recommended. Empty if nothing was
    learned."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on reasons to doubt the numbers: methods that learned nothing, and unequal searches."""
        unfair = self.fairness["sentences"][:1] if self.fairness["is_fair"] is False else ()
        return (*self.learning.warnings, *unfair)

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
            "makespan_s": record.makespan_s,
            "tokens_trained": data.tokens_trained,
            "steps_planned": sum(run.steps_planned for run in records),
            "steps_done": sum(run.steps_done for run in records),
            "steps_saved_by_pruning": data.steps_saved_by_pruning,
            "base": {"score": data.best_score("frozen")},
            "arms": [_summarize_arm(arm, data) for arm in data.arms],
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
    fairness, facts = judge_fairness(data, has_learned=learning.state != "nothing")
    findings = fairness[1:] if facts["is_fair"] is False else fairness  # that a comparison is unfair is a warning
    return Summary(
        data=data,
        answers=list_answer_lines(data, learning),
        learning=learning,
        fairness={"sentences": fairness, **facts},
        sentences=tuple(describe_findings(data, findings)),
        recommended=tuple(recommend(data)),
    )


def list_question_entries(data: SweepData, learning: Learning) -> list[dict[str, Any]]:
    """Returns an entry for each answer, and one for the recommended setting of LoRA, as `summary.json` has them.

    The name of the question on the smallest sufficient value ends in the last part of its key: `smallest_rank`.
    """
    keys = {question.arm: short_key(question.key or "") for question in data.record.questions}
    shown = ("subject", "reference", "verdict", "value", "interval", "open_because", "to_settle")
    entries = [
        {"name": f"smallest_{keys[answer.arm]}" if answer.name == "smallest" else answer.name}
        | {field: getattr(answer, field) for field in shown}
        for answer in data.evidence.answers
    ]
    choice = choose_arm(data, ["lora"])
    if learning.state == "nothing" or choice is None or choice.arm.setting is None or choice.arm.best is None:
        return entries
    setting = dict.fromkeys(shown) | {
        "name": "setting",
        "subject": choice.arm.name,
        "verdict": "predicted" if choice.arm.best.is_predicted else "tried",
        "value": choice.arm.best.params,
        "interval": None if choice.arm.setting.regret is None else (0.0, choice.arm.setting.regret),
    }
    return [*entries, setting]


def _summarize_arm(arm: ArmData, data: SweepData) -> dict[str, Any]:
    best, confirmed = arm.best, data.evidence.subject(arm.name)
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
        **{name: arm.cost(name) for name in COSTS},
        "arm_wall_s": sum(trial.record.wall_s for trial in arm.trials if trial.record),
        "share_of_full_gain": data.share_of_full_gain(best.value if best else None),
        "confirmed": asdict(confirmed) if confirmed else None,
    }

"""The findings of a sweep as JSON: `report/summary.json`, and what `lorasweep sweep --json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lorasweep.report import text
from lorasweep.report.evidence.verdicts import Answer
from lorasweep.report.facts import Findings, list_subject_rows
from lorasweep.report.sweep_data import SweepData


def build_summary(findings: Findings) -> dict[str, Any]:
    """Returns the content of `report/summary.json`."""
    data, record, runs = findings.data, findings.data.record, findings.data.run_records
    evidence, fairness = data.evidence, findings.fairness
    headline, remedy = text.describe_failure(findings)
    return {
        "sweep": record.name,
        "status": record.status,
        "headline": headline,
        "remedy": remedy,
        "answers": [_build_answer(answer, data) for answer in findings.answers],
        "warnings": text.list_warnings(findings),
        "learning": asdict(findings.learning),
        "metric": record.search_metric.name,
        "direction": record.search_metric.direction,
        "test_metrics": [asdict(metric) for metric in record.test_metrics],
        "makespan_s": record.makespan_s,
        "tokens_trained": data.tokens_trained,
        "steps_planned": sum(run.steps_planned for run in runs),
        "steps_done": sum(run.steps_done for run in runs),
        "steps_saved": data.steps_saved,
        "base": {"score": data.best_score("frozen")},
        "subjects": list_subject_rows(data),
        "sentences": text.list_notes(findings),
        "recommended": [
            {
                "subject": one.subject.name,
                "is_settled": one.is_settled,
                "params": one.setting.params,
                "settings": text.name_settings(one),
                "commands": one.commands,
                "recipes": one.recipes,
            }
            for one in findings.recommended
        ],
        "evidence": {
            "num_examples": evidence.scores.num_examples,
            "num_groups": evidence.scores.num_groups,
            "base": evidence.scale.base,
            "full": evidence.scale.full,
            **{name: getattr(evidence, name) for name in ("gain", "margin", "confidence")},
        },
        "fairness": {
            "is_fair": fairness.is_fair,
            **{name: [text.describe_fault(one) for one in getattr(fairness, name)] for name in ("faults", "edges")},
        },
    }


def _build_answer(answer: Answer, data: SweepData) -> dict[str, Any]:
    return {
        "question": text.name_question(answer, data),
        "name": answer.name,
        "arm": answer.arm,
        "state": answer.state,
        "headline": text.describe_headline(answer, data),
        "unit": text.describe_unit(answer, data),
        "rows": [text.build_entry(row) | {"is_share": row.is_share, "seeds": row.num_seeds} for row in answer.rows],
        "next": asdict(answer.next) if answer.next else None,
    }

"""The content of a sweep's report, and `report/summary.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasweep.report.advice.advise import Advice, advise
from lorasweep.report.fairness import Fairness, judge_fairness
from lorasweep.report.findings import describe_findings
from lorasweep.report.intrinsic_dimension import find_d90
from lorasweep.report.sweep_data import STATES, ArmData, SweepData, load_sweep_data
from lorasweep.report.time_breakdown import TimeBreakdown, break_down_time
from lorasweep.wording import (
    UNKNOWN,
    format_bytes,
    format_count,
    format_estimate,
    format_score,
    format_seconds,
    format_settings,
    format_share,
    format_share_estimate,
)

COSTS = ("trainable_params", "trainable_fraction", "adapter_bytes", "peak_memory_bytes", "wall_s")
"""The fields of the best run's record that `summary.json` has for each arm."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of a sweep's report."""

    data: SweepData
    advice: Advice
    fairness: Fairness
    time: TimeBreakdown | None
    """None if the record does not hold the worker's times."""
    sentences: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `report/summary.json`."""
        data, record, records = self.data, self.data.record, self.data.run_records
        return {
            "sweep": record.name,
            "status": record.status,
            "metric": record.metric,
            "direction": record.direction,
            "makespan_s": record.makespan_s,
            "tokens_trained": data.tokens_trained,
            "steps_planned": sum(run.steps_planned for run in records),
            "steps_done": sum(run.steps_done for run in records),
            "steps_saved_by_pruning": data.steps_saved_by_pruning,
            "base": {"score": data.score_of("frozen")},
            "d90": find_d90(data),
            "arms": [_summarize_arm(arm, data) for arm in data.arms],
            "sentences": self.sentences,
            # The evidence on each arm is in the arm.
            "evidence": {key: value for key, value in asdict(data.evidence).items() if key != "arms"},
            "advice": asdict(self.advice),
            "fairness": asdict(self.fairness),
            "time": asdict(self.time) if self.time else None,
        }


def summarize(folder: Path) -> Summary:
    """Reads a sweep's folder and returns the content of its report.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    data = load_sweep_data(folder)
    advice, fairness = advise(data), judge_fairness(data)
    return Summary(
        data=data,
        advice=advice,
        fairness=fairness,
        time=break_down_time(data.record),
        sentences=tuple(describe_findings(data, advice, fairness)),
    )


def tabulate_arms(data: SweepData) -> dict[str, list[str]]:
    """Returns the table of arms for the terminal and TensorBoard: per name of a quantity, a text for each arm."""
    arms = data.arms
    found = [data.evidence.arm(arm.name) for arm in arms]
    scores = [arm.best.value if arm.best else None for arm in arms]
    confirmed = [format_estimate(one.mean, one.interval) if one else UNKNOWN for one in found]
    return {
        "arm": [arm.name for arm in arms],
        "best settings": [format_settings(arm.best.params) if arm.best else "no complete trial" for arm in arms],
        **({"test score": confirmed} if data.evidence.arms else {}),
        "score": [format_score(score, beside=scores) for score in scores],
        "of full's gain": [format_share_estimate(*data.gain_of(arm)) for arm in arms],
        "trained": [format_count(arm.cost("trainable_params")) for arm in arms],
        "of base": [format_share(arm.cost("trainable_fraction")) for arm in arms],
        "adapter": [format_bytes(arm.cost("adapter_bytes")) for arm in arms],
        "memory": [format_bytes(arm.cost("peak_memory_bytes")) for arm in arms],
        "time": [format_seconds(arm.cost("wall_s")) for arm in arms],
        "trials": [arm.describe_states() for arm in arms],
    }


def _summarize_arm(arm: ArmData, data: SweepData) -> dict[str, Any]:
    best, confirmed = arm.best, data.evidence.arm(arm.name)
    return {
        "name": arm.name,
        "method": arm.row.method,
        "best": {
            name: getattr(best, key, None) for name, key in (("score", "value"), ("params", "params"), ("run", "run"))
        },
        "trials": {state: arm.count(state) for state in STATES},
        **{name: arm.cost(name) for name in COSTS},
        "arm_wall_s": sum(trial.record.wall_s for trial in arm.trials if trial.record),
        "share_of_full_gain": data.share_of_full_gain(best.value if best else None),
        "confirmed": asdict(confirmed) if confirmed else None,
    }

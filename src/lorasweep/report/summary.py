"""The results of a sweep in numbers (`report/summary.json`) and in sentences. Comes after `headline`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorasweep.config.data import Direction
from lorasweep.report.advice import Advice, advise
from lorasweep.report.dimension import find_d90
from lorasweep.report.evidence import ArmEvidence, Evidence
from lorasweep.report.fairness import Fairness, judge_fairness
from lorasweep.report.headline import write_headline
from lorasweep.report.tables import Arm, SweepData
from lorasweep.report.time_use import TimeUse, measure_time_use


@dataclass(frozen=True, kw_only=True)
class FrozenBase:
    """The frozen base model."""

    score: float | None


@dataclass(frozen=True, kw_only=True)
class Best:
    """An arm's best complete trial; nulls where no trial is complete."""

    score: float | None
    params: dict[str, Any] | None
    """Swept keys (dotted) and their values."""
    run: str | None
    """The run's folder, relative to the sweep's."""


@dataclass(frozen=True, kw_only=True)
class TrialCounts:
    """How many trials of an arm are in each state."""

    complete: int
    paused: int
    pruned: int
    failed: int
    infeasible: int
    running: int


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm. Parameters, bytes and time are those of its best run."""

    name: str
    method: str
    best: Best
    trials: TrialCounts
    trainable_params: int | None
    trainable_fraction: float | None
    adapter_bytes: int | None
    peak_memory_bytes: int | None
    wall_s: float | None
    arm_wall_s: float
    """Seconds of all the arm's runs together."""
    share_of_full_gain: float | None
    """(base - arm) / (base - full) in the search: 0 is the frozen base, 1 full fine-tuning."""
    confirmed: ArmEvidence | None
    """The same arm on test data and fresh seeds; null where it was not confirmed."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One sweep in numbers and sentences; `as_json` is `report/summary.json`."""

    sweep: str
    status: str
    metric: str
    direction: Direction
    makespan_s: float
    tokens_trained: int
    steps_planned: int
    steps_done: int
    steps_saved_by_pruning: int
    """Steps planned but not done, over trials that are pruned or paused."""
    base: FrozenBase
    d90: int | None
    """Smallest dimension of `method=intrinsic` that keeps 90 % of full fine-tuning's gain; null where none is known."""
    arms: tuple[ArmSummary, ...]
    sentences: tuple[str, ...]
    evidence: Evidence
    advice: Advice
    fairness: Fairness
    """Whether the search treated the arms alike, by what ran."""
    time_use: TimeUse | None
    """Where the worker's time went; null where the record does not say."""

    def as_json(self) -> dict[str, Any]:
        """Returns the summary as nested dicts, `base.score` under `base`; an arm's evidence stands in its arm alone."""
        raw = asdict(self)
        del raw["evidence"]["arms"]
        return raw


def summarize(data: SweepData) -> Summary:
    """Returns what the sweep found."""
    records, advice, fairness = data.run_records, advise(data), judge_fairness(data)
    return Summary(
        sweep=data.record.name,
        status=data.record.status,
        metric=data.record.metric,
        direction=data.record.direction,
        makespan_s=data.record.makespan_s,
        tokens_trained=data.tokens_trained,
        steps_planned=sum(record.steps_planned for record in records),
        steps_done=sum(record.steps_done for record in records),
        steps_saved_by_pruning=data.steps_saved_by_pruning,
        base=FrozenBase(score=data.score_of("frozen")),
        d90=find_d90(data),
        arms=tuple(_summarize_arm(arm, data) for arm in data.arms),
        sentences=tuple(write_headline(data, advice, fairness)),
        evidence=data.evidence,
        advice=advice,
        fairness=fairness,
        time_use=measure_time_use(data.record),
    )


def _summarize_arm(arm: Arm, data: SweepData) -> ArmSummary:
    best = arm.best
    record = best.record if best else None
    return ArmSummary(
        name=arm.name,
        method=arm.row.method,
        best=Best(
            score=best.value if best else None, params=best.params if best else None, run=best.run if best else None
        ),
        trials=TrialCounts(
            complete=arm.count("complete"),
            paused=arm.count("paused"),
            pruned=arm.count("pruned"),
            failed=arm.count("failed"),
            infeasible=arm.count("infeasible"),
            running=arm.count("running"),
        ),
        trainable_params=record.trainable_params if record else None,
        trainable_fraction=record.trainable_fraction if record else None,
        adapter_bytes=record.adapter_bytes if record else None,
        peak_memory_bytes=record.peak_memory_bytes if record else None,
        wall_s=record.wall_s if record else None,
        arm_wall_s=sum(trial.record.wall_s for trial in arm.trials if trial.record),
        share_of_full_gain=data.share_of_full_gain(best.value if best else None),
        confirmed=data.evidence.arm(arm.name),
    )

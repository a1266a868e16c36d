"""What a sweep found in numbers (`report/summary.json`) and in plain sentences. Comes after `tables`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lorasweep.record import Direction
from lorasweep.report.dimension import describe_d90, find_d90
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.wording import (
    format_count,
    format_metric,
    format_score,
    format_seconds,
    format_setting,
    format_settings,
    format_share,
)

ONE_SEED = (
    "Every score is one seed on validation data, on which the search also picked the winners; "
    "whether the differences are more than chance is not tested yet."
)
EDGE_FRACTION = 0.05
"""A value this close to an end of its range, as a share of the range, counts as at the edge."""


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
    """How many trials of an arm ended how."""

    complete: int
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
    """(base - arm) / (base - full): 0 is the frozen base, 1 full fine-tuning."""


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
    """Steps planned but not done, over pruned trials."""
    base: FrozenBase
    d90: int | None
    """Smallest dimension of `method=intrinsic` that keeps 90 % of full fine-tuning's gain; null where none is known."""
    arms: tuple[ArmSummary, ...]
    sentences: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns the summary as nested dicts, `base.score` under `base`."""
        return asdict(self)


def summarize(data: SweepData) -> Summary:
    """Returns what the sweep found."""
    records = data.run_records
    return Summary(
        sweep=data.record.name,
        status=data.record.status,
        metric=data.record.metric,
        direction=data.record.direction,
        makespan_s=data.record.makespan_s,
        tokens_trained=sum(record.tokens_trained for record in records),
        steps_planned=sum(record.steps_planned for record in records),
        steps_done=sum(record.steps_done for record in records),
        steps_saved_by_pruning=_steps_saved(data),
        base=FrozenBase(score=data.score_of("frozen")),
        d90=find_d90(data),
        arms=tuple(_summarize_arm(arm, data) for arm in data.arms),
        sentences=(*_comparison(data), *describe_d90(data), *_effort(data), ONE_SEED, *_edges(data)),
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
    )


def _comparison(data: SweepData) -> list[str]:
    metric = format_metric(data.record.metric)
    order = "lower" if data.record.direction == "minimize" else "higher"
    if not any(arm.best for arm in data.arms):
        return ["No trial is complete, so there is no score to compare."]
    sentences = [_arm_sentence(arm, data) for arm in data.arms if arm.row.method not in ("frozen", "full")]
    return [f"Scores are {metric}, {order} is better. {_ends(data)}", *sentences]


def _ends(data: SweepData) -> str:
    base, full = data.score_of("frozen"), data.score_of("full")
    if base is None and full is None:
        return "There is no score of the frozen base or of full fine-tuning, so no share of a gain is given."
    if full is None:
        return f"The frozen base scores {format_score(base)}; without full fine-tuning no share of its gain is given."
    if base is None:
        return f"Full fine-tuning scores {format_score(full)}; without the frozen base no share of its gain is given."
    best = data.best_arm("full")
    settings = f" with {format_settings(best.best.params)}" if best and best.best else ""
    ends = f"The frozen base scores {format_score(base)} and full fine-tuning {format_score(full)}{settings}"
    return f"{ends}." if data.share_of_full_gain(full) else f"{ends}: it gained nothing, so no share is given."


def _arm_sentence(arm: Arm, data: SweepData) -> str:
    if arm.best is None:
        return f"`{arm.name}` has no complete trial."
    reached = f"`{arm.name}` reaches {format_score(arm.best.value)} with {format_settings(arm.best.params)}"
    share = data.share_of_full_gain(arm.best.value)
    gain = f", {format_share(share)} of what full fine-tuning gains" if share is not None else ""
    return f"{reached}{gain}{_cost(arm.best)}.{_lr_ratio(arm.best, data)}"


def _lr_ratio(trial: Trial, data: SweepData) -> str:
    full = data.best_arm("full")
    lr = trial.params.get("optim.lr")
    full_lr = full.best.params.get("optim.lr") if full and full.best else None
    if not (isinstance(lr, float) and isinstance(full_lr, float) and full_lr > 0):
        return ""
    return f" Its best learning rate is {lr / full_lr:.2g} times full fine-tuning's."


def _cost(trial: Trial) -> str:
    if trial.record is None:
        return ""
    share = format_share(trial.record.trainable_fraction)
    return f", training {format_count(trial.record.trainable_params)} parameters ({share} of the base)"


def _effort(data: SweepData) -> list[str]:
    tokens = format_count(sum(record.tokens_trained for record in data.run_records))
    time = format_seconds(data.record.makespan_s)
    sentences = [f"{len(data.trials)} trials in {time}, {tokens} tokens trained{_saving(data)}."]
    if data.record.status != "complete":
        asked = sum(arm.row.trials for arm in data.arms)
        sentences.append(f"The sweep is {data.record.status}: {asked} trials were asked for.")
    return sentences


def _saving(data: SweepData) -> str:
    saved, planned = _steps_saved(data), sum(record.steps_planned for record in data.run_records)
    return f"; pruning saved {saved:,} of {planned:,} steps ({format_share(saved / planned)})" if saved > 0 else ""


def _steps_saved(data: SweepData) -> int:
    pruned = [trial.record for trial in data.trials if trial.record and trial.state == "pruned"]
    return sum(record.steps_planned - record.steps_done for record in pruned)


def _edges(data: SweepData) -> list[str]:
    bests = [(arm, arm.best) for arm in data.arms if arm.best]
    return [
        f"The best `{key}` of `{arm.name}`, {format_setting(best.params[key])}, lies at the {end} end of its range: "
        f"search {'lower' if end == 'lower' else 'higher'} values too."
        for arm, best in bests
        for key, end in edges_of(arm, best).items()
    ]


def edges_of(arm: Arm, trial: Trial) -> dict[str, str]:
    """Returns the swept keys whose value in that trial lies at an end of its range, and which: `lower` or `upper`."""
    ends = {key: _edge(arm.row.space.get(key), trial.number_at(key)) for key in trial.params}
    # no rank is lower than 1
    return {key: end for key, end in ends.items() if end and not (key == "method.rank" and trial.params[key] == 1)}


def _edge(space: Any, value: float | None) -> str | None:
    bounds = _bounds(space)
    if value is None or bounds is None:
        return None
    low, high, is_log = bounds
    if is_log and value <= 0:
        return None
    position = (math.log(value / low) / math.log(high / low)) if is_log else (value - low) / (high - low)
    margin = 0.0 if isinstance(space, list) else EDGE_FRACTION
    return "lower" if position <= margin else "upper" if position >= 1 - margin else None


def _bounds(space: Any) -> tuple[float, float, bool] | None:
    if isinstance(space, dict):
        return _bounds_of([space.get("low"), space.get("high")], is_log=bool(space.get("log")))
    return _bounds_of(space if isinstance(space, list) else [], is_log=False)


def _bounds_of(values: list[Any], *, is_log: bool) -> tuple[float, float, bool] | None:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != len(values) or len(set(numbers)) < 2:
        return None
    return min(numbers), max(numbers), is_log and min(numbers) > 0

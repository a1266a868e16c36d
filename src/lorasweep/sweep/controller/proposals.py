"""The parameters of an arm's next trial: Sobol points first, then points that TPE or a Gaussian process chooses.

A proposal depends on the sweep's seed, the arm's name, the trial's number and the arm's history alone. It is made on a
fresh in-memory study, so nothing is written and no sampler carries a state from one trial to the next. The rules:

1. Trials below `count_startup_trials`, and all trials before `MIN_RESULTS` results, are scrambled Sobol points.
2. A model sees at most `MAX_HISTORY_TRIALS` results, the best half and the latest of the others, and every running
   trial.
3. A proposal that repeats an earlier trial of the arm is replaced by the first of the next `MAX_SOBOL_DRAWS` Sobol
   points that repeats none. If each of them does, as in a small space without further points, the proposal stays.

A sampler that is set by `_target_` follows none of these rules: it is asked from the first trial on.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from lorasweep.config.data import Direction
from lorasweep.config.sweep import ModelBasedSampler
from lorasweep.config.targets import Component
from lorasweep.errors import ConfigError, RunError, first_line
from lorasweep.sweep.controller.component_sampler import ask_sampler
from lorasweep.sweep.controller.encoding import Point, SpaceEncoding
from lorasweep.sweep.controller.sobol import SobolSequence
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.space import Space, grid_values

MAX_STARTUP_TRIALS = 32
"""Number of Sobol points at the start of an arm of 64 trials or more."""
MIN_RESULTS = 2
"""Number of results before a model is asked: a single result is neither better nor worse."""
MAX_SOBOL_DRAWS = 20
"""Number of Sobol points that are tried in place of a proposal that repeats an earlier trial."""
MAX_HISTORY_TRIALS = 200
"""Number of results that a model sees. The cost of a Gaussian process grows with the cube of this number: at 200 a
proposal takes about 0.5 s (TPE: 0.04 s), at 500 about 3 s."""
SAMPLER_ATTRIBUTE = "lorasweep:sampler"
"""Name of the user attribute with the state that a sampler set by `_target_` keeps with a trial that it proposed."""

Result = tuple[FrozenTrial, Point]


def propose(
    arm: Arm, history: Sequence[FrozenTrial], *, number: int, direction: Direction
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters of an arm's next trial, and further user attributes which that trial must get.

    Args:
        arm: The arm, with its sampler and the sweep's seed.
        history: The arm's earlier trials, in their order. COMPLETE: a result. PRUNED, or RUNNING with intermediate
            values: a partial result. PRUNED with a violated constraint: does not fit in memory. RUNNING without
            intermediate values: no result yet. FAIL: a model does not see it, but it is not repeated.
        number: The position of the new trial among the arm's trials, from 0.
        direction: Which scores are better.

    Raises:
        ConfigError: The sampler can't be built, or can't propose a trial for this space.
        RunError: Each combination of the grid was tried.
    """
    sampler, seed = arm.driver.sampler, _derive_seed(arm, number)
    encoding = SpaceEncoding(arm.space)
    tried = [(trial, encoding.encode(trial.params)) for trial in history]
    if not encoding.ranges:
        return encoding.decode({}), {}
    attributes: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if isinstance(sampler, Component):
                point, attributes = ask_sampler(
                    sampler, tried, encoding.ranges, kept_as=SAMPLER_ATTRIBUTE, seed=seed, direction=direction
                )
            elif sampler.name == "grid":
                point = _next_combination(arm, encoding, tried)
            else:
                sobol = SobolSequence(encoding.ranges, choices=frozenset(encoding.choices), seed=_derive_seed(arm))
                if sampler.name == "random":
                    point = _ask(RandomSampler(seed=seed), encoding.ranges, [], direction=direction)
                elif isinstance(sampler, ModelBasedSampler) and _has_learned(sampler, tried, number, trials=arm.trials):
                    point = _ask_model(sampler, tried, encoding.ranges, seed=seed, direction=direction)
                else:
                    point = sobol.point(number)
                draws = itertools.chain([point], (sobol.point(number + ahead) for ahead in range(MAX_SOBOL_DRAWS)))
                point = next((draw for draw in draws if not _is_tried(draw, tried, encoding)), point)
    except (ConfigError, RunError):
        raise
    except Exception as error:  # whatever a sampler raises: the user needs the sampler's name and another one to use
        raise ConfigError(
            f"`sampler` must be able to propose a trial for the space of arm {arm.name!r}, but {sampler.name!r} raised "
            f"{type(error).__name__}: {first_line(error)}. Use `sampler=qmc`."
        ) from error
    return encoding.decode(point), attributes


def count_startup_trials(sampler: ModelBasedSampler, *, trials: int) -> int:
    """Returns how many of an arm's trials are Sobol points before the sampler learns.

    This is `sampler.startup_trials`. If that is null, it is half of the arm's trials, rounded up, because so many may
    start before the first result, but at most `MAX_STARTUP_TRIALS`.
    """
    if sampler.startup_trials is not None:
        return sampler.startup_trials
    return min(math.ceil(trials / 2), MAX_STARTUP_TRIALS)


def _derive_seed(arm: Arm, number: int | None = None) -> int:
    """Returns the seed of one trial, or of the whole arm; it is the same in every process."""
    return zlib.crc32(f"{arm.driver.sweep.seed}/{arm.name}/{'' if number is None else number}".encode())


def _has_learned(sampler: ModelBasedSampler, tried: Sequence[Result], number: int, *, trials: int) -> bool:
    if number < count_startup_trials(sampler, trials=trials):
        return False
    return sum(trial.state != TrialState.FAIL and _last_value(trial) is not None for trial, _ in tried) >= MIN_RESULTS


def _is_tried(point: Point, tried: Sequence[Result], encoding: SpaceEncoding) -> bool:
    return any(encoding.is_repeat(point, earlier) for _, earlier in tried)


def _next_combination(arm: Arm, encoding: SpaceEncoding, tried: Sequence[Result]) -> Point:
    """Returns the first combination of the grid that no trial has, in a random order that the arm's seed decides."""
    axes = [
        range(len(encoding.choices[key])) if key in encoding.choices else grid_values(key, range_)
        for key, range_ in encoding.ranges.items()
    ]
    combinations = list(itertools.product(*axes))
    random.Random(_derive_seed(arm)).shuffle(combinations)
    used = {tuple(point.values()) for _, point in tried}
    for combination in combinations:
        if combination not in used:
            return dict(zip(encoding.ranges, combination, strict=True))
    raise RunError(
        f"`sampler=grid` must have a combination that arm {arm.name!r} did not try, but each of them was tried. "
        "Use `sampler=qmc`."
    )


def _ask_model(
    sampler: ModelBasedSampler, tried: Sequence[Result], ranges: Space, *, seed: int, direction: Direction
) -> Point:
    """Returns the point that TPE or a Gaussian process chooses from the arm's results and running trials."""
    is_result = [
        trial.state != TrialState.FAIL and (_is_infeasible(trial) or _last_value(trial) is not None)
        for trial, _ in tried
    ]
    results = _limit_results([pair for pair, known in zip(tried, is_result, strict=True) if known], direction=direction)
    shown = (_show_to_gp if sampler.name == "gp" else _show_to_tpe)(results, ranges, direction=direction)
    for (trial, point), known in zip(tried, is_result, strict=True):
        if trial.state == TrialState.RUNNING and not known:
            shown.append(create_trial(state=TrialState.RUNNING, params=point, distributions=ranges))
    # The models learn from the first result on: the points before it are Sobol points, not Optuna's random ones.
    if sampler.name == "gp":
        model: BaseSampler = GPSampler(n_startup_trials=1, seed=seed, warn_independent_sampling=False)
    else:
        model = TPESampler(n_startup_trials=1, seed=seed)
    return _ask(model, ranges, shown, direction=direction)


def _ask(sampler: BaseSampler, ranges: Space, shown: Sequence[FrozenTrial], *, direction: Direction) -> Point:
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.add_trials(shown)
    return study.ask(ranges).params


def _limit_results(results: Sequence[Result], *, direction: Direction) -> list[Result]:
    """Returns at most `MAX_HISTORY_TRIALS` results in their order: the best half, and the latest of the others."""
    by_rank = sorted(range(len(results)), key=lambda place: _rank(results[place][0], direction=direction))
    best = by_rank[: MAX_HISTORY_TRIALS // 2]
    latest = sorted(by_rank[MAX_HISTORY_TRIALS // 2 :])[len(best) - MAX_HISTORY_TRIALS :]
    return [results[place] for place in sorted([*best, *latest])]


def _show_to_tpe(results: Sequence[Result], ranges: Space, *, direction: Direction) -> list[FrozenTrial]:
    """Returns results as TPE takes them: it sorts partial ones behind complete ones, and infeasible ones last."""
    return [
        create_trial(
            state=TrialState.COMPLETE if trial.state == TrialState.COMPLETE else TrialState.PRUNED,
            value=trial.value,
            params=point,
            distributions=ranges,
            intermediate_values=trial.intermediate_values,
            constraints=trial.constraints,
        )
        for trial, point in results
    ]


def _show_to_gp(results: Sequence[Result], ranges: Space, *, direction: Direction) -> list[FrozenTrial]:
    """Returns results as a Gaussian process takes them: each with one value.

    A partial result has its last value plus the median progress of the complete trials since that step. Values worse
    than the median become the median: a trial that diverges is far worse than all others, and a model that has to fit
    such a value is less exact near the best ones (docs/benchmarks.md, Proposals). A result without a finite value gets
    the median too. A trial that does not fit in memory also violates a constraint.
    """
    complete = [trial for trial, _ in results if trial.state == TrialState.COMPLETE]
    values: list[float | None] = []
    for trial, _ in results:
        value = _last_value(trial)
        if value is not None and trial.state != TrialState.COMPLETE:
            step = max(trial.intermediate_values)
            progress = [
                end - start
                for peer in complete
                if math.isfinite(start := peer.intermediate_values.get(step, math.nan))
                and (end := _last_value(peer)) is not None
            ]
            value += statistics.median(progress) if progress else 0.0
        values.append(value)
    median = statistics.median(value for value in values if value is not None)
    better = min if direction == "minimize" else max
    # Optuna's sampler requires the same constraints in every trial; a trial is feasible at or below 0
    names = sorted({name for trial, _ in results for name in trial.constraints})
    return [
        create_trial(
            state=TrialState.COMPLETE,
            value=median if value is None else better(value, median),
            params=point,
            distributions=ranges,
            constraints={name: trial.constraints.get(name, -1.0) for name in names},
        )
        for value, (trial, point) in zip(values, results, strict=True)
    ]


def _is_infeasible(trial: FrozenTrial) -> bool:
    """Whether a trial does not fit in memory."""
    return any(excess > 0 for excess in trial.constraints.values())


def _last_value(trial: FrozenTrial) -> float | None:
    """Returns a trial's value, or its last intermediate one; None if there is none that is finite."""
    if _is_infeasible(trial):
        return None
    value = trial.value
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return value if value is not None and math.isfinite(value) else None


def _rank(trial: FrozenTrial, *, direction: Direction) -> tuple[int, int, float]:
    """Returns the sort key of a result, best first: complete ones, then partial ones by how far they came (as TPE)."""
    value = _last_value(trial)
    if value is None:
        return 2, 0, 0.0
    cost = value if direction == "minimize" else -value
    return (0, 0, cost) if trial.state == TrialState.COMPLETE else (1, -max(trial.intermediate_values), cost)

"""Optuna's TPE at a price that stays: of a long study it sees the best trials and the newest.

Comes before `search`, which makes samplers. Up to `MOST_TRIALS` trials it is Optuna's own, unchanged.
"""

from __future__ import annotations

from collections.abc import Container
from operator import attrgetter
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

MOST_TRIALS = 1_000
"""Trials that ended and that TPE sees. It goes through all of them several times whenever it is asked."""
GOOD_TRIALS = 25
"""The best trials, which TPE sets against all others; it takes a tenth of a study and never more than these."""


class WindowedTPE(TPESampler):
    """Optuna's TPE on a window of the study: its good trials are those of the whole study, the others its newest."""

    _window: tuple[int, optuna.Study] | None = None
    """The number of the trial that was last sampled for, and what is seen for it."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Called by Optuna: the keys that the trials have in common."""
        return super().infer_relative_search_space(self._seen(study, trial), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Called by Optuna: values for those keys."""
        return super().sample_relative(self._seen(study, trial), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Called by Optuna: the value of any other key."""
        return super().sample_independent(self._seen(study, trial), trial, param_name, param_distribution)

    def _seen(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        if self._window is None or self._window[0] != trial.number:
            most = max(MOST_TRIALS, self._n_startup_trials)
            self._window = trial.number, see_window(study, most=most)
        return self._window[1]


def see_window(study: optuna.Study, *, most: int) -> optuna.Study:
    """Returns a study with at most so many trials that ended and all that run; the study itself where it has no more.

    Args:
        study: A study of one objective.
        most: How many, >= `GOOD_TRIALS`.
    """
    trials = study._get_trials(deepcopy=False, use_cache=True)  # as it is for the whole of this ask
    if len(trials) <= most:
        return study
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(ended) <= most:
        return study
    good = {trial.number for trial in find_good(ended, maximize=study.direction == StudyDirection.MAXIMIZE)}
    newest = {trial.number for trial in [trial for trial in ended if trial.number not in good][len(good) - most :]}
    kept = good | newest
    seen = [trial for trial in trials if trial.number in kept or trial.state == TrialState.RUNNING]
    return cast("optuna.Study", _Window(study, seen))


def find_good(ended: list[FrozenTrial], *, maximize: bool) -> list[FrozenTrial]:
    """Returns the `GOOD_TRIALS` best of the trials that ended, in TPE's order: complete, pruned, infeasible."""
    complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    complete.sort(key=attrgetter("value"), reverse=maximize)
    good: list[FrozenTrial] = []
    for trial in complete:
        if len(good) == GOOD_TRIALS:
            return good
        if not _excess(trial):
            good.append(trial)
    rest = [trial for trial in ended if trial.state == TrialState.PRUNED or _excess(trial)]
    rest.sort(key=lambda trial: _rank(trial, maximize=maximize))
    return [*good, *rest][:GOOD_TRIALS]


def _excess(trial: FrozenTrial) -> float:
    """By how much a trial breaks its constraints."""
    return sum(excess for excess in trial.constraints.values() if excess > 0)


def _rank(trial: FrozenTrial, *, maximize: bool) -> tuple[float, float, float]:
    """Pruned trials by how far they came, then by their score there; infeasible ones last."""
    if excess := _excess(trial):
        return 1, excess, 0
    if not trial.intermediate_values:
        return 0, 1, 0
    step, value = max(trial.intermediate_values.items())
    score = float("inf") if value != value else -value if maximize else value
    return 0, -step, score


class _Window:
    """A study of which only some trials are seen; all else is the study's."""

    def __init__(self, study: optuna.Study, trials: list[FrozenTrial]) -> None:
        self._study = study
        self._trials = trials

    def _get_trials(self, *, states: Container[TrialState] | None = None, **how: bool) -> list[FrozenTrial]:
        """As Optuna's; `how` asks for copies or the cache, of which neither is needed."""
        return [trial for trial in self._trials if states is None or trial.state in states]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

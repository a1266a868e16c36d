"""Between Optuna's studies and runs: asks for trials, reports their evaluations, tells how they ended."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.run import RunConfig
from lorasweep.errors import OutOfMemory, RunError, WorkerError
from lorasweep.record import RunRecord
from lorasweep.sweep.definition import Arm
from lorasweep.sweep.folder import (
    INFEASIBLE_ATTRIBUTE,
    REASON_ATTRIBUTE,
    RUN_ATTRIBUTE,
    SCORE_ATTRIBUTE,
    SweepFolder,
)
from lorasweep.sweep.search import build_sampler
from lorasweep.training import RunPlace

RunEnded = Callable[[RunRecord, Path, Mapping[str, Any]], None]
"""Called with the record, the folder and the swept values of each run that ended well."""


class Observer(Protocol):
    """What a sweep tells while it runs; the live table is one."""

    def trial_started(self, arm: Arm, number: int, params: Mapping[str, Any], *, steps: int) -> None:
        """A trial begins; its run has so many optimizer steps."""

    def evaluated(self, arm: Arm, number: int, step: int, value: float) -> None:
        """A running trial was evaluated."""

    def trial_ended(self, arm: Arm, number: int, state: str, value: float | None, *, wall_s: float) -> None:
        """A trial ended as `complete`, `pruned`, `failed` or `infeasible` and took so long."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenTrial:
    """A trial that is running: what the sampler proposed, and the run it becomes."""

    arm: Arm
    trial: Trial
    config: RunConfig
    place: RunPlace


class Trials:
    """The trials of an open sweep."""

    def __init__(self, sweep: SweepFolder, *, observer: Observer, run_ended: RunEnded) -> None:
        self.sweep = sweep
        self.observer = observer
        self.run_ended = run_ended
        self.failures_in_a_row = 0

    def left(self, arm: Arm) -> int:
        """Returns how many trials of an arm are still to be asked for."""
        return arm.trials - len(self.sweep.studies[arm.name].get_trials(deepcopy=False))

    def unfinished(self) -> list[tuple[Arm, FrozenTrial]]:
        """Returns the trials that an earlier session left running, arm by arm."""
        return [(arm, trial) for arm in self.sweep.definition.arms for trial in self.sweep.unfinished_trials(arm)]

    def ask(self, arm: Arm) -> OpenTrial:
        """Asks the arm's sampler for a new trial."""
        study = self.sweep.studies[arm.name]
        number = len(study.get_trials(deepcopy=False))
        study.sampler = build_sampler(
            arm.driver.sampler, arm.space, seed=arm.driver.sweep.seed, number=number, arm=arm.name
        )
        trial = study.ask(fixed_distributions=arm.space)
        trial.set_user_attr(RUN_ATTRIBUTE, self.sweep.run_name(arm.name, trial.number))
        return self._open(arm, trial)

    def reopen(self, arm: Arm, trial: FrozenTrial) -> OpenTrial:
        """Takes up a trial that an earlier session left running, under its number."""
        return self._open(arm, Trial(self.sweep.studies[arm.name], trial._trial_id))

    def report(self, opened: OpenTrial, step: int, value: float) -> bool:
        """Reports an evaluation and returns whether the pruner wants the trial to end."""
        self.observer.evaluated(opened.arm, opened.trial.number, step, value)
        known = self.sweep.studies[opened.arm.name].get_trials(deepcopy=False)[opened.trial.number]
        if step not in known.intermediate_values:  # reported before a crash that came before the checkpoint
            opened.trial.report(value, step)
        return opened.trial.should_prune()

    def tell(self, opened: OpenTrial, record: RunRecord) -> None:
        """Tells the study of a run that is complete or pruned."""
        self.failures_in_a_row = 0
        study, trial = self.sweep.studies[opened.arm.name], opened.trial
        trial.set_user_attr(SCORE_ATTRIBUTE, record.score)
        if record.status == "pruned":
            trial.set_user_attr(REASON_ATTRIBUTE, record.reason)
            study.tell(trial, state=OptunaState.PRUNED)
        else:
            study.tell(trial, record.score)
        self.run_ended(record, opened.place.folder, trial.params)
        self._ended(opened, record.status, record.score, wall_s=record.wall_s)

    def tell_failure(self, opened: OpenTrial, error: Exception) -> None:
        """Tells the study of a run that failed, or does not fit in memory (infeasible).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed.
        """
        infeasible = isinstance(error, OutOfMemory)
        reason = str(error) if isinstance(error, RunError) else traceback.format_exception_only(error)[-1].strip()
        opened.trial.set_user_attr(REASON_ATTRIBUTE, reason)
        if infeasible:
            opened.trial.set_user_attr(INFEASIBLE_ATTRIBUTE, value=True)
            opened.trial.set_constraint("memory", 1.0)
        self.sweep.studies[opened.arm.name].tell(opened.trial, state=OptunaState.FAIL)
        self._ended(opened, "infeasible" if infeasible else "failed", None, wall_s=0.0)
        self.failures_in_a_row += 1
        limit = opened.arm.driver.sweep.max_failures
        if self.failures_in_a_row >= limit:
            self.sweep.save("interrupted")
            raise WorkerError(
                f"fewer than {limit} trials in a row may fail (`sweep.max_failures`), "
                f"but the last one failed too: {reason} "
                f"Their records in {str(self.sweep.path / 'runs')!r} have the tracebacks."
            ) from error

    def _open(self, arm: Arm, trial: Trial) -> OpenTrial:
        config = arm.compose(trial.params)
        folder = self.sweep.path / self.sweep.run_name(arm.name, trial.number)
        self.observer.trial_started(arm, trial.number, trial.params, steps=config.trainer.max_steps)
        self.sweep.save()
        place = RunPlace(folder=folder, arm=arm.name, trial=trial.number)
        return OpenTrial(arm=arm, trial=trial, config=config, place=place)

    def _ended(self, opened: OpenTrial, state: str, value: float | None, *, wall_s: float) -> None:
        self.sweep.save()
        self.observer.trial_ended(opened.arm, opened.trial.number, state, value, wall_s=wall_s)

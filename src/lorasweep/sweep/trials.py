"""Between Optuna's studies and runs: asks for a stage's trials, reports their evaluations, tells how they ended."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.run import RunConfig
from lorasweep.errors import Diverged, OutOfMemory, RecordError, RunError, WorkerError
from lorasweep.record import RunRecord, read_run
from lorasweep.redaction import redact
from lorasweep.sweep.definition import Arm
from lorasweep.sweep.folder import SweepFolder
from lorasweep.sweep.rows import INFEASIBLE_ATTRIBUTE, REASON_ATTRIBUTE, RUN_ATTRIBUTE, SCORE_ATTRIBUTE
from lorasweep.sweep.stages import Stage
from lorasweep.training import RunPlace

RunEnded = Callable[[RunRecord, Path, Mapping[str, Any]], None]
"""Called with the record, the folder and the swept values of each run that ended well."""


class Observer(Protocol):
    """What a sweep tells while it runs; the live table is one."""

    def stage_started(self, stage: str, asked: Mapping[str, int]) -> None:
        """A stage begins, or goes on; each arm has so many trials in it, those that ended included."""

    def trial_started(self, arm: Arm, number: int, params: Mapping[str, Any], *, steps: int) -> None:
        """A trial begins; its run has so many optimizer steps."""

    def evaluated(self, arm: Arm, number: int, step: int, value: float) -> None:
        """A running trial was evaluated."""

    def trial_ended(self, arm: Arm, number: int, state: str, value: float | None, *, wall_s: float) -> None:
        """A trial ended as `complete`, `pruned`, `failed` or `infeasible` and took so long."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenTrial:
    """A trial that is running: what was proposed, and the run it becomes."""

    arm: Arm
    trial: Trial
    params: Mapping[str, Any]
    config: RunConfig
    place: RunPlace


class Trials:
    """The trials of one stage of an open sweep."""

    def __init__(self, sweep: SweepFolder, stage: Stage, *, observer: Observer, run_ended: RunEnded) -> None:
        self.sweep = sweep
        self.stage = stage
        self.observer = observer
        self.run_ended = run_ended
        self.failures_in_a_row = 0
        observer.stage_started(stage.name, {arm.name: stage.asked(arm) for arm in sweep.definition.arms})

    def left(self, arm: Arm) -> int:
        """Returns how many trials of an arm are still to be asked for."""
        return self.stage.left(arm)

    def progress(self, arm: Arm) -> float:
        """Returns the share of an arm's trials that have begun, 0 to 1."""
        return 1 - self.left(arm) / self.stage.asked(arm)

    def unfinished(self) -> list[tuple[Arm, FrozenTrial]]:
        """Returns the trials that an earlier session left running, arm by arm; tells those whose run had ended."""
        left = []
        for arm in self.sweep.definition.arms:
            study = self.stage.study(arm)
            for trial in study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)) if study else []:
                record = _ended_run(self.stage.place(arm, trial.number).folder)
                if record is None:
                    left.append((arm, trial))
                else:
                    self.tell(self.reopen(arm, trial), record)
        return left

    def ask(self, arm: Arm) -> OpenTrial:
        """Begins a new trial of an arm."""
        trial = self.stage.ask(arm)
        folder = self.stage.place(arm, trial.number).folder
        trial.set_user_attr(RUN_ATTRIBUTE, folder.relative_to(self.sweep.path).as_posix())
        return self._open(arm, trial)

    def reopen(self, arm: Arm, trial: FrozenTrial) -> OpenTrial:
        """Takes up a trial that an earlier session left running, under its number."""
        study = self.stage.study(arm)
        assert study is not None
        return self._open(arm, Trial(study, trial._trial_id))

    def report(self, opened: OpenTrial, step: int, value: float) -> bool:
        """Reports an evaluation and returns whether the trial is to end."""
        self.observer.evaluated(opened.arm, opened.trial.number, step, value)
        return self.stage.should_prune(opened.arm, opened.trial, step, value)

    def tell(self, opened: OpenTrial, record: RunRecord) -> None:
        """Tells the study of a run that is complete or pruned, scored on test data first where the stage does that."""
        try:
            record, value = self.stage.finish(opened.config, record, opened.place.folder)
        except Exception as error:  # a run that can't be scored must not end the sweep
            self.tell_failure(opened, error)
            return
        self.failures_in_a_row = 0
        trial = opened.trial
        trial.set_user_attr(SCORE_ATTRIBUTE, value)
        if record.status == "pruned":
            trial.set_user_attr(REASON_ATTRIBUTE, record.reason)
            trial.study.tell(trial, state=OptunaState.PRUNED)
        else:
            trial.study.tell(trial, value)
        self.run_ended(record, opened.place.folder, opened.params)
        self._ended(opened, record.status, value, wall_s=record.wall_s)

    def tell_failure(self, opened: OpenTrial, error: Exception) -> None:
        """Tells the study of a run that failed, or does not fit in memory (infeasible).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed, or nothing can be written any more.
        """
        self.sweep.check_disk(error)
        infeasible = isinstance(error, OutOfMemory)
        reason = str(error) if isinstance(error, RunError) else traceback.format_exception_only(error)[-1].strip()
        opened.trial.set_user_attr(REASON_ATTRIBUTE, redact(reason))
        if infeasible:
            opened.trial.set_user_attr(INFEASIBLE_ATTRIBUTE, value=True)
            opened.trial.set_constraint("memory", 1.0)
        # samplers leave failed trials out of account; from one that was pruned and breaks a constraint TPE learns
        opened.trial.study.tell(opened.trial, state=OptunaState.PRUNED if infeasible else OptunaState.FAIL)
        self._ended(opened, "infeasible" if infeasible else "failed", None, wall_s=0.0)
        if self.stage.reads_test and isinstance(error, Diverged):
            return  # that a winner diverges on other seeds is a result
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
        config, params = self.stage.config(arm, trial), self.stage.params(arm, trial)
        self.observer.trial_started(arm, trial.number, params, steps=config.trainer.max_steps)
        self.sweep.save()
        return OpenTrial(arm=arm, trial=trial, params=params, config=config, place=self.stage.place(arm, trial.number))

    def _ended(self, opened: OpenTrial, state: str, value: float | None, *, wall_s: float) -> None:
        self.sweep.save()
        self.observer.trial_ended(opened.arm, opened.trial.number, state, value, wall_s=wall_s)


def _ended_run(folder: Path) -> RunRecord | None:
    """The record of a run that ended well but was not told, because the process was killed in between; else None."""
    try:
        record = read_run(folder)
    except RecordError:
        return None
    return record if record.status in ("complete", "pruned") else None

"""Between Optuna's studies and runs: takes a stage's trials, reports their evaluations, tells how they ended.

A trial belongs to the worker that took it. Each is asked for once, told once, and taken over once where its worker is
gone, because that happens while the worker holds the sweep's lock.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.run import RunConfig
from lorasweep.errors import Diverged, OutOfMemory, RecordError, RunError, WorkerError, WorkerLost
from lorasweep.record import RunRecord, read_run
from lorasweep.redaction import redact
from lorasweep.sweep.definition import Arm
from lorasweep.sweep.folder import SweepFolder
from lorasweep.sweep.rows import (
    INFEASIBLE_ATTRIBUTE,
    REASON_ATTRIBUTE,
    RUN_ATTRIBUTE,
    SCORE_ATTRIBUTE,
    WORKER_ATTRIBUTE,
)
from lorasweep.sweep.stages import Stage, frozen
from lorasweep.sweep.workers import Colleagues, Registration
from lorasweep.training import RunPlace, Telemetry

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
    """The trials of one stage of an open sweep, as one worker takes them."""

    def __init__(
        self,
        sweep: SweepFolder,
        stage: Stage,
        *,
        worker: Registration,
        colleagues: Colleagues,
        observer: Observer,
        run_ended: RunEnded,
        telemetry: Telemetry,
    ) -> None:
        self.sweep = sweep
        self.stage = stage
        self.worker = worker
        self.colleagues = colleagues
        self.observer = observer
        self.run_ended = run_ended
        self.telemetry = telemetry
        self.failures_in_a_row = 0
        self.mine: set[tuple[str, int]] = set()
        """Arm and number of the trials that this worker has taken and not told."""
        observer.stage_started(stage.name, {arm.name: stage.asked(arm) for arm in sweep.definition.arms})

    def left(self, arm: Arm) -> int:
        """Returns how many trials of an arm are still to be asked for."""
        return self.stage.left(arm)

    def progress(self, arm: Arm) -> float:
        """Returns the share of an arm's trials that have begun, 0 to 1."""
        return 1 - self.left(arm) / self.stage.asked(arm)

    def abandoned(self) -> list[tuple[Arm, FrozenTrial]]:
        """Returns the running trials of workers that are gone, arm by arm."""
        arms = self.sweep.definition.arms
        return [(arm, trial) for arm in arms for trial in self._running(arm) if self._is_abandoned(arm, trial)]

    def others_run(self) -> bool:
        """Whether trials are running that belong to other workers, gone or not."""
        return any(
            (arm.name, trial.number) not in self.mine
            for arm in self.sweep.definition.arms
            for trial in self._running(arm)
        )

    def expected_s(self, arm: Arm) -> float | None:
        """Returns how long a trial of an arm takes to its end (seconds, median); None before the first has."""
        study = self.stage.study(arm)
        complete = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,)) if study else []
        times = [trial.duration.total_seconds() for trial in complete if trial.duration is not None]
        return statistics.median(times) if times else None

    def take(self, arms: Sequence[Arm]) -> OpenTrial | None:
        """Takes the next trial of these arms: one whose worker is gone, else a new one of the arm that is least far.

        One that had ended, but was not told because its worker was gone before that, is told.
        """
        with self.telemetry.phase("storage"):
            return self._take(arms)

    def _take(self, arms: Sequence[Arm]) -> OpenTrial | None:
        while (claimed := self.sweep.storage.exclusively(lambda: self._claim(arms))) is not None:
            arm, trial, is_new = claimed
            self.mine.add((arm.name, trial.number))
            if is_new:
                self.stage.describe(arm, trial)
            opened = self._open(arm, trial)
            record = None if is_new else _ended_run(opened.place.folder)
            if record is None:
                return opened
            self.tell(opened, record)
        return None

    def report(self, opened: OpenTrial, step: int, value: float) -> bool:
        """Reports an evaluation and returns whether the trial is to end.

        Raises:
            WorkerLost: The trial was taken over.
        """
        with self.telemetry.phase("storage"):
            self._check_mine(opened)
            self.observer.evaluated(opened.arm, opened.trial.number, step, value)
            return self.stage.should_prune(opened.arm, opened.trial, step, value)

    def tell(self, opened: OpenTrial, record: RunRecord) -> None:
        """Tells the study of a run that is complete or pruned, scored on test data first where the stage does that."""
        try:
            record, value = self.stage.finish(opened.config, record, opened.place.folder)
        except WorkerError:
            raise
        except Exception as error:  # a run that can't be scored must not end the sweep
            self.tell_failure(opened, error)
            return
        self.failures_in_a_row = 0
        if record.status == "pruned":
            self._tell(opened, OptunaState.PRUNED, {SCORE_ATTRIBUTE: value, REASON_ATTRIBUTE: record.reason})
        else:
            self._tell(opened, OptunaState.COMPLETE, {SCORE_ATTRIBUTE: value}, value=value)
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
        said: dict[str, Any] = {REASON_ATTRIBUTE: redact(reason)}
        # samplers leave failed trials out of account; from one that was pruned and breaks a constraint TPE learns
        if infeasible:
            opened.trial.set_constraint("memory", 1.0)
            self._tell(opened, OptunaState.PRUNED, {**said, INFEASIBLE_ATTRIBUTE: True})
        else:
            self._tell(opened, OptunaState.FAIL, said)
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

    def _claim(self, arms: Sequence[Arm]) -> tuple[Arm, Trial, bool] | None:
        """Signs a trial, within the sweep's lock; whether it is new."""
        for arm in arms:
            for known in self._running(arm):
                owner = known.user_attrs.get(WORKER_ATTRIBUTE)
                if self._is_abandoned(arm, known) and (owner == self.worker.id or self.colleagues.say_lost(owner)):
                    study = self.stage.study(arm)
                    assert study is not None
                    return arm, self._sign(Trial(study, known._trial_id)), False
        open_arms = [arm for arm in arms if self.left(arm) > 0]
        if not open_arms:
            return None
        arm = min(open_arms, key=self.order)
        trial = self._sign(self.stage.ask(arm))
        folder = self.stage.place(arm, trial.number).folder
        trial.set_user_attr(RUN_ATTRIBUTE, folder.relative_to(self.sweep.path).as_posix())
        return arm, trial, True

    def order(self, arm: Arm) -> tuple[bool, float]:
        """Arms without a space come first, then the one that is least far."""
        return bool(arm.space), self.progress(arm)

    def _sign(self, trial: Trial) -> Trial:
        self.sweep.storage.check_exclusive()
        trial.set_user_attr(WORKER_ATTRIBUTE, self.worker.id)
        return trial

    def _running(self, arm: Arm) -> list[FrozenTrial]:
        study = self.stage.study(arm)
        return study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)) if study else []

    def _is_abandoned(self, arm: Arm, trial: FrozenTrial) -> bool:
        if (arm.name, trial.number) in self.mine:
            return False
        owner = trial.user_attrs.get(WORKER_ATTRIBUTE)
        return owner == self.worker.id or self.colleagues.is_gone(owner)

    def _check_mine(self, opened: OpenTrial) -> FrozenTrial:
        self.worker.check()
        known = frozen(opened.trial)
        owner = known.user_attrs.get(WORKER_ATTRIBUTE)
        if owner != self.worker.id:
            raise WorkerLost(
                f"a trial must be run by the worker that owns it, but trial {opened.trial.number} of arm "
                f"`{opened.arm.name}` was taken over by {owner}. To join again type "
                f"`lorasweep worker {self.sweep.path}`."
            )
        return known

    def _tell(
        self, opened: OpenTrial, state: OptunaState, attributes: Mapping[str, Any], *, value: float | None = None
    ) -> None:
        def tell() -> None:
            if self._check_mine(opened).state.is_finished():  # it was told, but the answer was lost
                return
            for name, attribute in attributes.items():
                opened.trial.set_user_attr(name, attribute)
            self.sweep.storage.check_exclusive()
            with suppress(UpdateFinishedTrialError):
                if state == OptunaState.COMPLETE:
                    opened.trial.study.tell(opened.trial, value)
                else:
                    opened.trial.study.tell(opened.trial, state=state)

        with self.telemetry.phase("storage"):
            self.sweep.storage.exclusively(tell)
        self.mine.discard((opened.arm.name, opened.trial.number))

    def _open(self, arm: Arm, trial: Trial) -> OpenTrial:
        config, params = self.stage.config(arm, trial), self.stage.params(arm, trial)
        place = self.stage.place(arm, trial.number)
        self.worker.note_runs(began=place.folder.name)
        self.observer.trial_started(arm, trial.number, params, steps=config.trainer.max_steps)
        self.sweep.save()
        return OpenTrial(arm=arm, trial=trial, params=params, config=config, place=place)

    def _ended(self, opened: OpenTrial, state: str, value: float | None, *, wall_s: float) -> None:
        self.worker.note_runs(ended=opened.place.folder.name)
        with self.telemetry.phase("storage"):
            self.sweep.save()
        self.observer.trial_ended(opened.arm, opened.trial.number, state, value, wall_s=wall_s)


def _ended_run(folder: Path) -> RunRecord | None:
    """The record of a run that ended well but was not told, because the process was killed in between; else None."""
    try:
        record = read_run(folder)
    except RecordError:
        return None
    return record if record.status in ("complete", "pruned") else None

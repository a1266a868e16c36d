"""The controller: the only owner of a sweep's studies. It hands out trials, decides at rungs and takes results.

A worker calls `take`, `report` and `tell`. What they return follows from the sweep's seed and from what was reported
before, never from a clock, from the order of slots or from how often the process was killed in between.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from lorasweep.config.run import RunConfig
from lorasweep.disk import remove_leftovers
from lorasweep.errors import Diverged, OutOfMemory, RunError, WorkerError
from lorasweep.record import ConfirmRow, RunRecord, TrialRow
from lorasweep.redaction import redact
from lorasweep.sweep.controller.arm_trials import ArmTrials, Entry
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.importance import measure_importance
from lorasweep.sweep.controller.rows import REASON_ATTRIBUTE, SCORE_ATTRIBUTE, confirm_row, trial_row
from lorasweep.sweep.controller.stages import Confirm, Search, Stage
from lorasweep.sweep.definition import Arm
from lorasweep.training import RunPlace, end_paused_run, remove_checkpoints

Status = Literal["running", "complete", "interrupted"]
RunEnded = Callable[[RunRecord, Path, Mapping[str, Any]], None]
"""Called with the record, the folder and the swept values of each run that ended well."""


class Observer(Protocol):
    """Who is told what happens in a sweep; the live table is one."""

    def stage_started(self, stage: str, asked: Mapping[str, int]) -> None:
        """A stage begins or is resumed; each arm has so many trials in it, those that have ended included."""

    def trial_started(self, arm: Arm, number: int, params: Mapping[str, Any], *, steps: int) -> None:
        """A trial begins or goes on; its run has so many optimizer steps."""

    def evaluated(self, arm: Arm, number: int, step: int, value: float) -> None:
        """A running trial was evaluated."""

    def trial_paused(self, arm: Arm, number: int) -> None:
        """A trial is paused."""

    def trial_ended(self, arm: Arm, number: int, state: str, value: float | None, *, wall_s: float) -> None:
        """A trial ended as `complete`, `pruned`, `failed` or `infeasible` after so many seconds of training."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """A trial that the worker is to train."""

    arm: Arm
    number: int
    params: Mapping[str, Any]
    """Swept keys and values, as a person reads them."""
    config: RunConfig
    place: RunPlace


class Controller:
    """The trials of an open sweep, stage by stage."""

    def __init__(self, sweep: SweepFolder, *, observer: Observer, run_ended: RunEnded) -> None:
        """Reads what the sweep's journal holds, and begins or resumes the search.

        Args:
            sweep: The open sweep.
            observer: Is told what happens.
            run_ended: Called with each run that is complete, or pruned at the end of the search.
        """
        self.sweep = sweep
        self.observer = observer
        self.run_ended = run_ended
        self.search = Search(sweep)
        self.stage: Stage = self.search
        self._confirm: Confirm | None = None
        self._failures_in_a_row = 0
        self._warn_of_foreign_trials()
        self._start(self.search)

    def begin_confirm(self) -> Confirm:
        """Ends the search, whose paused trials become pruned, and returns the confirm stage before it begins."""
        for trials in self.search.trials.values():
            for entry in trials.paused():
                self._prune(trials, entry)
        return Confirm(self.sweep, self.search)

    def start_confirm(self, stage: Confirm) -> None:
        """Begins the confirm stage, or resumes it."""
        stage.begin()
        self._confirm = stage
        self._start(stage)

    def take(self, arms: Collection[Arm] | None = None) -> Assignment | None:
        """Hands out the next trial, or None where none can be trained now.

        First come trials that were handed out to a process that was killed, in the order in which they were handed out.
        Then the arms take turns: the one whose trials have begun to the smallest share is next, arms without a space
        before all others. In an arm a paused trial that now belongs to the better part goes before a new one.

        Args:
            arms: Only trials of these arms; None stands for all.
        """
        candidates = [t for t in self.stage.trials.values() if arms is None or t.arm in arms]
        abandoned = [(entry.order, trials, entry) for trials in candidates for entry in trials.abandoned()]
        if abandoned:
            _, trials, entry = min(abandoned, key=lambda found: found[0])
            trials.take_back(entry)
            return self._assign(trials, entry)
        for trials in sorted(candidates, key=lambda trials: (bool(trials.arm.space), trials.progress)):
            if (entry_or_none := self._next_of(trials)) is not None:
                return self._assign(trials, entry_or_none)
        return None

    def take_back(self, folder_name: str) -> Assignment | None:
        """Hands out again the trial whose run has this folder; None where there is no such trial in this stage."""
        for trials in self.stage.trials.values():
            for entry in trials.entries.values():
                if self.stage.place(trials.arm, entry.number).folder.name == folder_name:
                    if entry.state in ("running", "paused"):
                        trials.take_back(entry)
                    return self._assign(trials, entry)
        return None

    def release(self, assignments: Sequence[Assignment]) -> None:
        """Takes back trials whose pack broke up; they are handed out again before any other."""
        for assignment in assignments:
            self._entry(assignment).is_held = False

    def awaits_pause(self, assignment: Assignment, *, step: int) -> bool:
        """Whether a trial was last reported at this step and was not let beyond it."""
        entry = self._entry(assignment)
        return max(entry.values, default=None) == step and step not in entry.passed

    def report(
        self,
        evaluations: Sequence[tuple[Assignment, int, float]],
        *,
        losses: Mapping[Assignment, float] = MappingProxyType({}),
    ) -> list[bool]:
        """Takes the evaluations of one moment and returns for each trial whether it goes on.

        All values are stored before anything is decided, and the trials are looked at in the order of rungs and
        numbers, so that the order in which they are given changes nothing.

        Args:
            evaluations: Trial, optimizer step and value of the metric.
            losses: The validation loss of each trial, by which rungs compare under `pruner.criterion=loss`.
        """
        loss_of = {(a.arm.name, a.number): loss for a, loss in losses.items()}
        reported = [(self._trials(a), self._entry(a), step, value) for a, step, value in evaluations]
        in_order = sorted(reported, key=lambda found: (found[0].arm.name, found[2], found[1].number))
        for trials, entry, step, value in in_order:
            trials.store(entry, step, value, loss=loss_of.get((trials.arm.name, entry.number)))
            self.observer.evaluated(trials.arm, entry.number, step, value)
        decisions = {(trials.arm.name, entry.number): trials.decide(entry, step) for trials, entry, step, _ in in_order}
        self._save_if_due()  # status shows what runs, and a trial mostly begins just after a save, when none is due
        return [decisions[trials.arm.name, entry.number] for trials, entry, _, _ in reported]

    def tell(self, assignment: Assignment, record: RunRecord) -> None:
        """Takes the record of a run that is complete or paused; one that is interrupted stays the worker's."""
        trials, entry = self._trials(assignment), self._entry(assignment)
        value = record.test[record.metric] if self.stage.reads_test else record.score
        if record.status == "paused":
            trials.pause(entry, {SCORE_ATTRIBUTE: value}, step=record.steps_done)
            self._save_if_due()
            self.observer.trial_paused(assignment.arm, assignment.number)
            return
        self._failures_in_a_row = 0
        # before the end is told: a process that is killed in between repeats both, and neither is lost
        self.run_ended(record, assignment.place.folder, assignment.params)
        is_news = trials.end(entry, "complete", {SCORE_ATTRIBUTE: value}, value=value)
        if is_news:  # else a killed pack did again what it had done
            self._ended(assignment, "complete", value, wall_s=record.wall_s)

    def tell_failure(self, assignment: Assignment, error: Exception) -> None:
        """Takes the error of a run that failed, or that does not fit in memory (infeasible).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed, or nothing can be written any more.
        """
        self.sweep.check_disk(error)
        state: Literal["infeasible", "failed"] = "infeasible" if isinstance(error, OutOfMemory) else "failed"
        reason = str(error) if isinstance(error, RunError) else traceback.format_exception_only(error)[-1].strip()
        trials, entry = self._trials(assignment), self._entry(assignment)
        if trials.end(entry, state, {REASON_ATTRIBUTE: redact(reason)}, value=None):
            self._ended(assignment, state, None, wall_s=0.0)
        if self.stage.reads_test and isinstance(error, Diverged):
            return  # that a winner diverges on other seeds is a result
        self._failures_in_a_row += 1
        limit = assignment.arm.driver.sweep.max_failures
        if self._failures_in_a_row >= limit:
            self.save("interrupted")
            raise WorkerError(
                f"fewer than {limit} trials in a row may fail (`sweep.max_failures`), "
                f"but the last one failed too: {reason} "
                f"Their records in {str(self.sweep.path / 'runs')!r} have the tracebacks."
            ) from error

    def is_complete(self) -> bool:
        """Whether every arm has all its trials in this stage, none is running, and none that is paused may go on."""
        return all(
            not trials.left
            and all(entry.state != "running" for entry in trials.entries.values())
            and trials.next_promoted() is None
            for trials in self.stage.trials.values()
        )

    def clean_run_folders(self) -> None:
        """Removes what killed processes left in the runs' folders: checkpoints of ended runs, half-written files."""
        stages: list[Stage] = [self.search, *([self._confirm] if self._confirm is not None else [])]
        for stage in stages:
            for trials in stage.trials.values():
                for number in trials.entries:
                    folder = stage.place(trials.arm, number).folder
                    remove_checkpoints(folder)
                    remove_leftovers(folder)

    def save(self, status: Status | None = None) -> None:
        """Writes the sweep's record."""
        if status == "complete":
            for row in self.sweep.record.arms:
                row.importance = measure_importance(self.search.trials[row.name].frozen())
        self.sweep.save(trials=self._trial_rows(), confirm=self._confirm_rows(), status=status)

    def _start(self, stage: Stage) -> None:
        self.stage = stage
        orders = [entry.order for trials in stage.trials.values() for entry in trials.entries.values()]
        self._order = max(orders, default=-1)
        self.observer.stage_started(stage.name, {name: trials.planned for name, trials in stage.trials.items()})

    def _next_of(self, trials: ArmTrials) -> Entry | None:
        if (promoted := trials.next_promoted()) is not None:
            entry, rung = promoted
            trials.promote(entry, rung, order=self._next_order())
            return entry
        if not trials.may_begin():
            return None
        params, attributes = self.stage.propose(trials)
        return trials.begin(params, order=self._next_order(), attributes=attributes)

    def _next_order(self) -> int:
        self._order += 1
        return self._order

    def _assign(self, trials: ArmTrials, entry: Entry) -> Assignment:
        arm = trials.arm
        config = self.stage.config(arm, entry.params)
        assignment = Assignment(
            arm=arm,
            number=entry.number,
            params=self.stage.shown_params(arm, entry.params),
            config=config,
            place=self.stage.place(arm, entry.number),
        )
        self.observer.trial_started(arm, entry.number, assignment.params, steps=config.trainer.max_steps)
        self._save_if_due()
        return assignment

    def _prune(self, trials: ArmTrials, entry: Entry) -> None:
        step = max(entry.values)
        reason = f"stopped at step {step}, because it did not belong to the better part there"
        folder = self.search.place(trials.arm, entry.number).folder
        record = end_paused_run(folder, reason=reason)
        self.run_ended(record, folder, entry.params)
        trials.end(entry, "pruned", {REASON_ATTRIBUTE: reason}, value=None)
        self.observer.trial_ended(trials.arm, entry.number, "pruned", record.score, wall_s=record.wall_s)

    def _ended(self, assignment: Assignment, state: str, value: float | None, *, wall_s: float) -> None:
        self._save_if_due()
        self.observer.trial_ended(assignment.arm, assignment.number, state, value, wall_s=wall_s)

    def _save_if_due(self) -> None:
        if self.sweep.is_due():
            self.save()

    def _trial_rows(self) -> list[TrialRow]:
        return [
            trial_row(name, trial, is_paused=trials.entries[trial.number].state == "paused")
            for name, trials in self.search.trials.items()
            for trial in trials.frozen()
        ]

    def _confirm_rows(self) -> list[ConfirmRow]:
        if self._confirm is None:
            return self.sweep.record.confirm
        return [
            confirm_row(name, trial, winner=self._confirm.winners[name].number)
            for name, trials in self._confirm.trials.items()
            for trial in trials.frozen()
        ]

    def _trials(self, assignment: Assignment) -> ArmTrials:
        return self.stage.trials[assignment.arm.name]

    def _entry(self, assignment: Assignment) -> Entry:
        return self._trials(assignment).entries[assignment.number]

    def _warn_of_foreign_trials(self) -> None:
        for name, trials in self.search.trials.items():
            if trials.foreign:
                self.sweep.warn(
                    f"The study of arm `{name}` has {trials.foreign} trials that this sweep did not propose; they are "
                    "left out and other trials take their places."
                )

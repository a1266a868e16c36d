"""The controller: the only owner of a sweep's studies. It hands out trials, decides at rungs and takes results.

A worker calls `take`, `report` and `tell`. What they return follows from the sweep's seed and from what was reported
before, never from a clock, from the order of slots or from how often the process was killed in between.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from lorasweep.config.run import RunConfig
from lorasweep.disk import remove_leftovers
from lorasweep.errors import Diverged, OutOfMemory, RunError, WorkerError
from lorasweep.record import ConfirmRow, RunRecord, TrialRow
from lorasweep.redaction import redact
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.entry import Entry
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.importance import measure_importance
from lorasweep.sweep.controller.rows import REASON_ATTRIBUTE, SCORE_ATTRIBUTE, confirm_row, trial_row
from lorasweep.sweep.controller.stages import Confirm, Search, Stage
from lorasweep.sweep.controller.storage import database_must_answer, flush_storage
from lorasweep.sweep.definition.arms import Arm
from lorasweep.training.checkpoint import remove_checkpoints
from lorasweep.training.run_log import RunPlace, end_paused_run
from lorasweep.training.telemetry import add_telemetry

P = ParamSpec("P")
T = TypeVar("T")

MAX_DEATHS_IN_A_ROW = 10
"""Workers that may die in a row without any evaluation in between. After more the trials themselves are to blame."""
Status = Literal["running", "complete", "interrupted"]
RunEnded = Callable[[RunRecord, Path, Mapping[str, Any]], None]
"""Called with the record, the folder and the swept values of each run that ended well."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """A trial that the worker is to train."""

    arm: Arm
    number: int
    params: Mapping[str, Any]
    """Swept keys and values, as a person reads them."""
    config: RunConfig
    place: RunPlace
    stage: str
    """`search` or `confirm`."""
    reads_test: bool
    """Whether a complete run has still to be scored on test data."""
    worker: str
    """Name of the worker that the trial was handed out to."""


def _writes(method: Callable[Concatenate[Controller, P], T]) -> Callable[Concatenate[Controller, P], T]:
    """Flushes what a call wrote before it is answered: once a call, because a disk takes milliseconds for each time.

    What says that the journal, the database or the disk is gone is raised as `WorkerError`: no trial is to blame.
    """

    @functools.wraps(method)
    def call(self: Controller, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with database_must_answer(self.sweep.path):
                answer = method(self, *args, **kwargs)
                flush_storage(self.sweep.storage)
                return answer
        except OSError as error:
            self.sweep.check_disk(error)
            raise

    return call  # type: ignore[return-value]


class Controller:
    """The trials of an open sweep, stage by stage.

    The one worker of the same process calls it. As a Ray actor it is called by several workers, one call after the
    other. A call whose answer was lost, because the actor was restarted, may be made again: it is answered alike.
    """

    def __init__(self, sweep: SweepFolder, *, run_ended: RunEnded, session: str | None = None) -> None:
        """Reads what the sweep's journal holds, and resumes the stage that it has come to.

        Args:
            sweep: The open sweep.
            run_ended: Called with each run that is complete, or pruned at the end of the search.
            session: What the names of the workers begin with that may train trials now; None where there are none yet.
        """
        self.sweep = sweep
        self.run_ended = run_ended
        self.session = session
        self.search = Search(sweep, session=session)
        self.stage: Stage = self.search
        self._confirm: Confirm | None = None
        self._failures_in_a_row = 0
        self._deaths_in_a_row = 0
        self._is_over = False
        self._usage: dict[str, dict[str, float]] = {}
        sweep.measure = lambda: functools.reduce(add_telemetry, self._usage.values(), {})
        self._warn_of_foreign_trials()
        self._start(self.search)
        self._advance()

    @_writes
    def take(self, arms: Collection[str] | None = None, *, worker: str = "", request: int = 0) -> Assignment | None:
        """Hands out the next trial, or None where none can be trained now.

        First come trials that were handed out to a worker that is gone, in the order in which they were handed out.
        Then the arms take turns: the one whose trials have begun to the smallest share is next, arms without a space
        before all others. In an arm a paused trial that now belongs to the better part goes before a new one. Once all
        trials of the search have ended, those of the confirm stage follow.

        Args:
            arms: Only trials of these arms; None stands for all.
            worker: Who asks; empty for the worker of this process.
            request: A number that the worker uses once. Asked again with it, the worker gets the same trial.
        """
        if (answered := self._answered(worker, request)) is not None:
            return answered
        if arms is None:
            self._advance()
        candidates = [t for name, t in self.stage.trials.items() if arms is None or name in arms]
        abandoned = [(entry.order, trials, entry) for trials in candidates for entry in trials.abandoned()]
        if abandoned:
            _, trials, entry = min(abandoned, key=lambda found: found[0])
            trials.take_back(entry, worker=worker, request=request)
            return self._assign(trials, entry)
        for trials in sorted(candidates, key=lambda trials: (bool(trials.arm.space), trials.progress)):
            if (entry_or_none := self._next_of(trials, worker=worker, request=request)) is not None:
                return self._assign(trials, entry_or_none)
        return None

    def is_over(self) -> bool:
        """Whether every trial of every stage has ended."""
        return self._is_over

    def note(self, sentences: Sequence[str]) -> None:
        """Keeps sentences on the data in the record, each once."""
        self.sweep.note(sentences)

    def warn(self, sentence: str) -> None:
        """Keeps a sentence in the record, once."""
        self.sweep.warn(sentence)

    def note_worker(self, *, device: str, threads: int) -> None:
        """Keeps what a worker trains on."""
        self.sweep.record.device, self.sweep.record.threads = device, threads

    def note_usage(self, worker: str, usage: Mapping[str, float]) -> None:
        """Keeps what a worker's time and memory have gone to so far."""
        self._usage[worker] = dict(usage)

    @_writes
    def take_back(self, folder_name: str) -> Assignment | None:
        """Hands out again the trial whose run has this folder; None where there is no such trial in this stage."""
        for trials in self.stage.trials.values():
            for entry in trials.entries.values():
                if self.stage.place(trials.arm, entry.number).folder.name == folder_name:
                    if entry.state in ("running", "paused"):
                        trials.take_back(entry)
                    return self._assign(trials, entry)
        return None

    @_writes
    def release(self, assignments: Sequence[Assignment]) -> None:
        """Takes back trials whose pack broke up; they are handed out again before any other."""
        for assignment in assignments:
            self._trials(assignment).release(self._entry(assignment))

    @_writes
    def release_worker(self, worker: str) -> None:
        """Takes back the trials of a worker that is gone; they are handed out again before any other.

        Raises:
            WorkerError: So many workers died one after the other, without an evaluation in between, that the sweep
                would never end.
        """
        for trials in self.stage.trials.values():
            for entry in trials.held_by(worker):
                trials.release(entry)
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
            raise WorkerError(
                f"a worker must live until its first evaluation, but {MAX_DEATHS_IN_A_ROW} workers in a row died "
                "before that. Check whether the system killed them because memory ran out."
            )

    def awaits_pause(self, assignment: Assignment, *, step: int) -> bool:
        """Whether a trial was last reported at this step and was not let beyond it."""
        entry = self._entry(assignment)
        return max(entry.values, default=None) == step and step not in entry.passed

    @_writes
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
        self._deaths_in_a_row = 0
        if gone := [a for a, _, _ in evaluations if not self._holds(a)]:
            raise WorkerError(
                f"a worker must hold the trial that it reports, but trial {gone[0].number} of arm `{gone[0].arm.name}` "
                "was given to another one."
            )
        loss_of = {(a.arm.name, a.number): loss for a, loss in losses.items()}
        reported = [(self._trials(a), self._entry(a), step, value) for a, step, value in evaluations]
        in_order = sorted(reported, key=lambda found: (found[0].arm.name, found[2], found[1].number))
        for trials, entry, step, value in in_order:
            trials.store(entry, step, value, loss=loss_of.get((trials.arm.name, entry.number)))
        decisions = {(trials.arm.name, entry.number): trials.decide(entry, step) for trials, entry, step, _ in in_order}
        self._save_if_due()  # status shows what runs, and a trial mostly begins just after a save, when none is due
        return [decisions[trials.arm.name, entry.number] for trials, entry, _, _ in reported]

    @_writes
    def tell(self, assignment: Assignment, record: RunRecord) -> None:
        """Takes the record of a run that is complete or paused; one that is interrupted stays the worker's."""
        if not self._holds(assignment):  # told before, and the answer was lost
            return
        trials, entry = self._trials(assignment), self._entry(assignment)
        value = record.test[record.metric] if assignment.reads_test else record.score
        if record.status == "paused":
            trials.pause(entry, {SCORE_ATTRIBUTE: value}, step=record.steps_done)
            self._save_if_due()
            return
        self._failures_in_a_row = 0
        # before the end is told: a process that is killed in between repeats both, and neither is lost
        self.run_ended(record, assignment.place.folder, assignment.params)
        trials.end(entry, "complete", {SCORE_ATTRIBUTE: value}, value=value)
        self._save_if_due()

    @_writes
    def tell_failure(self, assignment: Assignment, error: Exception) -> None:
        """Takes the error of a run that failed, or that does not fit in memory (infeasible).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed, or nothing can be written any more.
        """
        self.sweep.check_disk(error)
        if not self._holds(assignment):
            return
        state: Literal["infeasible", "failed"] = "infeasible" if isinstance(error, OutOfMemory) else "failed"
        reason = str(error) if isinstance(error, RunError) else traceback.format_exception_only(error)[-1].strip()
        trials, entry = self._trials(assignment), self._entry(assignment)
        trials.end(entry, state, {REASON_ATTRIBUTE: redact(reason)}, value=None)
        self._save_if_due()
        if assignment.reads_test and isinstance(error, Diverged):
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

    @_writes
    def finish(self) -> bool:
        """Closes the session: writes the record as complete or interrupted, and returns whether it is complete."""
        if self._is_over:
            self._clean_run_folders()
        self.save("complete" if self._is_over else "interrupted")
        return self._is_over

    def _clean_run_folders(self) -> None:
        """Removes what killed processes left in the runs' folders: checkpoints of ended runs, half-written files."""
        stages: list[Stage] = [self.search, *([self._confirm] if self._confirm is not None else [])]
        for stage in stages:
            for trials in stage.trials.values():
                for number in trials.entries:
                    folder = stage.place(trials.arm, number).folder
                    remove_checkpoints(folder)
                    remove_leftovers(folder)

    @_writes
    def save(self, status: Status | None = None) -> None:
        """Writes the sweep's record."""
        if status == "complete":
            for row in self.sweep.record.arms:
                row.importance = measure_importance(self.search.trials[row.name].frozen())
        self.sweep.save(trials=self._trial_rows(), confirm=self._confirm_rows(), status=status)

    def _advance(self) -> None:
        """Begins the next stage if the present one is complete: every trial has ended, and no paused one may go on."""
        while not self._is_over and self._is_complete():
            if self.stage is self._confirm:
                self._is_over = True
                return
            for trials in self.search.trials.values():
                for entry in trials.paused():
                    self._prune(trials, entry)
            if not self.sweep.record.confirm_seeds:
                self._is_over = True
                return
            self._confirm = Confirm(self.sweep, self.search, session=self.session)
            self._start(self._confirm)

    def _is_complete(self) -> bool:
        return all(
            not trials.left and not trials.is_any("running") and trials.next_promoted() is None
            for trials in self.stage.trials.values()
        )

    def _start(self, stage: Stage) -> None:
        self.stage = stage
        orders = [entry.order for trials in stage.trials.values() for entry in trials.entries.values()]
        self._order = max(orders, default=-1)

    def _answered(self, worker: str, request: int) -> Assignment | None:
        """Returns the trial that was handed out to this request before, where the worker still holds it."""
        if not worker:
            return None
        for trials in self.stage.trials.values():
            for entry in trials.held_by(worker):
                if entry.request == request:
                    return self._assign(trials, entry)
        return None

    def _holds(self, assignment: Assignment) -> bool:
        """Whether the worker of an assignment still holds its trial; the worker of this process always does."""
        if not assignment.worker:
            return True
        if assignment.stage != self.stage.name:
            return False
        entry = self._entry(assignment)
        return entry.is_held and entry.worker == assignment.worker

    def _next_of(self, trials: ArmTrials, *, worker: str, request: int) -> Entry | None:
        if (promoted := trials.next_promoted()) is not None:
            entry, rung = promoted
            trials.promote(entry, rung, order=self._next_order(), worker=worker, request=request)
            return entry
        if not trials.may_begin():
            return None
        params, attributes = self.stage.propose(trials)
        order = self._next_order()
        return trials.begin(params, order=order, attributes=attributes, worker=worker, request=request)

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
            stage=self.stage.name,
            reads_test=self.stage.reads_test,
            worker=entry.worker,
        )
        self._save_if_due()
        return assignment

    def _prune(self, trials: ArmTrials, entry: Entry) -> None:
        step = max(entry.values)
        reason = f"stopped at step {step}, because it did not belong to the better part there"
        folder = self.search.place(trials.arm, entry.number).folder
        record = end_paused_run(folder, reason=reason)
        self.run_ended(record, folder, entry.params)
        trials.end(entry, "pruned", {REASON_ATTRIBUTE: reason}, value=None)

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

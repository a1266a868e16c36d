"""The controller: the only owner of a sweep's studies. It hands out trials and takes results.

A worker calls `take`, `report` and `tell`. The answers follow from the sweep's seed and from earlier reports. They
never depend on a clock, on the order of slots, or on how often the process was killed.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal

from lorasweep.config.redaction import redact
from lorasweep.config.run import SEED_KEYS
from lorasweep.disk import remove_leftovers
from lorasweep.errors import Diverged, OutOfMemory, RunError, WorkerError
from lorasweep.record import RunRecord, SweepState, Trial, TrialState
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.folder import RUNS_FOLDER, SweepFolder, check_disk
from lorasweep.sweep.controller.stages import Confirmation, OpenStage, Search, choose_settings
from lorasweep.sweep.controller.stopping import explain_stop
from lorasweep.sweep.definition.arms import Arm
from lorasweep.training.checkpoint import remove_checkpoints, split_pack
from lorasweep.training.open_run import RunFolder, RunRequest

MAX_DEATHS_IN_A_ROW = 10
"""The sweep ends with an error after this number of workers died in a row without an evaluation in between."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment(RunRequest):
    """A trial that a worker is to train."""

    arm: Arm
    trial: Trial
    """A copy of the trial, as it was when the worker received it."""

    @property
    def reads_test(self) -> bool:
        """Whether the run is scored on test data when it is complete."""
        return self.trial.stage == "confirm"


class Controller:
    """The trials of an open sweep, stage by stage.

    As a Ray actor it serves several workers, one call at a time.
    """

    def __init__(self, sweep: SweepFolder) -> None:
        """Reads the journal, and resumes the current stage."""
        self.sweep = sweep
        self.search = Search(sweep)
        self.confirm: Confirmation | None = None
        self._is_over = False
        self._failures_in_a_row = 0
        self._deaths_in_a_row = 0
        self._advance_stage()

    @property
    def stage(self) -> OpenStage:
        """The stage whose trials are handed out now."""
        return self.confirm or self.search

    def take(self, arms: Collection[str] | None = None, *, worker: str = "") -> Assignment | None:
        """Hands out the next trial, of all arms or of `arms`, or None if no trial can be trained now.

        `worker` is empty for the worker of this process.
        """
        if arms is None:
            self._advance_stage()
        candidates = [trials for name, trials in self.stage.arms.items() if arms is None or name in arms]
        # First the trials of workers that are gone, in the order in which they were handed out.
        running = [(trials, trial) for trials in candidates for trial in trials.list_running()]
        abandoned = [(trials, trial) for trials, trial in running if trial.number not in trials.held]
        if abandoned:
            trials, trial = min(abandoned, key=lambda pair: pair[1].order)
            trials.held[trial.number] = worker
            return self._assign(trials, trial)
        # Then arms without a space, then the arm that has begun the smallest fraction of its trials; of equal arms, the
        # first of the sweep file.
        for trials in sorted(candidates, key=lambda one: (bool(one.arm.space), len(one.trials) / max(one.planned, 1))):
            if trials.may_begin() and not (self.confirm is None and self.search.awaits_base(trials.arm)):
                params, state = self.stage.propose(trials)
                orders = [other.order for others in self.stage.arms.values() for other in others.trials.values()]
                order = 1 + max(orders, default=-1)
                return self._assign(trials, trials.begin(params, worker=worker, order=order, sampler_state=state))
        return None

    def report(self, evaluations: Sequence[tuple[Assignment, int, Mapping[str, float]]]) -> list[str | None]:
        """Takes evaluations (trial, optimizer step, every metric). Returns for each trial why it must stop, or None."""
        self._deaths_in_a_row = 0
        metric = self.sweep.record.search_metric
        reasons = []
        for assignment, step, scores in evaluations:
            trials, trial = self._find(assignment)
            trials.store(trial, step, scores[metric.name])
            untrained = self.search.find_untrained_scores(trials.arm) if self.confirm is None else {}
            reasons.append(explain_stop(assignment.config, step, scores, untrained=untrained, metric=metric))
        self._save_if_due()  # a trial often begins just after a save, so its first report is the next chance to save
        return reasons

    def tell(self, assignment: Assignment, record: RunRecord) -> None:
        """Takes the record of a run that is complete or was stopped."""
        trials, trial = self._find(assignment)
        state: TrialState = "stopped" if record.status == "stopped" else "complete"
        test_scores = record.test if assignment.reads_test else {}
        self._failures_in_a_row = 0
        trials.end(trial, state, search_score=record.score, test_scores=test_scores, reason=record.reason)
        self._save_if_due()

    def tell_failure(self, assignment: Assignment, error: Exception) -> None:
        """Ends a trial whose run raised an error: as infeasible if the run does not fit in memory, else as failed.

        Raises WorkerError if `sweep.max_failures` trials in a row failed, or the system refused a file.
        """
        check_disk(self.sweep.path, error)
        state: Literal["infeasible", "failed"] = "infeasible" if isinstance(error, OutOfMemory) else "failed"
        reason = str(error) if isinstance(error, RunError) else traceback.format_exception_only(error)[-1].strip()
        trials, trial = self._find(assignment)
        trials.end(trial, state, reason=redact(reason))
        self._save_if_due()
        if self.confirm is not None and isinstance(error, Diverged):
            return  # divergence of a good trial on another seed is a result, not a fault of the sweep
        self._failures_in_a_row += 1
        limit = assignment.arm.sweep_config.sweep.max_failures
        if self._failures_in_a_row >= limit:
            self.save("interrupted")
            raise WorkerError(
                f"fewer than {limit} trials in a row may fail (`sweep.max_failures`), but {limit} failed. "
                f"The last error: {reason.rstrip('.')}. The tracebacks are in the records in "
                f"{str(self.sweep.path / 'runs')!r}."
            ) from error

    def take_by_folder(self, folder_name: str) -> Assignment | None:
        """Returns the trial whose run is in this folder, handed out again; None if this stage has no such trial."""
        for trials in self.stage.arms.values():
            for trial in trials.trials.values():
                if trial.run == f"{RUNS_FOLDER}/{folder_name}":
                    if trial.state == "running":
                        trials.held[trial.number] = ""
                    return self._assign(trials, trial)
        return None

    def release(self, assignments: Sequence[Assignment]) -> None:
        """Releases the trials of a pack that broke up. They are handed out again before any other trial."""
        for assignment in assignments:
            trials, trial = self._find(assignment)
            trials.held.pop(trial.number, None)

    def release_worker(self, worker: str) -> None:
        """Releases the trials of a worker that died. They are handed out again before any other trial.

        Raises WorkerError if `MAX_DEATHS_IN_A_ROW` workers died in a row.
        """
        for trials in self.stage.arms.values():
            trials.held = {number: holder for number, holder in trials.held.items() if holder != worker}
        split_pack(self.sweep.path / f"pack-{worker}.ckpt", runs=self.sweep.path / RUNS_FOLDER)
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
            raise WorkerError(
                f"a worker must run until its first evaluation, but {MAX_DEATHS_IN_A_ROW} workers in a row died "
                "earlier. Check whether the system killed them because memory ran out."
            )

    def is_over(self) -> bool:
        return self._is_over

    def note(self, sentences: Sequence[str]) -> None:
        self.sweep.note(sentences)

    def warn(self, sentence: str) -> None:
        self.sweep.warn(sentence)
        self.save()  # because the next call of a worker, which may save too, can be minutes away

    def note_worker(self, *, device: str, threads: int) -> None:
        self.sweep.record.device, self.sweep.record.threads = device, threads

    def finish(self) -> bool:
        """Writes the record as complete or interrupted, and returns whether the sweep is complete."""
        if self._is_over:
            for folder in (self.sweep.path / RUNS_FOLDER).iterdir():
                remove_checkpoints(folder)  # killed processes may have left checkpoints and half-written files
                remove_leftovers(folder)
        self.save("complete" if self._is_over else "interrupted")
        return self._is_over

    def save(self, status: SweepState | None = None) -> None:
        record = self.sweep.record
        record.trials = [trial for trials in self.search.arms.values() for trial in trials.trials.values()]
        if self.confirm is not None:
            record.confirm = [trial for trials in self.confirm.arms.values() for trial in trials.trials.values()]
        self.sweep.save(status=status)

    def _advance_stage(self) -> None:
        """Begins the next stage if every trial of this stage has ended."""
        while not self._is_over and all(trials.is_over for trials in self.stage.arms.values()):
            looks = self.sweep.record.looks
            if looks and self.confirm is None and not self.search.has_learned():
                self.sweep.record.looks, self.sweep.record.confirm_seeds = [], []
                self.sweep.warn("No trial is better than an answer without training, so nothing was confirmed.")
            elif looks and self.confirm is None:
                settings = choose_settings(self.search, sweep=self.sweep)
                self.sweep.record.settings = settings
                self.confirm = Confirmation(self.sweep, settings, looks=looks)
            elif self.confirm is None or not self.confirm.has_next_look or not self.confirm.begin_next_look():
                self._is_over = True

    def _assign(self, trials: ArmTrials, trial: Trial) -> Assignment:
        number: int | None = trial.number
        params = trial.params
        if self.confirm is not None:  # every source of randomness is set by the seed
            number, params = self.confirm.find_tried(trial), {**params, **dict.fromkeys(SEED_KEYS, trial.seed)}
        assignment = Assignment(
            arm=trials.arm,
            trial=copy(trial),
            config=trials.arm.compose(params),
            run_folder=RunFolder(path=self.sweep.path / trial.run, arm=trial.arm, trial=number),
        )
        self._save_if_due()
        return assignment

    def _find(self, assignment: Assignment) -> tuple[ArmTrials, Trial]:
        trials = self.stage.arms[assignment.arm.name]
        return trials, trials.trials[assignment.trial.number]

    def _save_if_due(self) -> None:
        if self.sweep.is_save_due():
            self.save()

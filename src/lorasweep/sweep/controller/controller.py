"""The controller: the only owner of a sweep's studies. It hands out packs of trials and takes results.

A worker calls `take`, `report` and `tell`. The answers follow from the sweep's seed, numbers (of trials, slots and
workers) and earlier reports. They never depend on a clock, on which worker came first, or on how often the process was
killed.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Literal

from lorasweep.config.redaction import redact
from lorasweep.config.run import SEED_KEYS
from lorasweep.disk import remove_leftovers
from lorasweep.errors import Diverged, OutOfMemory, RunError, WorkerError
from lorasweep.record import RunRecord, SweepState, Trial, TrialState
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.folder import PACKS_FOLDER, RUNS_FOLDER, SweepFolder, check_disk, find_checkpoint
from lorasweep.sweep.controller.stages import Confirmation, OpenStage, Search, choose_settings
from lorasweep.sweep.controller.stopping import explain_stop
from lorasweep.sweep.cost import count_workers
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.packing import choose_pack_sizes, group_arms
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

    def __init__(self, sweep: SweepFolder, *, num_workers: int | None = None) -> None:
        """Reads the journal, and resumes the current stage.

        Packs are planned for `num_workers`; None means as many as the definition says.
        """
        self.sweep = sweep
        self._num_workers = sweep.record.workers = num_workers or count_workers(sweep.definition)
        self._groups = group_arms(sweep.definition)
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

    def take(self, *, slots: Mapping[str, int], worker: str = "") -> list[Assignment]:
        """Hands out the trials of the next pack, or none if no trial can train now.

        Args:
            slots: The maximum number of trials that train together, by arm.
            worker: The name of the worker that trains the pack; empty for the worker of this process.
        """
        self._advance_stage()
        plan = list(self._plan_packs(slots))
        if self.confirm is not None:  # all runs are known: large packs first, so that workers end together
            plan.sort(key=len, reverse=True)
        # First the packs of workers that are gone, in the order in which they were handed out.
        abandoned = [trial for trials, trial in self._list_running() if trial.number not in trials.held]
        if abandoned:
            pack = min(abandoned, key=lambda trial: trial.order).pack
            members = [trial for trial in abandoned if trial.pack == pack]
            # A process may have been killed before it had begun all trials of a pack. The others still join it if it
            # begins at step 0.
            may_join = not find_checkpoint(self.sweep.path, pack).exists()
            plan = [places for places in plan if may_join and all(one in [t for _, t in places] for one in members)]
        else:
            pack = ""
            plan = [places for places in plan if any(trial is None for _, trial in places)]
        for trials, known in plan[0] if plan else ():
            if known is None:
                params, state = self.stage.propose(trials)
                orders = [other.order for others in self.stage.arms.values() for other in others.trials.values()]
                order = 1 + max(orders, default=-1)
                pack = trials.begin(params, pack=pack, order=order, sampler_state=state).pack
        taken = [(trials, trial) for trials, trial in self._list_running() if trial.pack == pack]
        taken.sort(key=lambda pair: pair[1].order)  # the run that gave the pack its name comes first
        for trials, trial in taken:
            trials.held[trial.number] = worker
        self._save_if_due()
        return [self._assign(trials, trial) for trials, trial in taken]

    def _list_running(self) -> list[tuple[ArmTrials, Trial]]:
        return [(trials, trial) for trials in self.stage.arms.values() for trial in trials.list_running()]

    def _plan_packs(self, slots: Mapping[str, int]) -> Iterator[list[tuple[ArmTrials, Trial | None]]]:
        """Yields the packs of the current rounds. None stands for a trial that has not begun.

        The plan also has the trials that have begun or ended, so it is the same whichever worker asks, and after a
        process was killed.
        """
        arms = self.stage.arms
        groups = [[arms[arm.name] for arm in group if arm.name in arms] for group in self._groups]
        # First arms without a space, then the arms that have begun the smallest fraction of their trials.
        for group in sorted(filter(None, groups), key=_rank_group):
            if self.confirm is None and any(self.search.awaits_base(trials.arm) for trials in group):
                continue
            # A round of arms that share packs begins when the earlier round of all of them has ended.
            for round_ in zip_longest(*map(self.stage.list_rounds, group), fillvalue=()):
                places = [(trials, trial) for trials, part in zip(group, round_, strict=True) for trial in part]
                if all(trial is not None and trial.state != "running" for _, trial in places):
                    continue
                fitting = slots[group[0].arm.name]
                rest = iter(places)
                for size in choose_pack_sizes(len(places), slots=fitting, num_workers=self._num_workers):
                    yield list(islice(rest, size))
                break

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

    def split(self, packs: Sequence[Sequence[Assignment]]) -> None:
        """Makes several packs of one that broke. They are handed out again before any other trial.

        The first pack keeps the name, and each other pack is named by its first run.
        """
        for pack in packs[1:]:
            for assignment in pack:
                trials, trial = self._find(assignment)
                trials.move(trial, pack[0].run_folder.path.name)
        for assignment in chain.from_iterable(packs):
            trials, trial = self._find(assignment)
            trials.held.pop(trial.number, None)

    def holds_pack(self, worker: str) -> bool:
        return any(worker in trials.held.values() for trials in self.stage.arms.values())

    def release_worker(self, worker: str) -> None:
        """Releases the packs of a worker that died. They are handed out again before any other trial.

        Raises WorkerError if `MAX_DEATHS_IN_A_ROW` workers died in a row.
        """
        for trials in self.stage.arms.values():
            trials.held = {number: holder for number, holder in trials.held.items() if holder != worker}
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
            shutil.rmtree(self.sweep.path / PACKS_FOLDER, ignore_errors=True)
            for folder in (self.sweep.path / RUNS_FOLDER).iterdir():
                remove_leftovers(folder)  # a killed process may have left half-written files
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
        return Assignment(
            arm=trials.arm,
            trial=copy(trial),
            config=trials.arm.compose(params),
            run_folder=RunFolder(path=self.sweep.path / trial.run, arm=trial.arm, trial=number),
        )

    def _find(self, assignment: Assignment) -> tuple[ArmTrials, Trial]:
        trials = self.stage.arms[assignment.arm.name]
        return trials, trials.trials[assignment.trial.number]

    def _save_if_due(self) -> None:
        if self.sweep.is_save_due():
            self.save()


def _rank_group(group: Sequence[ArmTrials]) -> tuple[bool, float]:
    """Returns the sort key of arms that share packs: whether they search anything, and the fraction that has begun."""
    begun, planned = (sum(numbers) for numbers in zip(*((len(one.trials), one.planned) for one in group), strict=True))
    return any(one.arm.space for one in group), begun / max(planned, 1)

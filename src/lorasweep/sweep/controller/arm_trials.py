"""The trials of one arm in one stage: what the journal holds of them, and which of them may be trained next."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, create_trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.data import Direction
from lorasweep.record import TrialState
from lorasweep.sweep.controller.entry import LIVE, Entry
from lorasweep.sweep.controller.history import History
from lorasweep.sweep.controller.rows import (
    INFEASIBLE_ATTRIBUTE,
    LOSSES_ATTRIBUTE,
    PAUSED_ATTRIBUTE,
    REASON_ATTRIBUTE,
    TURN_ATTRIBUTE,
    row_state,
)
from lorasweep.sweep.controller.rules import NoStopping, StoppingRule
from lorasweep.sweep.controller.rungs import Rungs
from lorasweep.sweep.definition.arms import Arm


class ArmTrials:
    """The trials of one arm in one stage.

    The journal is written before anything here changes, and holds all that is needed to make this object again. A trial
    enters it in one write with all its parameters, so that no process can be killed between some of them.
    """

    def __init__(
        self,
        arm: Arm,
        *,
        study: optuna.Study,
        storage: BaseStorage,
        space: Mapping[str, BaseDistribution],
        planned: int,
        rule: StoppingRule | None = None,
        by_loss: bool = False,
        prunes_by_study: bool = False,
        first_part: int | None = None,
        session: str | None = None,
    ) -> None:
        """Reads the trials that the study has, and fails those that are not the controller's.

        Args:
            arm: The arm.
            study: Its study in this stage.
            storage: The storage that the study is in.
            space: What each trial's parameters are drawn from.
            planned: How many trials the arm gets, those that have ended included.
            rule: Which trials may go on beyond a rung. None lets every trial run to its end.
            by_loss: Whether rungs compare by the validation loss instead of the metric.
            prunes_by_study: Whether the study's own pruner decides instead, at every evaluation.
            first_part: How many trials may begin before one of the arm is complete. None sets no limit.
            session: What the names of the workers begin with that may train trials now; None where there are none.
        """
        self.arm = arm
        self.study = study
        self.planned = planned
        self.foreign = 0
        """Trials in the study that the controller did not make. They count as none."""
        self._space = dict(space)
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._rule: StoppingRule = rule or NoStopping()
        self._by_loss = by_loss
        self._prunes_by_study = prunes_by_study
        direction: Direction = "minimize" if study.direction == optuna.study.StudyDirection.MINIMIZE else "maximize"
        self._first_part = planned if first_part is None else first_part
        self._session = session
        self.entries: dict[int, Entry] = {}
        self._rungs = Rungs(self._rule, self.entries, sign=1 if direction == "minimize" else -1)
        self._history = History(self._space, direction=direction)
        self._changed: set[int] = set()
        """Trials that the history does not know as they are now."""
        self._num_in_state: Counter[TrialState] = Counter()
        self._abandoned: dict[int, Entry] = {}
        self._held: defaultdict[str, dict[int, Entry]] = defaultdict(dict)
        """By the worker that holds them."""
        self._next_number = 0
        for trial in study.get_trials(deepcopy=False):
            self._read(trial)
            self._next_number = trial.number + 1

    @property
    def left(self) -> int:
        """Trials that have not begun."""
        return self.planned - len(self.entries)

    @property
    def progress(self) -> float:
        """Share of the trials that have begun, 0 to 1."""
        return len(self.entries) / self.planned if self.planned else 1.0

    def frozen(self) -> list[FrozenTrial]:
        """Returns the controller's trials of this arm as the study has them, in the order of their numbers."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.number in self.entries]

    def history(self) -> History:
        """Returns what a sampler may learn from."""
        for number in sorted(self._changed):
            trial = self._storage.get_trial(self._trial_id(self.entries[number]))
            self._history.update(number, trial, is_paused=self.entries[number].state == "paused")
        self._changed.clear()
        return self._history

    def abandoned(self) -> Collection[Entry]:
        """Returns the trials that were handed out to a process that is gone."""
        return self._abandoned.values()

    def held_by(self, worker: str) -> list[Entry]:
        """Returns the trials that a worker trains now."""
        return list(self._held.get(worker, {}).values())

    def is_any(self, state: TrialState) -> bool:
        """Whether any trial is in a state."""
        return self._num_in_state[state] > 0

    def next_promoted(self) -> tuple[Entry, int] | None:
        """Returns the paused trial that is to go on next and the rung it goes on beyond; None where there is none.

        Of several it is the one at the highest rung, there the best one.
        """
        return self._rungs.next_promoted(all_begun=self.left <= 0)

    def may_begin(self) -> bool:
        """Whether a new trial may begin now.

        An adaptive sampler is asked for no more than the first part of the trials before one of them is complete, as
        long as anything of the arm still runs.
        """
        if self.left <= 0:
            return False
        waits = len(self.entries) >= self._first_part and not self.is_any("complete")
        return not (waits and self.is_any("running"))

    def begin(
        self,
        params: Mapping[str, Any],
        *,
        order: int,
        attributes: Mapping[str, Any],
        worker: str = "",
        request: int = 0,
    ) -> Entry:
        """Writes a new trial with all its parameters into the journal, in one step, and returns it."""
        number = self.next_number()
        entry = Entry(number=number, params=dict(params), order=order, is_held=True, worker=worker, request=request)
        trial = create_trial(
            state=OptunaState.RUNNING,
            params=dict(params),
            distributions=self._space,
            user_attrs={TURN_ATTRIBUTE: _describe_turn(entry), **attributes},
        )
        self.study.add_trial(trial)
        self._next_number = number + 1
        self._add(entry)
        return entry

    def next_number(self) -> int:
        """Returns the number that the next trial of the study gets."""
        while self._is_taken(self._next_number):  # by a trial that somebody else added to a database
            self._next_number += 1
        return self._next_number

    def promote(self, entry: Entry, rung: int, *, order: int, worker: str = "", request: int = 0) -> None:
        """Hands out a trial that was paused at a rung, to go on beyond it."""
        self._note_turn(
            entry,
            order=order,
            passed=entry.passed | {rung},
            promoted=entry.promoted | {rung},
            worker=worker,
            request=request,
        )
        self._change(entry, state="running", is_held=True)

    def take_back(self, entry: Entry, *, worker: str = "", request: int = 0) -> None:
        """Hands out a trial again that was handed out to a worker that is gone.

        Its order stays, so that the trials of a process that was killed twice are handed out again in the same order.
        """
        if (worker, request) != (entry.worker, entry.request):
            self._note_turn(entry, worker=worker, request=request)
        self._change(entry, state="running", is_held=True)

    def release(self, entry: Entry) -> None:
        """Notes that the worker of a running trial trains it no more, so that it is handed out again."""
        if entry.worker:
            self._note_turn(entry, worker="", request=0)
        self._change(entry, is_held=False)

    def store(self, entry: Entry, step: int, value: float, *, loss: float | None = None) -> None:
        """Writes the value of an evaluation, and at a rung the loss. The same run gives the same value again."""
        if self._by_loss and loss is not None and step in self._rule.rungs and entry.state in LIVE:
            losses = {**entry.losses, step: loss}
            if losses != entry.losses:
                self.note(entry, {LOSSES_ATTRIBUTE: {str(rung): value for rung, value in losses.items()}})
                self._change(entry, losses=losses)
        if entry.values.get(step) != value and entry.state in LIVE:
            self._storage.set_trial_intermediate_value(self._trial_id(entry), step, value)
            self._change(entry, values={**entry.values, step: value})

    def decide(self, entry: Entry, step: int) -> bool:
        """Returns whether a trial goes on after the evaluation at a step; all values of it must be stored by then."""
        if self._prunes_by_study:
            return not Trial(self.study, self._trial_id(entry)).should_prune()
        if step not in self._rule.rungs:
            return True
        if step in entry.passed:  # a killed process had come here: decided as it was then
            return step not in entry.promoted
        if not self._rungs.is_better(entry, step, all_begun=self.left <= 0):
            return False
        self._note_turn(entry, passed=entry.passed | {step})
        return True

    def pause(self, entry: Entry, attributes: Mapping[str, Any], *, step: int) -> None:
        """Notes that a trial's run was paused; one that was promoted from here before waits to be handed out again.

        Args:
            entry: The trial.
            attributes: What the record is to say of it.
            step: Steps that its run has done. A run that began anew may have values of later steps.
        """
        self.note(entry, {**attributes, PAUSED_ATTRIBUTE: step})
        was_promoted = step in entry.promoted
        if was_promoted and entry.worker:  # else a restarted controller would take it for one that is being trained
            self._note_turn(entry, worker="", request=0)
        self._change(entry, state="running" if was_promoted else "paused", is_held=False)

    def end(self, entry: Entry, state: TrialState, attributes: Mapping[str, Any], *, value: float | None) -> None:
        """Tells the study how a trial ended; one that has ended stays as it is.

        Args:
            entry: The trial.
            state: `complete`, `pruned`, `failed` or `infeasible`.
            attributes: What the record is to say of it.
            value: Its score, where it is complete.
        """
        if not self._storage.get_trial(self._trial_id(entry)).state.is_finished():
            self.note(entry, attributes)
            if state == "infeasible":
                # A sampler leaves failed trials out. From one that was pruned and breaks a constraint it can learn.
                self.note(entry, {INFEASIBLE_ATTRIBUTE: True})
                Trial(self.study, self._trial_id(entry)).set_constraint("memory", 1.0)
            told = {"complete": OptunaState.COMPLETE, "failed": OptunaState.FAIL}.get(state, OptunaState.PRUNED)
            self.study.tell(entry.number, value if state == "complete" else None, state=told)
        self._change(entry, state=state, is_held=False)

    def note(self, entry: Entry, attributes: Mapping[str, Any]) -> None:
        """Writes attributes of a trial."""
        for name, attribute in attributes.items():
            self._storage.set_trial_user_attr(self._trial_id(entry), name, attribute)

    def paused(self) -> list[Entry]:
        """Returns the paused trials in the order of their numbers."""
        return [entry for entry in self.entries.values() if entry.state == "paused"]

    def _read(self, trial: FrozenTrial) -> None:
        turn = trial.user_attrs.get(TURN_ATTRIBUTE)
        if not isinstance(turn, Mapping) or set(trial.params) != set(self._space):
            self.foreign += 1
            if not trial.state.is_finished():
                reason = "it is not a trial of this sweep, or has not all parameters, so another one takes its place"
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
                self._storage.set_trial_user_attr(trial_id, REASON_ATTRIBUTE, reason)
                self._storage.set_trial_state_values(trial_id, OptunaState.FAIL)
            return
        entry = Entry(
            number=trial.number,
            params=dict(trial.params),
            order=int(turn["order"]),
            passed=frozenset(turn["passed"]),
            promoted=frozenset(turn["promoted"]),
            values=dict(trial.intermediate_values),
            losses={int(step): loss for step, loss in trial.user_attrs.get(LOSSES_ATTRIBUTE, {}).items()},
            state=row_state(trial),
            worker=turn.get("worker", ""),
            request=turn.get("request", 0),
        )
        # A trial whose process was killed after the report and before the pause is running: it reports once more.
        if entry.state == "running" and trial.user_attrs.get(PAUSED_ATTRIBUTE) == max(entry.values, default=0):
            entry.state = "running" if max(entry.values) in entry.promoted else "paused"
        if entry.state == "running" and self._session is not None:
            entry.is_held = entry.worker.startswith(self._session)
        self._add(entry)
        if entry.state == "infeasible" and not trial.state.is_finished():  # killed before all of it was told
            self.end(entry, "infeasible", {}, value=None)

    def _note_turn(self, entry: Entry, **changes: Any) -> None:
        changed = dataclasses.replace(entry, **changes)
        self.note(entry, {TURN_ATTRIBUTE: _describe_turn(changed)})
        self._change(entry, **changes)

    def _add(self, entry: Entry) -> None:
        self.entries[entry.number] = entry
        self._rungs.move(set(), self._rungs.places(entry))
        self._list(entry)
        self._changed.add(entry.number)

    def _change(self, entry: Entry, **changes: Any) -> None:
        """Sets attributes of a trial, and keeps the lists of trials as they would be if they were made anew."""
        places = self._rungs.places(entry)
        self._unlist(entry)
        for name, value in changes.items():
            setattr(entry, name, value)
        self._list(entry)
        self._rungs.move(places, self._rungs.places(entry))
        self._changed.add(entry.number)

    def _list(self, entry: Entry) -> None:
        self._num_in_state[entry.state] += 1
        if entry.is_held:
            self._held[entry.worker][entry.number] = entry
        elif entry.state == "running":
            self._abandoned[entry.number] = entry

    def _unlist(self, entry: Entry) -> None:
        self._num_in_state[entry.state] -= 1
        self._abandoned.pop(entry.number, None)
        if entry.is_held:
            del self._held[entry.worker][entry.number]
            if not self._held[entry.worker]:
                del self._held[entry.worker]

    def _is_taken(self, number: int) -> bool:
        try:
            self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        except KeyError:
            return False
        return True

    def _trial_id(self, entry: Entry) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, entry.number)


def _describe_turn(entry: Entry) -> dict[str, Any]:
    turn = {"order": entry.order, "passed": sorted(entry.passed), "promoted": sorted(entry.promoted)}
    return turn | ({"worker": entry.worker, "request": entry.request} if entry.worker else {})

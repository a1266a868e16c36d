"""The trials of one arm in one stage: what the journal holds of them, and which of them may be trained next."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from lorasweep.record import TrialState
from lorasweep.sweep.controller.rules import NoStopping, StoppingRule, find_better_parts
from lorasweep.sweep.controller.trial import (
    INFEASIBLE_ATTRIBUTE,
    LOSSES_ATTRIBUTE,
    PAUSED_ATTRIBUTE,
    TURN_ATTRIBUTE,
    Trial,
    read_trial,
)
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
        first_trials: int | None = None,
        session: str | None = None,
    ) -> None:
        """Reads the trials that the study has.

        Args:
            arm: The arm.
            study: Its study in this stage.
            storage: The storage that the study is in.
            space: The range of each parameter of a trial.
            planned: How many trials the arm gets, those that have ended included.
            rule: Which trials may train beyond a rung. None lets every trial run to its end.
            by_loss: Whether rungs compare by the validation loss instead of the metric.
            prunes_by_study: Whether the study's own pruner decides instead, at every evaluation.
            first_trials: How many trials may begin before one of the arm is complete. None sets no limit.
            session: What the names of workers begin with that may train trials now; None if there are none.
        """
        self.arm = arm
        self.study = study
        self.planned = planned
        self.trials: dict[int, Trial] = {}
        """The controller's trials by number. Trials that somebody else added to the study are left out."""
        self._space = dict(space)
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._rule: StoppingRule = rule or NoStopping()
        self._by_loss = by_loss
        self._prunes_by_study = prunes_by_study
        self._sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        self._first_trials = planned if first_trials is None else first_trials
        for frozen in study.get_trials(deepcopy=False):
            if TURN_ATTRIBUTE in frozen.user_attrs:
                trial = read_trial(frozen, session=session)
                self.trials[trial.number] = trial
                if trial.state == "infeasible" and not frozen.state.is_finished():  # killed before all of it was told
                    self.end(trial, "infeasible", {}, value=None)

    @property
    def left(self) -> int:
        """Number of trials that have not begun."""
        return self.planned - len(self.trials)

    @property
    def progress(self) -> float:
        """Fraction of the trials that have begun."""
        return len(self.trials) / self.planned if self.planned else 1.0

    def frozen(self) -> list[FrozenTrial]:
        """Returns the controller's trials of this arm as the study has them, in the order of their numbers."""
        return [frozen for frozen in self.study.get_trials(deepcopy=False) if frozen.number in self.trials]

    def history(self) -> list[FrozenTrial]:
        """Returns the trials as a sampler sees them: a paused one is pruned, because it is a result of fewer steps."""
        shown = []
        for frozen in self.frozen():
            if self.trials[frozen.number].state == "paused":
                frozen = copy.copy(frozen)  # the study's own trial still runs
                frozen.state = OptunaState.PRUNED
            shown.append(frozen)
        return shown

    def next_number(self) -> int:
        """Returns the number that the next trial of the study gets; trials of others count in it."""
        return len(self.study.get_trials(deepcopy=False))

    def find_abandoned(self) -> list[Trial]:
        """Returns the trials that were handed out to a process that is gone."""
        return [trial for trial in self.trials.values() if trial.state == "running" and not trial.is_held]

    def held_by(self, worker: str) -> list[Trial]:
        """Returns the trials that a worker trains now."""
        return [trial for trial in self.trials.values() if trial.is_held and trial.worker == worker]

    def paused(self) -> list[Trial]:
        """Returns the paused trials in the order of their numbers."""
        return [trial for trial in self.trials.values() if trial.state == "paused"]

    def is_any(self, state: TrialState) -> bool:
        """Whether any trial is in a state."""
        return any(trial.state == state for trial in self.trials.values())

    def next_promoted(self) -> tuple[Trial, int] | None:
        """Returns the paused trial to be resumed next and the rung it passes; None if no paused trial may continue.

        Of several it is the one at the highest rung, there the best one.
        """
        if not self.is_any("paused"):
            return None
        better = self._find_better_parts()
        waiting = (
            (trial, rung)
            for rung in reversed(self._rule.rungs)
            for trial in better[rung].values()
            if trial.state == "paused" and rung not in trial.passed
        )
        return next(waiting, None)

    def may_begin(self) -> bool:
        """Whether a new trial may begin now.

        An adaptive sampler is asked for no more than the first trials before one of them is complete, as long as any
        trial of the arm runs.
        """
        if self.left <= 0:
            return False
        waits = len(self.trials) >= self._first_trials and not self.is_any("complete")
        return not (waits and self.is_any("running"))

    def begin(
        self,
        params: Mapping[str, Any],
        *,
        order: int,
        attributes: Mapping[str, Any],
        worker: str = "",
        request: int = 0,
    ) -> Trial:
        """Writes a new trial with all its parameters into the journal, in one step, and returns it."""
        trial = Trial(
            number=self.next_number(),
            params=dict(params),
            order=order,
            is_held=True,
            worker=worker,
            request=request,
        )
        self.study.add_trial(
            create_trial(
                state=OptunaState.RUNNING,
                params=dict(params),
                distributions=self._space,
                user_attrs={TURN_ATTRIBUTE: trial.turn, **attributes},
            )
        )
        self.trials[trial.number] = trial
        return trial

    def promote(self, trial: Trial, rung: int, *, order: int, worker: str = "", request: int = 0) -> None:
        """Hands out a trial that was paused at a rung, to train beyond it."""
        passed, promoted = trial.passed | {rung}, trial.promoted | {rung}
        self._write_turn(trial, order=order, passed=passed, promoted=promoted, worker=worker, request=request)
        trial.state, trial.is_held = "running", True

    def hand_out_again(self, trial: Trial, *, worker: str = "", request: int = 0) -> None:
        """Hands out a trial whose worker is gone.

        Its order stays, so that the trials of a process that was killed twice are handed out again in the same order.
        """
        if (worker, request) != (trial.worker, trial.request):
            self._write_turn(trial, worker=worker, request=request)
        trial.state, trial.is_held = "running", True

    def release(self, trial: Trial) -> None:
        """Notes that the worker of a running trial no longer trains it, so that it is handed out again."""
        if trial.worker:
            self._write_turn(trial, worker="", request=0)
        trial.is_held = False

    def store(self, trial: Trial, step: int, value: float, *, loss: float | None = None) -> None:
        """Writes the value of an evaluation, and at a rung the loss. A resumed run may report the same value again."""
        if not trial.is_live:
            return
        if self._by_loss and loss is not None and step in self._rule.rungs and trial.losses.get(step) != loss:
            losses = {**trial.losses, step: loss}
            self.write(trial, {LOSSES_ATTRIBUTE: {str(rung): value for rung, value in losses.items()}})
            trial.losses = losses
        if trial.values.get(step) != value:
            self._storage.set_trial_intermediate_value(self._trial_id(trial), step, value)
            trial.values[step] = value

    def decide(self, trial: Trial, step: int) -> bool:
        """Returns whether a trial trains on after the evaluation at a step; all values of it must be stored by then."""
        if self._prunes_by_study:
            return not self._as_optuna_trial(trial).should_prune()
        if step not in self._rule.rungs:
            return True
        if step in trial.passed:  # a process that was killed since had reported this step: the decision stays
            return step not in trial.promoted
        if trial.number not in self._find_better_parts()[step]:
            return False
        self._write_turn(trial, passed=trial.passed | {step})
        return True

    def pause(self, trial: Trial, attributes: Mapping[str, Any], *, step: int) -> None:
        """Notes that a trial's run was paused; one that was promoted from here before waits to be handed out again.

        Args:
            trial: The trial.
            attributes: User attributes to write.
            step: Steps that its run has done. A run that began anew may have values of later steps.
        """
        self.write(trial, {**attributes, PAUSED_ATTRIBUTE: step})
        was_promoted = step in trial.promoted
        if was_promoted and trial.worker:  # else a restarted controller would believe that the worker trains it
            self._write_turn(trial, worker="", request=0)
        trial.state, trial.is_held = "running" if was_promoted else "paused", False

    def end(self, trial: Trial, state: TrialState, attributes: Mapping[str, Any], *, value: float | None) -> None:
        """Tells the study how a trial ended; one that has ended stays as it is.

        Args:
            trial: The trial.
            state: `complete`, `pruned`, `failed` or `infeasible`.
            attributes: User attributes to write.
            value: The score of a complete trial.
        """
        if not self._storage.get_trial(self._trial_id(trial)).state.is_finished():
            self.write(trial, attributes)
            if state == "infeasible":
                # A sampler leaves failed trials out. From one that was pruned and breaks a constraint it can learn.
                self.write(trial, {INFEASIBLE_ATTRIBUTE: True})
                self._as_optuna_trial(trial).set_constraint("memory", 1.0)
            told = {"complete": OptunaState.COMPLETE, "failed": OptunaState.FAIL}.get(state, OptunaState.PRUNED)
            self.study.tell(trial.number, value if state == "complete" else None, state=told)
        trial.state, trial.is_held = state, False

    def write(self, trial: Trial, attributes: Mapping[str, Any]) -> None:
        """Writes user attributes of a trial."""
        for name, attribute in attributes.items():
            self._storage.set_trial_user_attr(self._trial_id(trial), name, attribute)

    def _find_better_parts(self) -> dict[int, dict[int, Trial]]:
        return find_better_parts(self._rule, self.trials.values(), sign=self._sign, all_begun=self.left <= 0)

    def _write_turn(self, trial: Trial, **changes: Any) -> None:
        """Changes when and to whom a trial was handed out: in the journal first, in one write."""
        self.write(trial, {TURN_ATTRIBUTE: dataclasses.replace(trial, **changes).turn})
        for name, value in changes.items():
            setattr(trial, name, value)

    def _as_optuna_trial(self, trial: Trial) -> optuna.trial.Trial:
        return optuna.trial.Trial(self.study, self._trial_id(trial))

    def _trial_id(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

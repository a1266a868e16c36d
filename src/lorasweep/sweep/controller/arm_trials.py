"""The trials of one arm in one stage. Writes their changes to the journal and chooses the trial to be trained next."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.data import Direction
from lorasweep.record import TrialState
from lorasweep.sweep.controller.history import History
from lorasweep.sweep.controller.rate_law import SAMPLERS_IN_U, build_rate_law
from lorasweep.sweep.controller.rung_tables import RungTables
from lorasweep.sweep.controller.stopping_rules import RungOrder, StoppingRule
from lorasweep.sweep.controller.trial import (
    ASSIGNMENT_ATTRIBUTE,
    INFEASIBLE_ATTRIBUTE,
    LOSSES_ATTRIBUTE,
    PAUSED_ATTRIBUTE,
    Trial,
    read_trial,
)
from lorasweep.sweep.definition.arms import Arm
from lorasweep.wording import format_metric, format_score, join_words

WARNING_ATTRIBUTE = "lorasweep:warning"
"""User attribute of a study: the sentence of `ArmTrials.warning`."""
MIN_TRIALS_TO_WARN = 4
"""Number of trials that must reach the first rung before a warning says that most of them have learned nothing."""


class ArmTrials:
    """The trials of one arm in one stage.

    Each change is written to the journal first, and this object can be created again from the journal. A new trial is
    written with all its parameters at once, so that a killed process never leaves a trial that lacks some of them.
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
        constant_answer: float | None = None,
        prunes_by_study: bool = False,
        first_trials: int | None = None,
        session: str | None = None,
    ) -> None:
        """Reads the arm's trials from the study.

        Args:
            arm: The arm.
            study: The arm's study in this stage.
            storage: The storage of the study.
            space: The range of each parameter of a trial.
            planned: Number of trials of the arm, including trials that have ended.
            rule: Decides which trials may train beyond a rung. None lets every trial run to its end.
            by_loss: Whether trials are compared at rungs by validation loss instead of the metric.
            constant_answer: The metric of the constant answer on validation data; None if there is none.
            prunes_by_study: Whether the study's pruner decides at every evaluation, instead of `rule` at rungs.
            first_trials: Number of trials that begin first; the others wait for their results. None sets no limit.
            session: Prefix of the names of workers that may train trials now; None if no worker trains.
        """
        self.arm = arm
        self.study = study
        self.planned = planned
        self.trials: dict[int, Trial] = {}
        """The controller's trials by number. Trials that another program added to the study are skipped."""
        self._num_in_state: Counter[TrialState] = Counter()
        self._held: defaultdict[str, dict[int, Trial]] = defaultdict(dict)
        """The trials that each worker trains now, by number."""
        self._abandoned: dict[int, Trial] = {}
        """The running trials that no worker trains any more, by number."""
        self.next_order = 0
        """One more than the highest order of a trial."""
        self._space = dict(space)
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._rule = rule or StoppingRule()
        self._prunes_by_study = prunes_by_study
        self._first_trials = planned if first_trials is None else first_trials
        direction: Direction = "minimize" if study.direction == optuna.study.StudyDirection.MINIMIZE else "maximize"
        self._order = RungOrder(
            sign=1 if direction == "minimize" else -1, by_loss=by_loss, constant_answer=constant_answer
        )
        self._tables = RungTables(self._rule, self.trials, order=self._order)
        self.warning: str | None = study.user_attrs.get(WARNING_ATTRIBUTE)
        """The warning that most trials have learned nothing by the first rung; None if there was no reason for it."""
        law = build_rate_law(arm) if arm.sweep_config.sampler.name in SAMPLERS_IN_U else None
        self._history = History(self._space, direction=direction, law=law)
        self._unread_by_history: set[int] = set()
        """Numbers of the trials that have changed since the last call of `history`."""
        for frozen in study.get_trials(deepcopy=False):
            if ASSIGNMENT_ATTRIBUTE in frozen.user_attrs:
                trial = read_trial(frozen, session=session)
                self._add(trial)
                if trial.state == "infeasible" and not frozen.state.is_finished():  # a process was killed inside `end`
                    self.end(trial, "infeasible", {})

    @property
    def num_left(self) -> int:
        """Number of trials that have not begun."""
        return self.planned - len(self.trials)

    @property
    def begun_fraction(self) -> float:
        """Fraction of the trials that have begun."""
        return len(self.trials) / self.planned if self.planned else 1.0

    def frozen(self) -> list[FrozenTrial]:
        """Returns the controller's trials of this arm as Optuna's objects, in the order of their numbers."""
        return [frozen for frozen in self.study.get_trials(deepcopy=False) if frozen.number in self.trials]

    def history(self) -> History:
        """Returns the trials as a sampler sees them. Reads only the trials that have changed since the last call."""
        for number in sorted(self._unread_by_history):
            frozen = self._storage.get_trial(self._trial_id(self.trials[number]))
            self._history.update(number, frozen, is_paused=self.trials[number].state == "paused")
        self._unread_by_history.clear()
        return self._history

    def find_abandoned(self) -> list[Trial]:
        """Returns the running trials whose worker is gone."""
        return list(self._abandoned.values())

    def list_held_by(self, worker: str) -> list[Trial]:
        return list(self._held.get(worker, {}).values())

    def list_paused(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state == "paused"]

    def has_any(self, state: TrialState) -> bool:
        return self._num_in_state[state] > 0

    def next_promoted(self) -> tuple[Trial, int] | None:
        """Returns the paused trial to be resumed next and the rung it passes; None if no paused trial may continue."""
        return self._tables.next_promoted(all_begun=self.num_left <= 0) if self.has_any("paused") else None

    def may_begin(self) -> bool:
        """Returns whether a new trial may begin now."""
        return self.num_left > 0 and not self._waits_for_first_trials()

    def _waits_for_first_trials(self) -> bool:
        """Returns whether the first trials of an adaptive sampler must train further before it proposes others.

        It waits until all of them have a value of the first rung. Without rungs, it waits until one is complete.
        """
        if self._rule.rungs:
            return len(self.trials) == self._first_trials and self._tables.has_any_below_first_rung()
        # If no trial runs, waiting would bring no result.
        return len(self.trials) >= self._first_trials and not self.has_any("complete") and self.has_any("running")

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
        trial = Trial(number=-1, params=dict(params), order=order, is_in_training=True, worker=worker, request=request)
        template = create_trial(
            state=OptunaState.RUNNING,
            params=dict(params),
            distributions=self._space,
            user_attrs={ASSIGNMENT_ATTRIBUTE: trial.assignment_attribute, **attributes},
        )
        # `Study.add_trial` would not return the id of the new trial
        trial_id = self._storage.create_new_trial(self._study_id, template_trial=template)
        trial.number = self._storage.get_trial_number_from_id(trial_id)
        self._add(trial)
        return trial

    def promote(self, trial: Trial, rung: int, *, order: int, worker: str = "", request: int = 0) -> None:
        """Hands out a trial that was paused at a rung, to train beyond it."""
        passed, promoted = trial.passed | {rung}, trial.promoted | {rung}
        self._write_handout(trial, order=order, passed=passed, promoted=promoted, worker=worker, request=request)
        self._update(trial, state="running", is_in_training=True)

    def hand_out_again(self, trial: Trial, *, worker: str = "", request: int = 0) -> None:
        """Hands out a trial whose worker is gone."""
        # The order stays, so that a process that was killed twice gets its trials in the same order again.
        if (worker, request) != (trial.worker, trial.request):
            self._write_handout(trial, worker=worker, request=request)
        self._update(trial, state="running", is_in_training=True)

    def release(self, trial: Trial) -> None:
        """Notes that no worker trains this running trial any more, so that it is handed out again."""
        if trial.worker:
            self._write_handout(trial, worker="", request=0)
        self._update(trial, is_in_training=False)

    def store(self, trial: Trial, step: int, value: float, *, loss: float | None = None) -> None:
        """Writes the metric of an evaluation, and at a rung the loss. A resumed run may report an evaluation again."""
        if not trial.is_live:
            return
        if loss is not None and step in self._rule.rungs and trial.losses.get(step) != loss:
            # before the value, so that a killed process leaves no trial to be compared without its loss
            losses = {**trial.losses, step: loss}
            self.write(trial, {LOSSES_ATTRIBUTE: {str(rung): value for rung, value in losses.items()}})
            self._update(trial, losses=losses)
        if trial.values.get(step) != value:
            self._storage.set_trial_intermediate_value(self._trial_id(trial), step, value)
            self._update(trial, values={**trial.values, step: value})

    def update_warning(self, metric: str) -> None:
        """Sets `warning` if most trials at the first rung are no better than the constant answer.

        It is written into the journal and then stays, so that a resumed sweep has the same warning.
        """
        if self.warning is None and self._rule.rungs:
            unlearned, arrived = self._tables.count_unlearned()
            if arrived >= MIN_TRIALS_TO_WARN and unlearned > arrived / 2:
                self.warning = self._describe_unlearned(metric, unlearned=unlearned, arrived=arrived)
                self.study.set_user_attr(WARNING_ATTRIBUTE, self.warning)

    def _describe_unlearned(self, metric: str, *, unlearned: int, arrived: int) -> str:
        remedies = ["more steps (`trainer.max_steps`)", "other learning rates (`optim.lr`)"]
        if metric in ("accuracy", "f1"):
            remedies.append("another metric (`data.metric=matthews` if each example has one label)")
        if metric != "loss" and not self._order.by_loss:
            remedies.append("`pruner.criterion=loss`")
        return (
            f"At step {self._rule.rungs[0]}, {unlearned} of {arrived} trials of `{self.arm.name}` have learned nothing "
            f"yet: their {format_metric(metric)} is no better than that of an answer that needs no training "
            f"({format_score(self._order.constant_answer)}). If this stays so, start a new sweep with "
            f"{join_words(remedies, last='or')}."
        )

    def decide(self, trial: Trial, step: int) -> bool:
        """Returns whether a trial continues after an evaluation. All values of its step must be stored before."""
        if self._prunes_by_study:
            return not self._as_optuna_trial(trial).should_prune()
        if step not in self._rule.rungs:
            return True
        if step in trial.passed:  # reported before, by a process that was killed later: the decision stays
            return step not in trial.promoted
        if not self._tables.may_train_beyond(trial, step, all_begun=self.num_left <= 0):
            return False
        self._write_handout(trial, passed=trial.passed | {step})
        return True

    def pause(self, trial: Trial, attributes: Mapping[str, Any], *, step: int) -> None:
        """Notes that a trial's run was paused at a step, and writes user attributes.

        A trial that was promoted at this step before is handed out again.
        """
        self.write(trial, {**attributes, PAUSED_ATTRIBUTE: step})
        was_promoted = step in trial.promoted
        if (
            was_promoted and trial.worker
        ):  # otherwise a restarted controller would take the trial for held by the worker
            self._write_handout(trial, worker="", request=0)
        self._update(trial, state="running" if was_promoted else "paused", is_in_training=False)

    def end(
        self,
        trial: Trial,
        state: TrialState,
        attributes: Mapping[str, Any],
        *,
        value: float | None = None,
    ) -> None:
        """Writes how a trial ended into the study, unless it is there already. `value` is a complete trial's score."""
        if not self._storage.get_trial(self._trial_id(trial)).state.is_finished():
            self.write(trial, attributes)
            if state == "infeasible":
                # A sampler ignores failed trials. It learns from a pruned trial that violates a constraint.
                self.write(trial, {INFEASIBLE_ATTRIBUTE: True})
                self._as_optuna_trial(trial).set_constraint("memory", 1.0)
            told = {"complete": OptunaState.COMPLETE, "failed": OptunaState.FAIL}.get(state, OptunaState.PRUNED)
            self.study.tell(trial.number, value if state == "complete" else None, state=told)
        self._update(trial, state=state, is_in_training=False)

    def write(self, trial: Trial, attributes: Mapping[str, Any]) -> None:
        for name, attribute in attributes.items():
            self._storage.set_trial_user_attr(self._trial_id(trial), name, attribute)

    def _write_handout(self, trial: Trial, **changes: Any) -> None:
        """Changes fields that say when and to whom a trial was handed out: first in the journal, with one write."""
        self.write(trial, {ASSIGNMENT_ATTRIBUTE: dataclasses.replace(trial, **changes).assignment_attribute})
        self._update(trial, **changes)

    def _add(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._tables.update_rows(set(), self._tables.list_rows(trial))
        self._add_to_indexes(trial)

    def _update(self, trial: Trial, **changes: Any) -> None:
        """Changes a trial's fields. Updates the tables and indexes too, so that no query reads all trials."""
        before = self._tables.list_rows(trial)
        self._num_in_state[trial.state] -= 1
        self._abandoned.pop(trial.number, None)
        if trial.is_in_training:
            del self._held[trial.worker][trial.number]
        for name, value in changes.items():
            setattr(trial, name, value)
        self._add_to_indexes(trial)
        self._tables.update_rows(before, self._tables.list_rows(trial))

    def _add_to_indexes(self, trial: Trial) -> None:
        self._unread_by_history.add(trial.number)
        self.next_order = max(self.next_order, trial.order + 1)
        self._num_in_state[trial.state] += 1
        if trial.is_in_training:
            self._held[trial.worker][trial.number] = trial
        elif trial.state == "running":
            self._abandoned[trial.number] = trial

    def _as_optuna_trial(self, trial: Trial) -> optuna.trial.Trial:
        return optuna.trial.Trial(self.study, self._trial_id(trial))

    def _trial_id(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

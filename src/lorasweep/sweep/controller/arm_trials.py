"""The trials of one arm in one stage: keeps them in the arm's study, compares them at rungs, and chooses the next.

The study is the only store. A `Trial` is made from the study's trial: Optuna has the parameters, the intermediate
values and the final state, and one user attribute has the other fields.

A rung is a step at which trials are compared. A stopping rule is a pure function of values, losses and trial numbers:
neither the order in which values arrive nor a clock changes its answer. The controller pauses a trial that may not
train beyond its rung, and resumes the trial if the rule later allows it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.data import Direction, get_sign
from lorasweep.config.sweep import HalvingPruner
from lorasweep.record import Trial, TrialState
from lorasweep.sweep.controller.encoding import OPTUNA_STATES
from lorasweep.sweep.definition.arms import Arm
from lorasweep.wording import format_metric, format_score, join_words

Row = tuple[float, float, int]
"""How a rung ranks a trial: its cost (lower is better), its validation loss and its number.

The loss orders trials of equal cost. The number only breaks exact ties of both.
"""
SCORE_ROUNDING = 1e-6
"""Relative difference up to which a score equals that of the constant answer.

Both are computed in fp32 (eps = 1.2e-7), perhaps on different devices, which may add in different orders."""

TRIAL_ATTRIBUTE = "lorasweep"
"""User attribute of a study's trial with the fields `KEPT_FIELDS`. Trials that other programs added have none."""
KEPT_FIELDS = (
    *("state", "value", "reason", "losses"),
    *("order", "passed", "promoted", "worker", "request", "sampler_state"),
)
"""The fields of a trial that Optuna has no place for. They are written together, so that they always fit together."""
MIN_TRIALS_TO_WARN = 4
"""Number of trials that must reach the first rung before a warning says that most of them have learned nothing."""


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """Decides how many trials continue after each rung. This base class has no rungs: every trial runs to its end."""

    rungs: tuple[int, ...] = ()
    """Optimizer steps at which trials are compared, ascending; each is a step with an evaluation."""

    def count_kept(self, ranked: Sequence[Row], *, all_arrived: bool) -> int:
        """Returns how many of the trials at a rung, best first, may train beyond it.

        `all_arrived` is whether no further trial of the arm can reach the rung.
        """
        return len(ranked)


@dataclass(frozen=True, kw_only=True)
class Halving(StoppingRule):
    """Promotion-type successive halving (Li et al. 2018, arXiv 1810.05934, algorithm 2).

    Of m trials at a rung the best floor(m / reduction_factor) may continue. Once no further trial can reach the rung,
    the best ceil(m / reduction_factor) may continue, but at least `min_survivors`, because the ranking of few trials
    at an early rung is unreliable. *Differs:* the paper's rule has neither the second count nor the minimum, because
    it does not know how many trials will come.
    """

    reduction_factor: int
    min_survivors: int = 1

    def count_kept(self, ranked: Sequence[Row], *, all_arrived: bool) -> int:
        quotient = len(ranked) / self.reduction_factor
        count = max(math.ceil(quotient), self.min_survivors) if all_arrived else math.floor(quotient)
        return min(count, len(ranked))


def build_rule(arm: Arm) -> StoppingRule:
    """Returns the rule that decides which trials of an arm are paused."""
    pruner, config = arm.sweep_config.pruner, arm.corner_configs[0]
    if not config.num_steps or not isinstance(pruner, HalvingPruner):
        return StoppingRule()
    every, max_steps = config.trainer.eval_every_steps, config.trainer.max_steps
    steps = range(every, max_steps, every)
    # A rung that is nearer to the end of the run than to the last evaluation before the end is dropped.
    latest = steps[-1] + every / 2 if steps else 0
    wanted = [fraction * max_steps for fraction in pruner.rungs if fraction * max_steps <= latest]
    rungs = {min(steps, key=lambda step: (abs(step - rung), step)) for rung in wanted}
    return Halving(
        rungs=tuple(sorted(rungs)), reduction_factor=pruner.reduction_factor, min_survivors=pruner.min_survivors
    )


@dataclass(frozen=True, kw_only=True)
class RungOrder:
    """The order of an arm's trials at a rung. It depends neither on the order of slots nor on that of reports."""

    direction: Direction
    constant_answer: float | None = None
    """Validation score of the constant answer (`DataSplits.score_constant_answer`); None if there is none."""

    def get_row(self, trial: Trial, rung: int) -> Row:
        """Returns how a rung ranks a trial. A NaN value and a missing or NaN loss count as infinite."""
        sign = get_sign(self.direction)
        cost, loss = sign * trial.values[rung], trial.losses.get(rung, math.inf)
        cost, loss = (math.inf if math.isnan(number) else number for number in (cost, loss))
        if self.constant_answer is not None and cost < math.inf and self.has_learned_nothing(trial, rung):
            # The metric does not say which of these trials begins to learn, but the loss does.
            cost = sign * self.constant_answer
        return cost, loss, trial.number

    def has_learned_nothing(self, trial: Trial, rung: int) -> bool:
        """Returns whether a trial's value is no better than that of the constant answer."""
        if self.constant_answer is None:
            return False
        gain = get_sign(self.direction) * (self.constant_answer - trial.values[rung])
        return not gain > SCORE_ROUNDING * abs(self.constant_answer)  # true for NaN too


class ArmTrials:
    """The trials of one arm in one stage.

    Each change is written to the journal before it is made here, and this object can be created again from the journal.
    """

    def __init__(
        self,
        arm: Arm,
        *,
        study: optuna.Study,
        storage: BaseStorage,
        space: Mapping[str, BaseDistribution],
        build_trial: Callable[[int, Mapping[str, Any]], Trial],
        planned: int,
        order: RungOrder,
        rule: StoppingRule | None = None,
        first_trials: int | None = None,
        session: str | None = None,
    ) -> None:
        """Reads the arm's trials from the study.

        `space` has the range of each parameter in the study, and `build_trial` makes a trial from its number and them.
        `planned` counts the trials that have ended too. Only `first_trials` begin before there are results. `session`
        is the prefix of the names of workers that may train trials now; None if no worker trains.
        """
        self.arm = arm
        self.study = study
        self.planned = planned
        self.trials: dict[int, Trial] = {}
        """The trials by number, ascending."""
        self._in_training: set[int] = set()
        """Numbers of the running trials that a worker trains now."""
        self._space = dict(space)
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._build_trial = build_trial
        self._order = order
        self._rule = rule or StoppingRule()
        self._first_trials = planned if first_trials is None else first_trials
        self._ranked: dict[int, list[Row]] = {rung: [] for rung in self._rule.rungs}
        """By rung: the rows of the trials that have a value there and did not fail, best first.

        They are kept sorted, because comparing thousands of trials at each report would take longer than training."""
        self._rows: dict[tuple[int, int], Row] = {}
        """The row of a trial in `_ranked`, by rung and number."""
        self._kept: dict[int, list[Row]] | None = None
        """By rung: the first rows of `_ranked`, of the trials that may train beyond the rung. None after a change."""
        for frozen in study.get_trials(deepcopy=False):
            if TRIAL_ATTRIBUTE in frozen.user_attrs:
                self._read(frozen, session=session)

    @property
    def num_left(self) -> int:
        """Number of trials that have not begun."""
        return self.planned - len(self.trials)

    def is_in_training(self, trial: Trial) -> bool:
        return trial.number in self._in_training

    def list_held_by(self, worker: str) -> list[Trial]:
        """Returns the trials that a worker trains now."""
        return [self.trials[number] for number in sorted(self._in_training) if self.trials[number].worker == worker]

    def list_in_state(self, state: TrialState) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state == state]

    def may_begin(self) -> bool:
        """Returns whether a new trial may begin now.

        The first trials of an adaptive sampler must all have a value of the first rung before it proposes others.
        Without rungs, one of them must be complete.
        """
        if self.num_left <= 0:
            return False
        if self._rule.rungs:
            first = self._rule.rungs[0]
            waits = len(self.trials) == self._first_trials
            return not (waits and any(t.is_live and first not in t.values for t in self.trials.values()))
        if len(self.trials) < self._first_trials or self.list_in_state("complete"):
            return True
        return not self.list_in_state("running")  # if no trial runs, waiting would bring no result

    def begin(self, params: Mapping[str, Any], **fields: Any) -> Trial:
        """Writes a new trial into the journal, and returns it.

        It is written with all its parameters at once, so that a killed process never leaves a trial without some of
        them. `fields` are fields of the trial: `order`, `worker`, `request` and `sampler_state`.
        """
        trial = self._build_trial(self._storage.get_n_trials(self._study_id), params)
        for name, value in fields.items():
            setattr(trial, name, value)
        template = create_trial(
            state=OptunaState.RUNNING,
            params=dict(params),
            distributions=self._space,
            user_attrs={TRIAL_ATTRIBUTE: {name: getattr(trial, name) for name in KEPT_FIELDS}},
        )
        self._storage.create_new_trial(self._study_id, template_trial=template)
        self.trials[trial.number] = trial
        self._in_training.add(trial.number)
        self._kept = None
        return trial

    def promote(self, trial: Trial, rung: int, *, order: int, worker: str = "", request: int = 0) -> None:
        """Hands out a trial that was paused at a rung, to train beyond it."""
        passed, promoted = sorted({*trial.passed, rung}), sorted({*trial.promoted, rung})
        handout = {"order": order, "worker": worker, "request": request}
        self._write(trial, state="running", passed=passed, promoted=promoted, **handout)
        self._in_training.add(trial.number)

    def hand_out_again(self, trial: Trial, *, worker: str = "", request: int = 0) -> None:
        """Hands out a trial whose worker is gone."""
        # The order stays, so that a process that was killed twice gets its trials in the same order again.
        self._write(trial, state="running", worker=worker, request=request)
        self._in_training.add(trial.number)

    def release(self, trial: Trial) -> None:
        """Notes that no worker trains this running trial any more, so that it is handed out again."""
        # without a name, because a restarted controller would take the trial for held by the worker
        self._write(trial, worker="", request=0)
        self._in_training.discard(trial.number)

    def store(self, trial: Trial, step: int, value: float, *, loss: float | None = None) -> None:
        """Writes the metric of an evaluation, and at a rung the loss. A resumed run may report an evaluation again."""
        if not trial.is_live:
            return
        if loss is not None and step in self._rule.rungs:
            # before the value, so that a killed process leaves no trial to be compared without its loss
            self._write(trial, losses={**trial.losses, step: loss})
        if trial.values.get(step) != value:
            self._storage.set_trial_intermediate_value(self._find_id(trial), step, value)
            trial.values[step] = value
        self._rank(trial)

    def decide(self, trial: Trial, step: int) -> bool:
        """Returns whether a trial continues after an evaluation. All values of its step must be stored before."""
        if step not in self._rule.rungs:
            return True
        if step in trial.passed:  # A process that was killed later has already reported this. The decision stays.
            return step not in trial.promoted
        if not self._is_kept(trial, step, self._find_kept()[step]):
            return False
        self._write(trial, passed=sorted({*trial.passed, step}))
        return True

    def pause(self, trial: Trial, *, step: int, **fields: Any) -> None:
        """Notes that a trial's run was paused at a step; `fields` are further fields of the trial."""
        if step in trial.promoted:
            # a process that was killed later has already been told this, so the trial is handed out again
            self._write(trial, **fields, worker="", request=0)
        else:
            self._write(trial, **fields, state="paused")
        self._in_training.discard(trial.number)

    def end(self, trial: Trial, state: TrialState, **fields: Any) -> None:
        """Writes how a trial ended, unless it has ended already; `fields` are further fields of the trial."""
        if trial.is_live:
            self._write(trial, **fields, state=state)
            self._tell(trial)
            self._rank(trial)
        self._in_training.discard(trial.number)

    def next_promoted(self) -> tuple[Trial, int] | None:
        """Returns the next trial to promote and its rung, or None if no paused trial may continue.

        Higher rungs come first; within a rung, better trials come first.
        """
        for rung, kept in reversed(self._find_kept().items()):
            for *_, number in kept:
                trial = self.trials[number]
                if trial.state == "paused" and rung not in trial.passed:
                    return trial, rung
        return None

    @property
    def has_learned(self) -> bool:
        """Whether half of the trials at the first rung, or any trial after it, beat the constant answer.

        True too while few trials have arrived, and without a constant answer or rungs.
        """
        if self._order.constant_answer is None or not self._rule.rungs:
            return True
        first = self._rule.rungs[0]
        arrived = [self.trials[number] for *_, number in self._ranked[first]]
        unlearned = sum(self._order.has_learned_nothing(trial, first) for trial in arrived)
        later = (trial for trial in self.trials.values() if trial.step > first)
        return (
            len(arrived) < MIN_TRIALS_TO_WARN
            or unlearned <= len(arrived) / 2
            or any(not self._order.has_learned_nothing(trial, trial.step) for trial in later)
        )

    def describe_unlearned(self, metric: str) -> str:
        """Returns the warning for `has_learned` being False. It has no number that changes, so it is shown once."""
        remedies = ["more steps (`trainer.max_steps`)", "other learning rates (`optim.lr`)"]
        if metric in ("accuracy", "f1"):
            remedies.append("another metric (`data.metric=matthews`)")
        return (
            f"Most trials of `{self.arm.name}` had learned nothing at step {min(self._rule.rungs, default=0)}: their "
            f"{format_metric(metric)} was no better than that of an answer that needs no training "
            f"({format_score(self._order.constant_answer)}). If no later score is better, start a new sweep with "
            f"{join_words(remedies, last='or')}."
        )

    def _find_kept(self) -> dict[int, list[Row]]:
        """Returns by rung, ascending, the rows of the trials that may train beyond it, best first."""
        if self._kept is None:
            kept: dict[int, list[Row]] = {}
            for rung, ranked in self._ranked.items():
                all_arrived = self.num_left <= 0 and not self._may_arrive(rung, kept)
                kept[rung] = ranked[: self._rule.count_kept(ranked, all_arrived=all_arrived)]
            self._kept = kept
        return self._kept

    def _may_arrive(self, rung: int, kept: Mapping[int, list[Row]]) -> bool:
        """Returns whether a running or paused trial can still reach a rung; `kept` has all lower rungs."""
        for trial in self.trials.values():
            if trial.is_live and rung not in trial.values:
                waits_at = next((lower for lower in kept if lower in trial.values and lower not in trial.passed), None)
                if waits_at is None or self._is_kept(trial, waits_at, kept[waits_at]):
                    return True
        return False

    def _is_kept(self, trial: Trial, rung: int, kept: list[Row]) -> bool:
        row = self._rows.get((rung, trial.number))  # a failed trial has none
        return row is not None and bool(kept) and row <= kept[-1]

    def _rank(self, trial: Trial) -> None:
        """Updates the trial's rows in `_ranked`."""
        self._kept = None
        for rung, ranked in self._ranked.items():
            key = rung, trial.number
            if key in self._rows:
                del ranked[bisect_left(ranked, self._rows.pop(key))]
            if rung in trial.values and trial.state not in ("failed", "infeasible"):
                self._rows[key] = self._order.get_row(trial, rung)
                insort(ranked, self._rows[key])

    def _read(self, frozen: FrozenTrial, *, session: str | None) -> None:
        trial = self._build_trial(frozen.number, frozen.params)
        for name, value in frozen.user_attrs[TRIAL_ATTRIBUTE].items():
            setattr(trial, name, value)
        trial.losses = {int(rung): loss for rung, loss in trial.losses.items()}  # keys are text in JSON
        trial.values = dict(frozen.intermediate_values)
        self.trials[trial.number] = trial
        if not trial.is_live and not frozen.state.is_finished():  # a process was killed inside `end`
            self._tell(trial)
        if trial.state == "running" and session is not None and trial.worker.startswith(session):
            self._in_training.add(trial.number)
        self._rank(trial)

    def _tell(self, trial: Trial) -> None:
        """Tells the study that a trial has ended."""
        if trial.state == "infeasible":
            optuna.trial.Trial(self.study, self._find_id(trial)).set_constraint("memory", 1.0)
        value = trial.value if trial.state == "complete" else None
        self.study.tell(trial.number, value, state=OPTUNA_STATES[trial.state])

    def _write(self, trial: Trial, **changes: Any) -> None:
        """Changes fields of a trial: first in the journal, all with one write."""
        before = {name: getattr(trial, name) for name in KEPT_FIELDS}
        if (after := before | changes) != before:
            self._storage.set_trial_user_attr(self._find_id(trial), TRIAL_ATTRIBUTE, after)
            for name, value in changes.items():
                setattr(trial, name, value)
            self._kept = None

    def _find_id(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

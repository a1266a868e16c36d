"""The trials of one arm in one stage, which the arm's study keeps.

The study is the only store. A `Trial` is made from the study's trial: Optuna has the parameters, the intermediate
values and the final state, and one user attribute has the other fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.run import SEED_KEYS
from lorasweep.record import Stage, Trial, TrialState, name_run
from lorasweep.sweep.controller.encoding import OPTUNA_STATES
from lorasweep.sweep.controller.folder import SweepFolder, name_study
from lorasweep.sweep.definition.arms import Arm

TRIAL_ATTRIBUTE = "lorasweep"
"""User attribute of a study's trial with the fields `KEPT_FIELDS`. Trials that other programs added have none."""
KEPT_FIELDS = (
    *("state", "search_score", "test_scores", "reason"),
    *("order", "pack", "sampler_state"),
)
"""The fields of a trial that Optuna has no place for. They are written together, so that they always fit together."""
SETTING, SEED = "setting", "seed"
"""The parameters of a run in the study of the confirm stage: the number of its setting in the arm, and its seed."""
SETTINGS_ATTRIBUTE = "lorasweep:settings"
"""The study of an arm's confirm stage keeps here the parameters of each setting, by number."""


class ArmTrials:
    """The trials of one arm in one stage. Each change is written to the journal before it is made here."""

    def __init__(self, sweep: SweepFolder, arm: Arm, *, stage: Stage, planned: int) -> None:
        """Reads the arm's trials from the study. `planned` counts the trials that have ended too."""
        self.arm = arm
        self.stage = stage
        self.study = sweep.open_study(name_study(arm.name, stage))
        self.planned = planned
        self.trials: dict[int, Trial] = {}
        """The trials by number, ascending."""
        self.held: dict[int, str] = {}
        """The worker that trains each running trial now, by the trial's number. No running trial of a killed process is
        in it."""
        self._distributions = {key: range_.distribution for key, range_ in arm.space.items()}
        if stage == "confirm":
            self._distributions = dict.fromkeys((SETTING, SEED), IntDistribution(0, 2**32 - 1))
        self._record, self._storage = sweep.record, sweep.storage
        self._study_id = self._storage.get_study_id_from_name(self.study.study_name)
        for frozen in self.study.get_trials(deepcopy=False):
            if TRIAL_ATTRIBUTE in frozen.user_attrs:
                self._read(frozen)

    @property
    def num_left(self) -> int:
        """Number of trials that have not begun."""
        return self.planned - len(self.trials)

    @property
    def is_over(self) -> bool:
        return self.num_left <= 0 and not self.list_running()

    def list_running(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state == "running"]

    def begin(self, params: Mapping[str, Any], *, pack: str = "", **fields: Any) -> Trial:
        """Writes a new trial into the journal, and returns it. It is the first of a new pack if `pack` is empty.

        `fields`: `order` and `sampler_state` of the trial.
        """
        trial = self._build(self._storage.get_n_trials(self._study_id), params)
        for name, value in {**fields, "pack": pack or PurePath(trial.run).name}.items():
            setattr(trial, name, value)
        # with all parameters at once, so that a killed process never leaves a trial without some of them
        template = create_trial(
            state=OptunaState.RUNNING,
            params=dict(params),
            distributions=self._distributions,
            user_attrs={TRIAL_ATTRIBUTE: {name: getattr(trial, name) for name in KEPT_FIELDS}},
        )
        self._storage.create_new_trial(self._study_id, template_trial=template)
        self.trials[trial.number] = trial
        return trial

    def move(self, trial: Trial, pack: str) -> None:
        """Writes that a trial trains in another pack from now on."""
        self._write(trial, pack=pack)

    def store(self, trial: Trial, step: int, value: float) -> None:
        """Writes the metric of an evaluation. A resumed run may report an evaluation again."""
        if trial.state == "running" and trial.values.get(step) != value:
            self._storage.set_trial_intermediate_value(self._find_id(trial), step, value)
            trial.values[step] = value

    def end(self, trial: Trial, state: TrialState, **fields: Any) -> None:
        """Writes how a trial ended, unless it has ended already; `fields` are further fields of the trial."""
        if trial.state == "running":
            self._write(trial, **fields, state=state)
            self._tell(trial)
        self.held.pop(trial.number, None)

    def _build(self, number: int, params: Mapping[str, Any]) -> Trial:
        """Returns a trial from its number and its parameters in the study."""
        arm, stage, seed, setting_number = self.arm, self.stage, None, None
        if stage == "confirm":
            seed, setting_number = params[SEED], params[SETTING]
            params = self.study.user_attrs[SETTINGS_ATTRIBUTE][setting_number]
        return Trial(
            stage=stage,
            arm=arm.name,
            subject=arm.name_subject(params),
            number=number,
            params={name: value for name, value in params.items() if seed is None or name not in SEED_KEYS},
            setting_number=setting_number,
            seed=seed,
            run=name_run(stage, arm.name, number),
        )

    def _read(self, frozen: FrozenTrial) -> None:
        trial = self._build(frozen.number, frozen.params)
        for name in KEPT_FIELDS:
            setattr(trial, name, frozen.user_attrs[TRIAL_ATTRIBUTE][name])
        trial.values = dict(frozen.intermediate_values)
        self.trials[trial.number] = trial
        if trial.state != "running" and not frozen.state.is_finished():  # a process was killed inside `end`
            self._tell(trial)

    def _tell(self, trial: Trial) -> None:
        trial_id = self._find_id(trial)
        # a process that was killed in between may have set it, and Optuna warns of a second time
        if trial.state == "infeasible" and not self._storage.get_trial(trial_id).constraints:
            optuna.trial.Trial(self.study, trial_id).set_constraint("memory", 1.0)
        value = self._record.find_run_score(trial) if trial.state == "complete" else None
        self.study.tell(trial.number, value, state=OPTUNA_STATES[trial.state])

    def _write(self, trial: Trial, **changes: Any) -> None:
        """Changes fields of a trial: first in the journal, all with one write."""
        before = {name: getattr(trial, name) for name in KEPT_FIELDS}
        if (after := before | changes) != before:
            self._storage.set_trial_user_attr(self._find_id(trial), TRIAL_ATTRIBUTE, after)
            for name, value in changes.items():
                setattr(trial, name, value)

    def _find_id(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

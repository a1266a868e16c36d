"""The trials of an arm: when the next may begin, and how they are read again."""

import optuna
import pytest
from optuna.distributions import FloatDistribution
from tests.sweep.controller.conftest import make_arm

from lorasweep.config.sweep import SobolSampler
from lorasweep.record import Trial
from lorasweep.sweep.controller.arm_trials import ArmTrials

SPACE = {"optim.lr": FloatDistribution(0, 1)}


@pytest.fixture
def study():
    return optuna.create_study(storage=optuna.storages.InMemoryStorage(), study_name="lora")


def open_trials(study, *, planned, batch_size, session=None):
    return ArmTrials(
        make_arm(SPACE, SobolSampler(name="qmc")),
        study=study,
        storage=study._storage,
        space=SPACE,
        build_trial=lambda number, params: Trial(arm="lora", number=number, params=dict(params), run=""),
        planned=planned,
        find_batch_start=lambda number: number // batch_size * batch_size,
        session=session,
    )


def begin(trials, **fields):
    return trials.begin({"optim.lr": 0.5}, **fields)


@pytest.mark.parametrize("ended", ["complete", "stopped", "failed", "infeasible"])
def test_a_batch_begins_when_all_trials_of_earlier_batches_have_ended(study, ended):
    trials = open_trials(study, planned=5, batch_size=2)
    first, second = begin(trials), begin(trials)
    assert not trials.may_begin()
    trials.end(second, ended, value=1.0)
    assert not trials.may_begin()
    trials.end(first, "complete", value=1.0)
    assert trials.may_begin()
    third = begin(trials)
    assert trials.may_begin()  # the fourth belongs to the same batch
    trials.end(begin(trials), "complete", value=1.0)
    assert not trials.may_begin()
    trials.end(third, "complete", value=1.0)
    begin(trials)
    assert not trials.may_begin()  # none is left
    assert not trials.is_over


def test_trials_are_read_again_as_they_were(study):
    trials = open_trials(study, planned=6, batch_size=6, session="s")
    ended = [
        ("complete", {"value": 0.5}),
        ("stopped", {"value": 0.9, "reason": "has learned nothing"}),
        ("failed", {"reason": "diverged"}),
        ("infeasible", {}),
    ]
    for number, (state, fields) in enumerate(ended):
        trial = begin(trials, order=number, worker="s-1", request=number)
        trials.store(trial, 3, 0.25)
        trials.end(trial, state, **fields)
    held, released = (begin(trials, worker=f"s-{number}") for number in (1, 2))
    trials.release(released)
    again = open_trials(study, planned=6, batch_size=6, session="s")
    assert list(again.trials.values()) == list(trials.trials.values())
    assert again.list_running() == [held, released]
    assert again.list_held_by("s-1") == [held]
    assert not again.is_in_training(released)


def test_an_ended_trial_stays_as_it_ended(study):
    trials = open_trials(study, planned=1, batch_size=1)
    trial = begin(trials)
    trials.end(trial, "stopped", value=0.9)
    trials.store(trial, 7, 0.1)  # a resumed process reports once more
    trials.end(trial, "complete", value=0.1)
    assert (trial.state, trial.value, trial.values) == ("stopped", 0.9, {})

"""What TPE sees of a long study, and that up to that length it is Optuna's own."""

from __future__ import annotations

import random

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.trial import FrozenTrial, TrialState, create_trial

from lorasweep.sweep import window
from lorasweep.sweep.window import GOOD_TRIALS, MOST_TRIALS, WindowedTPE, find_good, see_window

SPACE = {"method.rank": CategoricalDistribution([1, 4, 16]), "optim.lr": FloatDistribution(1e-4, 1e-1, log=True)}
PRUNED = (TrialState.PRUNED, TrialState.FAIL)
STATES = (TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def draw_trial(rng: random.Random, state: TrialState) -> FrozenTrial:
    infeasible = state == TrialState.PRUNED and rng.random() < 0.2
    return create_trial(
        state=state,
        params={"method.rank": rng.choice([1, 4, 16]), "optim.lr": 10 ** rng.uniform(-4, -1)},
        distributions=SPACE,
        value=rng.random() if state == TrialState.COMPLETE else None,
        intermediate_values={step: rng.random() for step in range(0, rng.randrange(0, 80, 20), 20)},
        constraints={"memory": rng.random()} if infeasible else None,
    )


def fill(num_trials: int, *, states: tuple[TrialState, ...] = STATES, direction: str = "minimize") -> optuna.Study:
    rng = random.Random(0)
    study = optuna.create_study(direction=direction)
    study.add_trials([draw_trial(rng, states[number % len(states)]) for number in range(num_trials)])
    return study


def propose(study: optuna.Study, sampler: optuna.samplers.BaseSampler) -> dict[str, float]:
    study.sampler = sampler
    trial = study.ask(SPACE)
    study.tell(trial, state=TrialState.FAIL)
    return trial.params


@pytest.mark.parametrize("num_trials", [0, 9, 60, 300])
def test_up_to_so_many_trials_it_proposes_what_optuna_does(num_trials):
    study = fill(num_trials)
    for seed in range(5):
        assert propose(study, WindowedTPE(seed=seed)) == propose(study, TPESampler(seed=seed))


def test_a_study_that_is_not_too_long_is_seen_as_it_is():
    study = fill(50)
    assert see_window(study, most=30) is study, "30 of the 50 trials ended"
    assert see_window(study, most=29) is not study


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("states", [STATES, PRUNED, (*PRUNED * 20, *STATES)])
def test_the_good_trials_are_those_that_optuna_finds_in_the_whole_study(direction, states):
    study = fill(400, states=states, direction=direction)
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    good, _ = _split_trials(study, ended, GOOD_TRIALS)
    found = find_good(ended, maximize=direction == "maximize")
    assert sorted(trial.number for trial in found) == [trial.number for trial in good]
    seen = see_window(study, most=100)._get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    assert _split_trials(study, seen, GOOD_TRIALS)[0] == good


def test_optuna_takes_no_more_good_trials_than_are_kept():
    assert max(default_gamma(num_trials) for num_trials in range(20_000)) == GOOD_TRIALS
    assert default_gamma(MOST_TRIALS) == GOOD_TRIALS


def test_the_others_are_the_newest_and_all_that_run():
    study = fill(500)
    seen = see_window(study, most=60)._get_trials()
    ended = [trial for trial in seen if trial.state.is_finished()]
    running = [trial for trial in seen if trial.state == TrialState.RUNNING]
    assert len(ended) == 60
    assert len(running) == 100
    assert not [trial for trial in seen if trial.state == TrialState.FAIL]
    assert [trial.number for trial in seen] == sorted(trial.number for trial in seen)
    newest = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))[-30:]
    assert {trial.number for trial in newest} <= {trial.number for trial in ended}


def test_a_long_study_is_sampled_by_what_is_seen_of_it(monkeypatch):
    """Its proposals are those of Optuna's TPE in a study of these trials alone."""
    monkeypatch.setattr(window, "MOST_TRIALS", 100)
    long = fill(400, states=(TrialState.COMPLETE, TrialState.PRUNED))
    short = optuna.create_study()
    short.add_trials(see_window(long, most=100)._get_trials())
    for seed in range(5):
        assert propose(long, WindowedTPE(seed=seed)) == propose(short, TPESampler(seed=seed))


def test_a_start_at_random_that_is_longer_than_the_window_ends(monkeypatch):
    monkeypatch.setattr(window, "MOST_TRIALS", 50)
    study = fill(120, states=(TrialState.COMPLETE,))
    at_random = TPESampler(seed=3, n_startup_trials=1000)
    assert propose(study, WindowedTPE(seed=3, n_startup_trials=100)) != propose(study, at_random)

"""The trials of an arm are read again as they were."""

from types import SimpleNamespace

import optuna
import pytest
from tests.sweep.controller.conftest import make_arm

from lorasweep.config.sweep import NamedSampler
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.definition.ranges import Range

ARM = make_arm({"optim.lr": Range(low=0, high=1)}, NamedSampler(name="tpe"), trials=6)


@pytest.fixture
def read():
    """Reads the trials of the arm from a storage in memory."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="lora")
    record = SimpleNamespace(find_run_score=lambda trial: trial.search_score)
    sweep = SimpleNamespace(record=record, storage=storage, open_study=lambda name: study)
    return lambda: ArmTrials(sweep, ARM, stage="search", planned=ARM.trials)


def begin(trials, **fields):
    return trials.begin({"optim.lr": 0.5}, **fields)


def test_trials_are_read_again_as_they_were(read):
    trials = read()
    ended = [
        ("complete", {"search_score": 0.5}),
        ("stopped", {"search_score": 0.9, "reason": "has learned nothing"}),
        ("failed", {"reason": "diverged"}),
        ("infeasible", {}),
    ]
    for number, (state, fields) in enumerate(ended):
        trial = begin(trials, order=number)
        trials.store(trial, 3, 0.25)
        trials.end(trial, state, **fields)
        trials.store(trial, 7, 0.1)  # a resumed process reports once more
        trials.end(trial, "complete", search_score=0.1)
    running = [begin(trials), begin(trials, pack="lora-0004")]
    assert [trial.pack for trial in running] == ["lora-0004", "lora-0004"]
    trials.held = {trial.number: "1" for trial in running}
    again = read()
    assert list(again.trials.values()) == list(trials.trials.values())
    assert [(trial.state, trial.values) for trial in again.trials.values()][:4] == [(s, {3: 0.25}) for s, _ in ended]
    assert again.list_running() == running
    assert again.held == {}  # their workers have ended

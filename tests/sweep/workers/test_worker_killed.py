"""A worker that is killed anywhere, alone or in packs, ends with the sweep that was not."""

import itertools
from contextlib import suppress

import optuna
import pytest
from tests.sweep.conftest import UNTRAINED, Killed, kill_at

from lorasweep.errors import OutOfMemory
from lorasweep.record import read_run, read_sweep
from lorasweep.sweep.controller.folder import open_storage
from lorasweep.sweep.controller.lifecycle import reopen_sweep


@pytest.fixture
def killed(content):
    """Two arms with a confirm stage of more seeds than a pack has slots."""
    del content["arms"]["frozen"]
    content["arms"]["full"]["trials"] = 2
    content["settings"] |= {"confirm.seeds": 5}
    return content


def table_of(path):
    """Every run of every stage: what was proposed, what became of it, and its record."""
    record = read_sweep(path)
    assert record.status == "complete"
    rows = [(row.arm, row.number, row.params, row.state, row.value, row.reason) for row in record.trials]
    reruns = record.confirm
    rows += [(row.subject, row.setting_number, row.seed, row.state, row.value, row.reason) for row in reruns]
    runs = [read_run(path / row.run) for row in (*record.trials, *reruns)]
    states = [(run.status, run.best, run.steps_done, run.test) for run in runs]
    return rows, states, record.settings, record.looks_done


TABLES = {}
"""The table of the sweep that nobody kills, by the size of its packs."""


@pytest.fixture
def whole(begin, work, killed, runs, packs):
    """Returns the table of the sweep that nobody kills, for a size of packs."""

    def run(pack_size):
        if pack_size in TABLES:
            return TABLES[pack_size]
        folder = begin(killed, f"worker.pack_size={pack_size}", folder="whole", constant_answer=UNTRAINED)
        assert work(folder)
        found = table_of(folder.path)
        assert {state for _, _, _, state, *_ in found[0]} == {"complete", "stopped"}
        runs.scored.clear()
        TABLES[pack_size] = found
        return found

    return run


def spread(cases, fast):
    """Returns the cases; all but the fast ones are slow tests."""
    return [
        case if case in fast else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize("pack_size", [1, 3])
@pytest.mark.parametrize("every", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5, 11))])
def test_a_worker_killed_in_the_middle_of_runs_again_and_again(
    begin, work, killed, runs, packs, whole, pack_size, every
):
    expected = whole(pack_size)
    folder = begin(killed, f"worker.pack_size={pack_size}", folder="killed", constant_answer=UNTRAINED)
    true_score, evaluations, sessions = runs.score, [0], 1

    def score(config, step):
        evaluations[0] += 1
        if evaluations[0] % every == 0:  # a pack of three comes to its next boundary in between
            raise Killed
        return true_score(config, step)

    runs.score = score
    complete = False
    while not complete:
        try:
            complete = work(folder)
        except Killed:
            sessions += 1
            folder = reopen_sweep(folder.path)
    assert sessions > 2
    assert table_of(folder.path) == expected
    assert len(runs.scored) == len(set(runs.scored)) == 10


@pytest.mark.parametrize("pack_size", [1, 3])
@pytest.mark.parametrize(
    ("count", "after"), spread(itertools.product(range(1, 140, 15), [False, True]), {(31, False), (61, True)})
)
def test_a_worker_killed_at_any_write_to_the_journal(
    begin, work, killed, runs, packs, whole, monkeypatch, pack_size, after, count
):
    expected = whole(pack_size)
    folder = begin(killed, f"worker.pack_size={pack_size}", folder="killed", constant_answer=UNTRAINED)
    kill_at(monkeypatch, folder.storage, count, after=after)
    try:
        work(folder)
    except Killed:
        assert work(reopen_sweep(folder.path))
    assert table_of(folder.path) == expected
    assert len(runs.scored) == len(set(runs.scored)) == 10


@pytest.mark.parametrize("pack_size", [1, 3])
@pytest.mark.parametrize("count", spread(range(1, 18, 4), {9}))
def test_a_worker_killed_at_any_write_of_a_runs_record(
    begin, work, killed, runs, packs, whole, monkeypatch, pack_size, count
):
    expected = whole(pack_size)
    folder = begin(killed, f"worker.pack_size={pack_size}", folder="killed", constant_answer=UNTRAINED)
    true_close, left = runs.close, [count]

    def close(*arguments, **named):
        record = true_close(*arguments, **named)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return record

    monkeypatch.setattr(runs, "close", close)
    with pytest.raises(Killed):
        work(folder)
    assert work(reopen_sweep(folder.path))
    assert table_of(folder.path) == expected
    assert len(runs.scored) == len(set(runs.scored)) == 10


@pytest.mark.parametrize("error", [OutOfMemory("2 GiB"), KeyError("bug")])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("back", [1, 5])
def test_a_worker_killed_while_it_tells_of_a_failure_leaves_no_trial_half_told(
    begin, work, killed, runs, monkeypatch, error, after, back
):
    killed["settings"] |= {"confirm.seeds": 0, "sweep.max_failures": 100, "worker.pack_size": 1}
    del killed["arms"]["full"]
    killed["arms"]["lora"]["trials"] = 3

    def score(config, step):
        if config.method.rank == 4:
            raise error
        return config.optim.lr

    runs.score = score
    whole = begin(killed, folder="whole")
    assert work(whole)
    expected = [(row.params, row.state, row.value, row.reason) for row in read_sweep(whole.path).trials]
    assert {"failed", "infeasible"} & {state for _, state, _, _ in expected}
    folder = begin(killed, folder="killed")
    kill_at(monkeypatch, folder.storage, back, after=after)
    with suppress(Killed):
        work(folder)
    assert work(reopen_sweep(folder.path))
    assert [(row.params, row.state, row.value, row.reason) for row in read_sweep(folder.path).trials] == expected
    trials = optuna.load_study(study_name="lora", storage=open_storage(folder.path))
    assert all(trial.state.is_finished() for trial in trials.get_trials())
    told = [trial.constraints for trial in trials.get_trials()]
    assert told == [{"memory": 1.0} if state == "infeasible" else {} for _, state, _, _ in expected]

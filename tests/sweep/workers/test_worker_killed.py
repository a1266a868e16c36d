"""A worker that is killed anywhere, alone or in packs, ends with the sweep that was not."""

import pytest
from optuna.storages import JournalStorage
from tests.sweep.conftest import UNTRAINED, Killed

import lorasweep.sweep.workers.worker as worker_file
from lorasweep.record import read_run, read_sweep
from lorasweep.sweep.controller.lifecycle import reopen_sweep

WRITES = ("create_new_trial", "set_trial_user_attr", "set_trial_intermediate_value", "set_trial_state_values")


@pytest.fixture
def work_killed(work, runs, monkeypatch):
    """Runs an open sweep to its end, and kills the worker at every n-th moment.

    Moments are before and after each write to the journal, before each evaluation, after each record of a run, and
    before and after a checkpoint is split.
    """

    def run(folder, *, every):
        moments, sessions = [0], 1

        def pass_moment():
            moments[0] += 1
            if moments[0] % every == 0:
                raise Killed

        def surround(call, *, before=True, after=True):
            def wrapped(*arguments, **named):
                if before:
                    pass_moment()
                result = call(*arguments, **named)
                if after:
                    pass_moment()
                return result

            return wrapped

        with monkeypatch.context() as patch:
            for name in WRITES:
                patch.setattr(JournalStorage, name, surround(getattr(JournalStorage, name)))
            patch.setattr(runs, "score", surround(runs.score, after=False))
            patch.setattr(runs, "close", surround(runs.close, before=False))
            patch.setattr(worker_file, "split_checkpoint", surround(runs.split_checkpoint))
            while True:
                try:
                    assert work(folder)
                    break
                except Killed:
                    sessions += 1
                    folder = reopen_sweep(folder.path)
        assert sessions > 3

    return run


def table_of(path):
    """Every run of every stage: what was proposed, what became of it, and its record."""
    record = read_sweep(path)
    assert record.status == "complete"
    rows = [(row.arm, row.number, row.params, row.state, row.search_score, row.reason) for row in record.trials]
    rows += [
        (row.subject, row.setting_number, row.seed, row.state, row.test_scores, row.reason) for row in record.confirm
    ]
    runs = [read_run(path / row.run) for row in (*record.trials, *record.confirm)]
    states = [(run.status, run.best, run.steps_done, run.test) for run in runs]
    return rows, states, record.settings, record.looks_done


@pytest.mark.parametrize("pack_size", [1, 3])
@pytest.mark.parametrize("every", [31, *(pytest.param(n, marks=pytest.mark.soak) for n in (13, 19))])
def test_a_worker_killed_at_any_moment_ends_with_the_sweep_that_was_not(
    begin, work, work_killed, content, runs, pack_size, every
):
    """Two arms whose sampler learns, with a confirm stage of more seeds than a pack has slots."""
    del content["arms"]["frozen"]
    content["arms"]["full"]["trials"] = 2
    content["settings"] |= {"confirm.seeds": 5, "worker.pack_size": pack_size}
    whole, killed = (begin(content, folder=name, constant_answer=UNTRAINED) for name in ("whole", "killed"))
    assert work(whole)
    expected = table_of(whole.path)
    assert {state for _, _, _, state, *_ in expected[0]} == {"complete", "stopped"}
    runs.scored.clear()
    work_killed(killed, every=every)
    assert table_of(killed.path) == expected
    assert len(runs.scored) == len(set(runs.scored)) == 10

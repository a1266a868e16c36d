"""The confirm stage trains in planned looks: it stops as soon as its questions are settled, whatever happens."""

import random
from dataclasses import asdict

import pytest
from tests.sweep.conftest import Killed
from tests.sweep.controller.conftest import Simulation

import lorasweep.sweep.controller.stages as stages_file
from lorasweep.record import read_run, read_sweep
from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.lifecycle import reopen_sweep

LOOKS = [3, 5, 8]
NOISE = 0.12
MEANS = {1: 2.5, 2: 2.0, 4: 2.0}
SUBJECTS = ["frozen", "full", "lora-rank-1", "lora-rank-2", "lora-rank-4"]


@pytest.fixture
def asking(three_arms):
    """A sweep that asks for each rank, with three looks."""
    three_arms["settings"] |= {"confirm.seeds": LOOKS}
    three_arms["arms"]["lora"] |= {"confirm_each": "method.rank"}
    return three_arms


def score_config(config, *, noisy=()):
    """A test score: the base has 3, full fine-tuning 2; the score of noisy ranks depends on the seed."""
    method, seed = config["method"], config["seed"]
    if method["name"] != "lora":
        return 3.0 if method["name"] == "frozen" else 2.0 + seed % 7 / 1e5
    noise = NOISE if method["rank"] in noisy else 1e-5
    return MEANS[method["rank"]] + noise * ((seed * 7919) % 101 / 100 - 0.5)


def set_scores(runs, *, noisy=()):
    runs.score_on_test = lambda record: score_config(record.config, noisy=noisy)


def count_seeds(path):
    names = [row.subject for row in read_sweep(path).confirm]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def outcome(path):
    record = read_sweep(path)
    assert record.status == "complete"
    rows = [(row.subject, row.setting_number, row.seed, row.state, row.run, row.test_scores) for row in record.confirm]
    return rows, record.settings, record.questions, record.looks, record.looks_done


def test_a_first_look_that_settles_everything_is_the_last_one_until_more_seeds_are_asked_for(begin, work, runs, asking):
    set_scores(runs)
    folder = begin(asking)
    assert work(folder)
    assert count_seeds(folder.path) == {name: 1 if name == "frozen" else 3 for name in SUBJECTS}
    (look,) = read_sweep(folder.path).looks_done
    assert (look.seeds, look.open, look.is_last) == (3, [], True)
    before, begun = outcome(folder.path), len(runs.begun)
    assert work(reopen_sweep(folder.path))
    assert (outcome(folder.path), len(runs.begun)) == (before, begun)
    before = read_sweep(folder.path)
    assert before.late_growth == []
    assert work(reopen_sweep(folder.path, changes={"confirm.seeds": 10}))
    record = read_sweep(folder.path)
    assert record.looks == [3, 10]
    assert count_seeds(folder.path) == {name: 1 if name == "frozen" else 10 for name in SUBJECTS}
    assert record.confirm_seeds[: len(before.confirm_seeds)] == before.confirm_seeds
    assert work(reopen_sweep(folder.path))
    assert read_sweep(folder.path).late_growth == ["seeds"]


def test_all_subjects_train_on_while_a_question_is_open(begin, work, runs, asking):
    set_scores(runs, noisy=[2])
    folder = begin(asking)
    assert work(folder)
    record = read_sweep(folder.path)
    assert (record.looks_done[0].open, record.looks_done[0].is_last) == (["lora-rank-2"], False)
    counts, last = count_seeds(folder.path), record.looks_done[-1].seeds
    assert last in LOOKS[1:]
    assert counts == {name: 1 if name == "frozen" else last for name in SUBJECTS}
    for name, count in counts.items():
        assert [row.seed for row in record.confirm if row.subject == name] == record.confirm_seeds[:count]


def test_the_last_look_ends_the_stage_whatever_is_open_and_each_subject_has_its_setting(begin, work, runs, asking):
    set_scores(runs, noisy=[1, 2, 4])
    folder = begin(asking, "confirm.seeds=[2,3]")
    assert work(folder)
    record = read_sweep(folder.path)
    assert [look.seeds for look in record.looks_done] == [2, 3]
    assert record.looks_done[-1].open
    assert record.looks_done[-1].is_last
    assert [row.subject for row in record.settings] == SUBJECTS
    trials = {(row.arm, row.number): row for row in record.trials}
    for row in record.settings:
        if row.trial is not None:
            trial = trials[row.arm, row.trial]
            assert (trial.state, trial.params) == ("complete", row.params)
        if row.arm == "lora":
            assert row.subject == f"lora-rank-{row.params['method.rank']}"
            assert 1e-3 <= row.params["optim.lr"] <= 1e-1
            assert row.regret >= 0
        for run in record.confirm:
            if run.subject == row.subject:
                config = runs.configs[folder.path / run.run]
                assert getattr(config.method, "rank", None) == row.params.get("method.rank")
                assert config.optim.lr == row.params.get("optim.lr", config.optim.lr)
                assert {config.seed, config.seeds.init, config.seeds.data_order} == {run.seed}
                assert read_run(folder.path / run.run).test


def test_a_base_with_a_new_head_runs_on_every_seed(begin, work, runs, asking, monkeypatch):
    monkeypatch.setattr(stages_file, "has_fixed_score", lambda arm: False)
    set_scores(runs)
    folder = begin(asking)
    assert work(folder)
    assert count_seeds(folder.path) == dict.fromkeys(SUBJECTS, 3)


def test_neither_a_kill_in_a_later_look_nor_the_order_of_runs_changes_a_decision(begin, work, runs, asking):
    set_scores(runs, noisy=[2])
    whole, killed, unordered = (begin(asking, folder=name) for name in ("whole", "killed", "unordered"))
    assert work(whole)
    num_first = sum(1 if name == "frozen" else 3 for name in SUBJECTS)

    def score(record):
        if len(runs.scored) == total + num_first + 4:
            raise Killed
        return score_config(record.config, noisy=[2])

    total, runs.score_on_test = len(runs.scored), score
    with pytest.raises(Killed):
        work(killed)
    assert len(read_sweep(killed.path).looks_done) < len(read_sweep(whole.path).looks_done)
    set_scores(runs, noisy=[2])
    assert work(reopen_sweep(killed.path))
    assert outcome(killed.path) == outcome(whole.path)
    controller = Controller(unordered)
    simulation = Simulation(controller, slots=3, workers=3, pick=random.Random(0))
    simulation.score = lambda assignment, step: runs.score(assignment.config, step)
    simulation.score_on_test = lambda assignment: score_config(asdict(assignment.config), noisy=[2])
    simulation.run()
    assert controller.finish()
    unordered.close()
    rows, *decisions = outcome(unordered.path)
    expected_rows, *expected = outcome(whole.path)
    assert (sorted(rows), decisions) == (sorted(expected_rows), expected)

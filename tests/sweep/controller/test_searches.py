"""`sweep.searches=N` searches every arm N times. Each search is what a sweep of one search with its seeds finds."""

from __future__ import annotations

from collections import Counter

import optuna
import pytest
from tests.sweep.controller.conftest import LAST, Simulation

from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import read_sweep
from lorasweep.results import load_sweep
from lorasweep.selection import list_candidates
from lorasweep.sweep.controller.lifecycle import reopen_sweep
from lorasweep.sweep.controller.stages import list_trial_rows

HALVING = {"pruner": "halving", "pruner.rungs": [0.5], "pruner.min_survivors": 1, "sampler": "qmc"}


@pytest.fixture
def halved(three_arms, runs):
    """A sweep whose rungs pause trials and whose scores depend on the run's seed."""
    three_arms["settings"] |= HALVING
    three_arms["arms"]["lora"]["trials"] = 4
    del three_arms["arms"]["full"]
    runs.score = lambda config, step: abs(config.optim.lr - 0.01) + 1 / (1 + step) + config.seed % 7 / 1000
    return three_arms


def rows_of(path, *, search=None):
    """Returns what was proposed, decided and scored, of all searches or of one; numbers start at 0."""
    rows = [row for row in read_sweep(path).trials if search in (None, row.search)]
    first = {row.arm: min(each.number for each in rows if each.arm == row.arm) for row in rows}
    return [
        (row.arm, row.number - first[row.arm], row.state, row.params, row.value, row.step, row.last_value)
        for row in rows
    ]


def without_frozen(rows):
    return [row for row in rows if row[0] != "frozen"]


@pytest.mark.parametrize("pack_size", [1, 2])
def test_each_search_is_what_a_sweep_with_its_seeds_finds(begin, work, packs, halved, pack_size):
    halved["settings"]["sampler"] = "tpe"
    size = f"worker.pack_size={pack_size}"
    twice, once = begin(halved, "sweep.searches=2", size, folder="twice"), begin(halved, size, folder="once")
    assert work(twice)
    assert work(once)
    assert rows_of(twice.path, search=1) == rows_of(once.path)
    (seed,) = twice.record.search_seeds
    alone = begin(halved, f"sweep.seed={seed}", f"seed={seed}", size, folder="alone")
    assert work(alone)
    assert rows_of(twice.path, search=2) == without_frozen(rows_of(alone.path))
    assert rows_of(twice.path, search=2) != without_frozen(rows_of(once.path))
    assert {row.state for row in twice.record.trials} == {"complete", "pruned"}


def test_trials_of_all_searches_are_numbered_through_and_have_runs_of_their_own(begin, work, runs, halved):
    folder = begin(halved, "sweep.searches=3")
    assert work(folder)
    record = read_sweep(folder.path)
    lora = [row for row in record.trials if row.arm == "lora"]
    assert [(row.number, row.search, row.run) for row in lora] == [
        (number, 1 + number // 4, f"runs/lora-{number:04d}") for number in range(12)
    ]
    assert Counter(row.arm for row in record.trials) == {arm.name: arm.trials for arm in record.arms}
    assert {arm.name: arm.trials for arm in record.arms} == {"frozen": 1, "lora": 12}
    seeds = {row.search: runs.configs[folder.path / row.run].seed for row in lora}
    assert [*seeds.values()] == [0, *record.search_seeds]
    assert len(set(seeds.values())) == 3
    result = load_sweep(folder.path)
    assert [trial.params for trial in result.study("lora", search=2).trials] == [row.params for row in lora[4:8]]
    assert list(result.trials_dataframe()["search"]) == [row.search for row in record.trials]
    assert [trial.search for trial in result.trials] == [row.search for row in record.trials]
    with pytest.raises(RecordError, match=r"has no study `lora/search-4`"):
        result.study("lora", search=4)


def test_a_trial_that_somebody_else_added_takes_no_number_of_the_next_search(begin, work, runs, halved):
    folder = begin(halved, "sweep.searches=2")
    folder.open_study("lora").ask({"optim.lr": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True)})
    folder.close()
    assert work(reopen_sweep(folder.path))
    lora = [row for row in read_sweep(folder.path).trials if row.arm == "lora"]
    assert [row.number for row in lora] == list(range(1, 9))
    assert len({row.run for row in lora}) == 8


@pytest.mark.parametrize("pack_size", [1, 2])
def test_a_sweep_stopped_again_and_again_ends_as_if_it_was_not(begin, work, packs, halved, finish, pack_size):
    overrides = ("sweep.searches=2", "confirm.seeds=1", f"worker.pack_size={pack_size}")
    whole, stopped = begin(halved, *overrides, folder="whole"), begin(halved, *overrides, folder="stopped")
    assert work(whole)
    assert not work(stopped, stop_at=3)
    assert finish(stopped.path, stop_at=5) > 2
    assert read_sweep(stopped.path).trials == read_sweep(whole.path).trials
    assert read_sweep(stopped.path).confirm == read_sweep(whole.path).confirm


def test_searches_added_later_are_those_of_a_sweep_that_had_them_from_the_start(begin, work, runs, halved):
    folder, whole = begin(halved, folder="sweep"), begin(halved, "sweep.searches=3", folder="whole")
    assert work(whole)
    assert work(folder)
    for count in (2, 3):
        assert work(reopen_sweep(folder.path, changes={"sweep.searches": count}))
        assert max(row.search for row in read_sweep(folder.path).trials) == count
    assert read_sweep(folder.path).trials == read_sweep(whole.path).trials
    assert read_sweep(folder.path).arms == read_sweep(whole.path).arms


def test_fewer_searches_or_more_after_the_winner_is_chosen_are_refused(begin, work, runs, halved):
    folder = begin(halved, "sweep.searches=2", "confirm.seeds=2")
    assert work(folder)
    for count, said in ((1, r"`sweep.searches >= 2` must hold"), (3, r"`sweep.searches` must stay 2 .* but got 3\.")):
        with pytest.raises(ConfigError, match=said):
            reopen_sweep(folder.path, changes={"sweep.searches": count})
    reopen_sweep(folder.path).close()


def test_the_best_trials_of_all_searches_together_are_the_candidates(begin, work, runs, halved):
    # The second search is better, because its seed is not 0.
    runs.score = lambda config, step: abs(config.optim.lr - 0.01) + 1 / (1 + step) - (config.seed > 0) / 100
    folder = begin(halved, "sweep.searches=2", "confirm.seeds=2", "confirm.candidates=3", "confirm.select_seeds=1")
    assert work(folder)
    record = read_sweep(folder.path)
    lora = [row for row in record.trials if row.arm == "lora"]
    candidates = list_candidates(lora, record=record)
    assert candidates[0].search == 2
    assert {row.search for row in candidates} == {1, 2}
    assert {row.trial for row in record.select} == {row.number for row in candidates}
    (winner,) = {row.trial for row in record.confirm if row.arm == "lora"}
    assert winner == min(record.select, key=lambda row: row.value).trial
    used = [*record.search_seeds, *record.select_seeds, *record.confirm_seeds, 0]
    assert len(used) == len(set(used))


def test_seeds_of_later_stages_do_not_depend_on_the_number_of_searches(begin, three_arms):
    records = []
    for count in (1, 2, 3):
        folder = begin(
            three_arms, f"sweep.searches={count}", "confirm.seeds=3", "confirm.candidates=2", folder=f"{count}"
        )
        folder.close()
        records.append(folder.record)
    assert len({(*record.select_seeds, *record.confirm_seeds) for record in records}) == 1
    assert [len(record.search_seeds) for record in records] == [0, 1, 2]
    assert records[2].search_seeds[:1] == records[1].search_seeds


def test_a_grid_is_repeated_with_other_run_seeds(begin, work, runs, halved):
    halved["settings"] |= {"sampler": "grid", "pruner": "none"}
    del halved["settings"]["pruner.rungs"], halved["settings"]["pruner.min_survivors"]
    halved["arms"]["lora"] |= {"space": {"method.rank": [1, 2], "optim.lr": [0.01, 0.02]}}
    folder = begin(halved, "sweep.searches=2")
    assert work(folder)
    first, second = (rows_of(folder.path, search=search) for search in (1, 2))
    settings = [sorted((row[3]["method.rank"], row[3]["optim.lr"]) for row in rows[-4:]) for rows in (first, second)]
    assert settings[0] == settings[1]
    assert {row[4] for row in first}.isdisjoint(row[4] for row in second)


def test_a_swept_seed_stays_swept_in_every_search(begin, work, runs, three_arms):
    three_arms["arms"]["lora"]["space"]["seed"] = [11, 12, 13]
    three_arms["settings"]["seeds"] = {"init": 1, "data_order": 2, "dropout": 3}
    folder = begin(three_arms, "sweep.searches=2")
    assert work(folder)
    for row in read_sweep(folder.path).trials:
        seeds, seed = runs.configs[folder.path / row.run].seeds, runs.configs[folder.path / row.run].seed
        if row.arm == "lora":
            assert seed == row.params["seed"]
        found = (seeds.init, seeds.data_order, seeds.dropout)
        assert found == ((1, 2, 3) if row.search == 1 else (seed, seed, seed))


def test_a_result_of_an_earlier_search_that_is_told_twice_ends_no_trial_of_the_next(begin, open_controller, content):
    content["arms"]["lora"]["trials"] = 1
    controller = open_controller(begin(content, "sweep.searches=2"))
    simulation = Simulation(controller)
    first = controller.take(worker="w", request=1)
    record = simulation.record(first, LAST, "complete")
    controller.tell(first, record)
    second = controller.take(worker="w", request=2)
    assert (first.number, first.stage, second.number, second.stage) == (0, "search", 0, "search-2")
    controller.tell(first, record)  # the worker repeats a call whose answer was lost
    assert [row.state for row in list_trial_rows(controller.searches, "lora")] == ["complete", "running"]
    controller.tell(second, simulation.record(second, LAST, "complete"))
    assert controller.take(worker="w", request=3) is None
    assert controller.is_over()
    controller.sweep.close()

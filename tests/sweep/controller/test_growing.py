"""A sweep that has begun may grow: its trials stay, and what is added follows from its record alone."""

import pytest
from tests.files import read_files

from lorasweep.errors import ConfigError
from lorasweep.record import read_sweep
from lorasweep.results import load_sweep
from lorasweep.sweep.controller.lifecycle import reopen_sweep

MORE = {"arms.lora.trials": 10}
NEW_ARM = {"settings": {"method": "lora", "method.rank": 2}, "space": {"optim.lr": [0.01, 0.02, 0.05]}, "trials": 3}


@pytest.fixture
def small(three_arms, runs):
    """A sweep whose sampler learns, and whose scores depend on the run's seed."""
    three_arms["settings"] |= {"sampler": "tpe"}
    del three_arms["arms"]["full"]
    runs.score = lambda config, step: abs(config.optim.lr - 0.01) + 1 / (1 + step) + config.seed % 7 / 1000
    return three_arms


@pytest.fixture
def confirming(small):
    small["settings"] |= {"confirm.seeds": 2}
    return small


def rows_of(path, stage="trials"):
    return getattr(read_sweep(path), stage)


def lora(rows):
    return [row for row in rows if row.arm == "lora"]


@pytest.mark.parametrize("stop_at", [3, None])
def test_a_grown_sweep_keeps_its_trials(begin, work, packs, small, stop_at):
    folder = begin(small, "worker.pack_size=3")
    assert work(folder, stop_at=stop_at) is (stop_at is None)
    before = [row for row in rows_of(folder.path) if row.state != "running"]
    assert work(reopen_sweep(folder.path, changes=MORE))
    assert [row for row in rows_of(folder.path) if row in before] == before
    assert [row.number for row in lora(rows_of(folder.path))] == list(range(10))
    assert {row.state for row in lora(rows_of(folder.path))[6:]} == {"complete"}
    assert {arm.name: arm.trials for arm in rows_of(folder.path, "arms")} == {"frozen": 1, "lora": 10}


@pytest.mark.parametrize("pack_size", [1, 3])
def test_a_grown_sweep_that_is_stopped_again_and_again_ends_as_if_it_was_not(
    begin, work, packs, confirming, finish, pack_size
):
    folders = [begin(confirming, f"worker.pack_size={pack_size}", folder=name) for name in ("whole", "stopped")]
    for folder in folders:
        assert work(folder)
    assert work(reopen_sweep(folders[0].path, changes=MORE))
    assert not work(reopen_sweep(folders[1].path, changes=MORE), stop_at=2)
    assert finish(folders[1].path, stop_at=4) > 2
    for stage in ("trials", "confirm"):
        assert rows_of(folders[1].path, stage) == rows_of(folders[0].path, stage)


def test_a_new_winner_is_chosen_and_confirmed_on_the_same_seeds_and_runs_of_the_former_one_stay(
    begin, work, runs, confirming
):
    folder = begin(confirming)
    assert work(folder)
    before = read_sweep(folder.path)
    best = load_sweep(folder.path).best("lora").number
    runs.score = lambda config, step: 1 / (1 + step)  # all trials that are added are better
    assert work(reopen_sweep(folder.path, changes=MORE))
    record = read_sweep(folder.path)
    winner = load_sweep(folder.path).best("lora")
    assert winner.number >= 6 > best
    assert {row.seed for row in record.confirm_runs if row.subject == "lora"} == set(before.confirm_seeds)
    assert [row.trial for row in record.settings if row.subject == "lora"] == [winner.number]
    assert [row for row in record.confirm if row in before.confirm] == before.confirm
    assert len({row.run for row in record.confirm}) == len(record.confirm)
    shown = load_sweep(folder.path).confirm_dataframe()
    assert set(shown[shown.subject == "lora"]["optim.lr"]) == {winner.params["optim.lr"]}
    (warning,) = [warning for warning in record.warnings if "test scores were known" in warning]
    assert "`lora`" in warning
    reopened = reopen_sweep(folder.path)
    reopened.close()
    assert warning in reopened.record.warnings


def test_an_arm_is_added_by_the_command_line(begin, work, runs, confirming):
    folder = begin(confirming)
    assert work(folder)
    path = folder.path
    before = rows_of(path)
    arm = {**NEW_ARM, "settings": {**NEW_ARM["settings"], "seed": rows_of(path, "confirm_seeds")[0]}}
    with pytest.raises(ConfigError, match="no arm may have one of them as its `seed`"):
        reopen_sweep(path, changes={"arms.other": arm})
    assert work(reopen_sweep(path, changes={"arms.other": NEW_ARM}))
    assert rows_of(path)[: len(before)] == before
    assert {row.arm for row in rows_of(path, "confirm")} == {"frozen", "lora", "other"}
    assert [change.trials for change in rows_of(path, "changes")] == [{"other": 3}]
    reopen_sweep(path).close()


REFUSED = [
    ({"arms.lora.trials": 5}, r"`arms.lora.trials >= 6` must hold, because the sweep has that many, but got 5\."),
    ({"optim.eps": 1e-6}, r"arm `frozen`: `optim.eps` must stay 1e-08, because .* but got 1e-06\."),
    ({"arms.lora.optim.lr": 0.02}, r"arm `lora`: `optim.lr` must stay \{'low': 0.001, .* but got 0.02\."),
    ({"sampler": "qmc"}, r"`sampler.name` must stay 'tpe', .* but got 'qmc'"),
    ({"confirm.margin": 0.5}, r"`confirm.margin` must stay '5%'"),
    ({"sweep.seed": 1}, r"`sweep.seed` must stay 0, "),
    ({"arms.frozen": None}, r"must keep its arm `frozen`"),
    ({"arms.lora": NEW_ARM}, r"`arms.lora` must be the settings of a new arm"),
    ({"arms.new": 5}, r"`arms.new` must be a group of settings, but got 5"),
    ({"arms.new.trials": 5}, r"`arms.new.trials` must be a setting of at least one arm"),
    ({"arms.new": {**NEW_ARM, "setings": {}}}, r"setings.*Did you mean `settings`"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_would_change_trials_is_refused_and_nothing_is_written(begin, work, runs, small, changes, message):
    folder = begin(small)
    assert work(folder)
    before = read_files(folder.path)
    with pytest.raises(ConfigError, match=message):
        reopen_sweep(folder.path, changes=changes)
    assert read_files(folder.path) == before
    reopen_sweep(folder.path).close()

"""A sweep that has begun may get more trials and seeds: its trials stay, and what is added follows from its record."""

import pytest
from tests.files import read_files

from lorasweep.errors import ConfigError
from lorasweep.record import read_sweep
from lorasweep.results import load_sweep
from lorasweep.sweep.controller.lifecycle import reopen_sweep

MORE = {"arms.lora.trials": 10}


@pytest.fixture
def small(three_arms, runs):
    """A sweep whose sampler learns, and whose scores depend on the run's seed."""
    three_arms["settings"] |= {"sampler": "tpe", "confirm.seeds": 2}
    del three_arms["arms"]["full"]
    runs.score = lambda config, step: abs(config.optim.lr - 0.01) + 1 / (1 + step) + config.seed % 7 / 1000
    return three_arms


def test_a_new_winner_is_confirmed_on_the_same_seeds_and_runs_of_the_former_one_stay(begin, work, runs, small):
    folder = begin(small)
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
    assert any("`lora`" in grown for grown in record.late_growth)
    reopened = reopen_sweep(folder.path)
    reopened.close()
    assert reopened.record.late_growth == record.late_growth


REFUSED = [
    ({"arms.lora.trials": 5}, "`arms.lora.trials >= 6`.* 5"),
    ({"sweep.trials": 4}, "`arms.lora.trials >= 6`.* `sweep.trials=4` sets it to"),
    ({"confirm.seeds": 1}, "`confirm.seeds >= 2`.* 1"),
    ({"optim.eps": 1e-6}, "arm `frozen`: `optim.eps`.* 1e-08.* 1e-06"),
    ({"arms.lora.optim.lr": 0.02}, r"arm `lora`: `optim.lr`.* \{'low': 0.001.* 0.02"),
    ({"sampler": "qmc"}, "`sampler.name`.* 'tpe'.* 'qmc'"),
    ({"confirm.margin": 0.5}, "`confirm.margin`.* '5%'"),
    ({"sweep.seed": 1}, "`sweep.seed`.* 0"),
    ({"arms.frozen": None}, r"\(frozen, lora\), but got lora"),
    ({"sweep.output": "other"}, "`sweep.output`.* None.* 'other'"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_would_change_trials_is_refused_and_nothing_is_written(begin, work, runs, small, changes, said):
    folder = begin(small)
    assert not work(folder, stop_at=3)
    before = read_files(folder.path)
    with pytest.raises(ConfigError, match=f"{said}.*new sweep"):
        reopen_sweep(folder.path, changes=changes)
    assert read_files(folder.path) == before
    reopen_sweep(folder.path).close()

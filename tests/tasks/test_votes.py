"""A new task, one file and one registered class, trains alone, in a pack and in a sweep with verdicts."""

import json

import pytest
import yaml
from tests.small_runs import TWO_STEPS, rates
from tests.tasks.votes import VotesConfig

import lorasweep
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.tasks import DATA

LIMITS = dict.fromkeys(("path", "subset", "revision", "validation", "test", "test_fraction", "group", "columns"))
LIMITS |= {f"max_{split}_examples": None for split in ("train", "validation", "test")}
OPTION = LIMITS | {"name": "votes", "train": "???", "max_length": 32, "group_by_length": True}
OPTION |= {"delimiter": "auto"}
SETTINGS = {key: value for key, value in TWO_STEPS.items() if not key.startswith("data.")}
SETTINGS |= {"data": "votes", "data.train": "votes.jsonl", "logger": "none"}


@pytest.fixture
def votes(here, monkeypatch):
    """A folder with the option `data=votes` and a file of votes."""
    monkeypatch.setitem(DATA, "votes", VotesConfig)
    (here / "conf" / "data").mkdir(parents=True)
    (here / "conf" / "data" / "votes.yaml").write_text(yaml.safe_dump(OPTION))
    rows = [{"answer": f"the answer {n} is {'good' * (n % 3)}", "liked": n % 3 > 0} for n in range(90)]
    (here / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return here


def test_a_wrong_setting_is_named(votes):
    with pytest.raises(ConfigError, match=r"`data\.anser` is not a setting. Did you mean `data\.answer`"):
        compose_run(SETTINGS | {"data.anser": "text"})
    with pytest.raises(ConfigError, match=r"`objective` must be one of default for `data=votes`, but got 'orpo'"):
        lorasweep.train_run([f"{key}={json.dumps(value)}" for key, value in {**SETTINGS, "objective": "orpo"}.items()])


def test_a_sweep_packs_its_trials_and_ends_with_verdicts(votes):
    sweep = {
        "name": "votes",
        "settings": SETTINGS | {"confirm.seeds": 2, "confirm.margin": 0.1, "sweep.trials": 2},
        "arms": {
            "frozen": {"settings": {"method": "frozen"}},
            "full": {"settings": {"method": "full"}, "space": {"optim.lr": rates(1e-4, 1e-3)}},
            "lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2], "optim.lr": rates(1e-3, 1e-2)}},
        },
    }
    assert read_definition(sweep).find_arm("lora").packing.key is not None
    result = lorasweep.run_sweep(sweep, output=votes / "sweep", progress=None)
    assert result.metric == "vote_accuracy"
    assert any("answers of train are liked" in note for note in result.load_run(result.best("full")).record.notes)
    assert len(result.confirm_dataframe()) == 1 + 2 + 2  # the frozen base has the same score on every seed
    assert "full" in result.table()

"""A command loads the base model and reads the data once, however many of its stages need them."""

from types import SimpleNamespace

import pytest
import yaml
from tests.small_runs import MINI

import lorasweep.sweep.measure as measure_file
import lorasweep.training.inputs as inputs_file
from lorasweep.cli import run
from lorasweep.outcome import DONE

DRAFT = ["model.path=embedded:tiny", "data.train=topics.csv"]


@pytest.fixture
def loads(here, monkeypatch):
    """The names of the models and data that were loaded, while measured trainings are made up."""
    names = []
    for name in ("load_base", "read_source"):
        load = getattr(inputs_file, name)
        monkeypatch.setattr(
            inputs_file, name, lambda *given, load=load, name=name, **more: names.append(name) or load(*given, **more)
        )
    record = SimpleNamespace(metric="loss", config={"method": None}, trainable_params=1, peak_memory_bytes=1)
    phases = {"training_s": 0.1, "evaluating_s": 0.1, "saving_s": 0.1, "loading_s": 0.1}
    training = measure_file.BriefTraining(**phases, record=record)
    monkeypatch.setattr(measure_file, "train_briefly", lambda config, inputs, **_: training)
    (here / "mini.yaml").write_text(yaml.safe_dump(MINI, sort_keys=False))
    rows = [f"{n % 4},{'a longer or shorter text ' * (1 + n % 5)}{n}\n" for n in range(800)]
    (here / "topics.csv").write_text("stars,review\n" + "".join(rows))
    return names


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["sweep", "mini.yaml", "confirm.seeds=1"], marks=pytest.mark.slow),
        ["sweep", "mini.yaml", "confirm.seeds=1", "--minutes", "60"],
        ["plan", "mini.yaml", "confirm.seeds=1"],
        ["plan", *DRAFT],
        ["new", "made.yaml", *DRAFT],
    ],
)
def test_a_command_loads_model_and_data_once(loads, words):
    assert run(words) == DONE
    assert sorted(loads) == ["load_base", "read_source"]


def test_a_drafted_file_has_the_numbers_that_fit_the_minutes_and_its_plan_measures_nothing_again(loads, here, capsys):
    assert run(["new", "made.yaml", *DRAFT, "--minutes", "2.5"]) == DONE
    assert sorted(loads) == ["load_base", "read_source"]
    settings = yaml.safe_load((here / "made.yaml").read_text())["settings"]
    assert settings["confirm.seeds"] in ([3], [3, 6])  # loading takes a part of the time
    assert "measuring" in capsys.readouterr().err
    assert run(["plan", "made.yaml"]) == DONE
    assert "measuring" not in capsys.readouterr().err

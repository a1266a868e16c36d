"""Reading the results of a stranger runs no code; their model's code runs only after `--trust`."""

import sys

import pytest
import yaml
from tests.files import edit_json

from lorasweep.cli import DONE, WRONG_REQUEST, run

from .test_cli import MINI

SHORT = {**MINI["settings"], "trainer.max_steps": 1}
ONE_ARM = {**MINI, "settings": SHORT, "arms": {"lora": {"settings": {"method": "lora", "method.rank": 1}}}}


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A complete sweep whose records name a module in the current folder, which leaves a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(ONE_ARM))
    assert run(["sweep", "one.yaml", "sweep.output=theirs"]) == DONE
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('canary').write_text('ran')\n")
    named = {"callbacks.a._target_": "evil.Callback", "sampler._target_": "evil.S"}
    edit_json(tmp_path / "theirs" / "sweep.json", lambda raw: raw["definition"]["file"]["settings"].update(named))

    def change(raw):
        raw["config"]["callbacks"] = {"a": {"_target_": "evil.Callback"}}
        raw["config"]["model"]["trust_remote_code"] = True

    (run_file,) = (tmp_path / "theirs" / "runs").glob("*/run.json")
    edit_json(run_file, change)
    yield tmp_path / "theirs"
    assert not (tmp_path / "canary").exists()
    assert "evil" not in sys.modules


def test_reading_a_strangers_sweep_runs_nothing(theirs):
    assert run(["status", "theirs"]) == DONE
    assert run(["compare", "theirs"]) == DONE


@pytest.mark.parametrize("command", ["inspect", "export --format peft --out new"])
def test_the_code_of_a_strangers_model_needs_trust(theirs, capsys, command):
    (folder,) = (theirs / "runs").iterdir()
    name, *options = command.split()
    assert run([name, str(folder), *options]) == WRONG_REQUEST
    refused = capsys.readouterr().err
    assert all(word in refused for word in ("`model.trust_remote_code`", "--trust"))

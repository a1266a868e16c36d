"""Reading the results of a stranger runs no code; their model's code runs only after `--trust`."""

import os
import shutil
import sys

import pytest
import yaml
from tests.files import edit_json
from tests.fuzzing import list_files
from tests.small_runs import MINI

from lorasweep.cli import DONE, WRONG_REQUEST, run

SHORT = {**MINI["settings"], "trainer.max_steps": 1}
ONE_ARM = {**MINI, "settings": SHORT, "arms": {"lora": {"settings": {"method": "lora", "method.rank": 1}}}}


@pytest.fixture(scope="module")
def complete_sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    (folder / "one.yaml").write_text(yaml.safe_dump(ONE_ARM))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["sweep", "one.yaml", "sweep.output=theirs"]) == DONE
    return folder / "theirs"


@pytest.fixture
def theirs(complete_sweep, tmp_path, monkeypatch):
    """A complete sweep whose records name a module in the current folder, which leaves a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(complete_sweep, tmp_path / "theirs")
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


def leave(raw, place, name):
    """Puts a name into a record: of an arm, of a trial's arm, subject or folder."""
    row = raw["arms"][0] if place == "arm" else raw["trials"][0]
    row["name" if place == "arm" else place] = name


@pytest.mark.parametrize("place", ["arm", "subject", "run"])
def test_a_strangers_names_lead_nowhere_else(theirs, place):
    before = list_files(theirs.parent)
    for name in ("../../outside", "..", "a/b", "/tmp/outside", "runs/..", "runs/../../outside", "a\0b"):
        edit_json(theirs / "sweep.json", lambda raw, name=name: leave(raw, place, name))
        assert run(["compare", "theirs"]) == WRONG_REQUEST
    assert list_files(theirs.parent).keys() == before.keys()


@pytest.mark.parametrize("place", ["report", "report/tensorboard", "report/tensorboard/arms", "report/index.html"])
def test_a_strangers_links_are_not_followed(theirs, place, capsys):
    outside, link = theirs.parent / "outside", theirs / place
    outside.mkdir()
    (outside / "theirs").write_text("kept")
    if link.is_dir():
        shutil.rmtree(link)
    else:
        link.unlink()
    link.symlink_to(outside, target_is_directory=True)
    assert run(["compare", "theirs"]) == WRONG_REQUEST
    assert "symbolic links" in capsys.readouterr().err
    assert [path.name for path in outside.iterdir()] == ["theirs"]


def test_what_a_strangers_record_may_cost_is_bounded(theirs):
    for looks in ([1] * 2000, [2**62], [0]):
        edit_json(theirs / "sweep.json", lambda raw, looks=looks: raw.update(looks=looks))
        assert run(["compare", "theirs"]) == WRONG_REQUEST
    (theirs / ".lock").unlink()
    os.mkfifo(theirs / ".lock")  # opening it would wait for ever
    edit_json(theirs / "sweep.json", lambda raw: raw.update(looks=[]))
    assert run(["status", "theirs"]) == DONE

"""A small complete sweep, and a copy of it as a stranger's folder that a test may damage."""

import shutil
import sys

import pytest
import yaml
from tests.files import fill_once
from tests.hostile.commands import list_files
from tests.small_runs import MINI

from lorasweep.cli import run
from lorasweep.outcome import DONE

SWEEP = {
    **MINI,
    "settings": MINI["settings"] | {"confirm.seeds": 2},
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {"settings": {"method": "full"}, "trials": 1},
        "lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2},
    },
}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A complete sweep of four trials and five confirm runs; the run of `full` lacks its weights."""
    return fill_once(tmp_path_factory, "recorded", record_sweep) / "theirs"


def record_sweep(folder):
    (folder / "one.yaml").write_text(yaml.safe_dump(SWEEP))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["sweep", "one.yaml", "sweep.output=theirs"]) == DONE
    for weights in folder.glob("theirs/runs/full-*/best"):
        shutil.rmtree(weights)


@pytest.fixture
def theirs(recorded, here):
    """The sweep in the current folder, beside a module that leaves a file when it is imported, and what must stay."""
    shutil.copytree(recorded, here / "theirs")
    (here / "evil.py").write_text("import pathlib\npathlib.Path('canary').write_text('ran')\n")
    (here / "outside").mkdir()
    (here / "outside" / "kept").write_text("kept")
    before = list_files(here / "outside")
    yield here / "theirs"
    assert list_files(here / "outside") == before
    assert not (here / "canary").exists()
    assert "evil" not in sys.modules
    assert {path.name for path in here.iterdir()} <= {"theirs", "evil.py", "outside", "out", "scores.csv"}

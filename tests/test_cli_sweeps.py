"""What the commands do with a whole sweep: they print it, add to it, compare it, repeat its trials."""

import contextlib
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tests.small_runs import MINI

import lorasweep
import lorasweep.sweep.workers.worker as worker_file
from lorasweep.cli import run
from lorasweep.errors import OutOfMemory
from lorasweep.outcome import DONE, FAILED, WRONG_REQUEST
from lorasweep.record import read_run, read_sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep's folder, and what the command printed."""
    folder, printed = tmp_path_factory.mktemp("swept"), io.StringIO()
    (folder / "mini.yaml").write_text(
        yaml.safe_dump(MINI | {"settings": MINI["settings"] | {"confirm.seeds": 1}}, sort_keys=False)
    )
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        assert run(["sweep", "mini.yaml"]) == DONE
    return SimpleNamespace(folder=folder, printed=printed.getvalue())


@pytest.fixture(autouse=True)
def sweep(swept, here):
    """A copy of the finished sweep in `s`, beside its file."""
    shutil.copy(swept.folder / "mini.yaml", here)
    return shutil.copytree(swept.folder / "outputs" / "mini", here / "s")


def test_a_sweep_goes_from_file_to_report(swept, sweep, capsys):
    lines = swept.printed.splitlines()
    assert "sweep mini in outputs/mini" in swept.printed
    assert "report: outputs/mini/report/index.html" in swept.printed
    (warning,) = [n for n, line in enumerate(lines) if line.startswith("warning: `confirm.seeds` is 1")]
    assert warning < next(n for n, line in enumerate(lines) if line.startswith("frozen 1/1"))
    assert {path.name for path in swept.folder.iterdir()} == {"outputs", "mini.yaml"}
    for row in (record := read_sweep(sweep)).trials:
        kept = read_run(sweep / row.run)
        assert (kept.arm, kept.trial, kept.status, kept.score) == (row.arm, row.number, row.state, row.search_score)
        assert kept.test == {}  # only the confirm runs may see test data
        assert list((sweep / row.run).glob("events.out.tfevents.*"))
    assert all(row.test_scores == read_run(sweep / row.run).test for row in record.confirm)
    summary = json.loads((sweep / "report" / "summary.json").read_text())
    assert {arm["name"]: arm["trials"]["complete"] for arm in summary["subjects"]} == {"frozen": 1, "lora": 2}
    assert run(["compare", "s"]) == DONE
    assert "report: s/report/index.html" in capsys.readouterr().out
    assert run(["sweep", "--resume", "s"]) == DONE
    assert len(read_sweep(sweep).trials) == 3


def test_train_takes_the_settings_that_a_sweep_recommends_and_says_so(sweep, capsys):
    best = min(read_sweep(sweep).trials[1:], key=lambda row: row.search_score)
    assert run(["train", "--from", "s", "output=one"]) == DONE
    assert f"settings of trial {best.number} of arm `lora` in {sweep}" in capsys.readouterr().err
    assert run(["train", "--from=s/lora", "trainer.max_steps=3", "output=two"]) == DONE
    one, two = read_run(Path("one")), read_run(Path("two"))
    assert one.origin == two.origin == {"sweep": str(sweep), "name": "mini", "arm": "lora", "trial": best.number}
    assert (one.config["method"]["rank"], one.steps_done, two.steps_done) == (best.params["method.rank"], 2, 3)
    assert one.score == best.search_score  # the trial ran alone, with the same seed
    found = lorasweep.train_run({"trainer.max_steps": 1}, from_sweep="s", output="three")
    assert (found.record.origin, found.record.steps_done) == (one.origin, 1)


def test_an_arm_without_the_test_score_that_was_asked_for_is_exit_code_1(capsys, monkeypatch):
    def score(folder, **others):
        raise OutOfMemory("the evaluation needs 2 GiB.")

    monkeypatch.setattr(worker_file, "score_run", score)
    assert run(["sweep", "mini.yaml", "sweep.output=new"]) == FAILED
    printed = capsys.readouterr()
    assert "report: new/report/index.html" in printed.out
    said = [line for line in printed.err.splitlines() if line.startswith("lorasweep: ")]
    assert any("arm `lora`" in line and "the evaluation needs 2 GiB." in line for line in said)


def test_a_grown_sweep_keeps_its_trials(sweep, capsys):
    before = read_sweep(sweep)
    assert run(["sweep", "--resume", "s", "arms.lora.trials=3", "confirm.seeds=2"]) == DONE
    after = read_sweep(sweep)
    for stage in ("trials", "confirm"):
        assert [row for row in getattr(after, stage) if row in getattr(before, stage)] == getattr(before, stage)
    assert [(arm.name, arm.trials) for arm in after.arms] == [("frozen", 1), ("lora", 3)]
    assert Counter(row.arm for row in after.confirm if row.setting_number == after.settings[1].setting)["lora"] >= 2
    assert run(["sweep", "--resume", "s", "arms.lora.trials=2"]) == WRONG_REQUEST
    assert "`arms.lora.trials >= 3`" in capsys.readouterr().err


def test_a_trial_of_a_sweep_is_reproduced_and_a_sweep_is_refused(sweep, capsys):
    assert run(["reproduce", "s"]) == WRONG_REQUEST
    assert "run.json" in capsys.readouterr().err
    assert run(["reproduce", "s/runs/lora-0001", "--steps", "1"]) == DONE
    assert "of s/runs/lora-0001 and outputs/reproduce/lora-0001" in capsys.readouterr().out


JSON_PAGE = Path(__file__).parents[1] / "docs" / "reference" / "json.md"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("status", ["s"]),
        ("compare", ["s"]),
        ("sweep", ["--resume", "s", "confirm.seeds=2"]),
        ("plan", ["mini.yaml"]),
    ],
)
def test_json_has_the_keys_of_the_page_and_nothing_else_is_printed(sweep, capfd, command, words):
    assert run([command, *words, "--json"]) == DONE
    found = json.loads(capfd.readouterr().out)
    heading = "sweep" if command == "compare" else command
    section = JSON_PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    keys = [
        key for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE) for key in re.findall("`(.*?)`", row)
    ]
    assert found.keys() == {key for key in keys if "." not in key}
    for parent in {key.split(".")[0] for key in keys if "." in key}:
        inner = {key.split(".")[1] for key in keys if key.startswith(f"{parent}.")}
        assert [one for one in found[parent] if one.keys() != inner] == []

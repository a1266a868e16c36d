"""What the commands do with a whole sweep: they print it, add to it, compare it, repeat it."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from tests.small_runs import TWO_STEPS

import lorasweep
import lorasweep.sweep.workers.worker as worker_file
from lorasweep.cli import DONE, FAILED, WRONG_REQUEST, run
from lorasweep.errors import OutOfMemory
from lorasweep.record import read_run, read_sweep, write_record

MINI = {
    "name": "mini",
    "settings": TWO_STEPS | {"worker.pack_size": 1, "pruner": "none", "confirm.seeds": 1},
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2},
    },
}
pytestmark = pytest.mark.slow


class Swept(NamedTuple):
    """A finished sweep's folder, and what the command printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("swept"), io.StringIO()
    (folder / "mini.yaml").write_text(yaml.safe_dump(MINI, sort_keys=False))
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        assert run(["sweep", "mini.yaml"]) == DONE
    return Swept(folder, printed.getvalue())


@pytest.fixture(autouse=True)
def sweep(swept, tmp_path, monkeypatch):
    """A copy of the finished sweep in `s`, beside its file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    shutil.copy(swept.folder / "mini.yaml", tmp_path)
    return shutil.copytree(swept.folder / "outputs" / "mini", tmp_path / "s")


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_loss(sweep):
    """Changes the first loss of the arm's second trial, and returns it."""
    log = sweep / "runs" / "lora-0001" / "steps.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[0]["loss"] += 1.0
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows[0]["loss"]


def test_a_sweep_goes_from_file_to_report(swept, sweep, capsys):
    lines = swept.printed.splitlines()
    assert "sweep mini in outputs/mini" in swept.printed
    assert "report: outputs/mini/report/index.html" in swept.printed
    (warning,) = [n for n, line in enumerate(lines) if line.startswith("warning: `confirm.seeds` is 1")]
    assert warning < next(n for n, line in enumerate(lines) if line.startswith("frozen 1/1"))
    assert {path.name for path in swept.folder.iterdir()} == {"outputs", "mini.yaml"}
    summary = json.loads((sweep / "report" / "summary.json").read_text())
    assert {arm["name"]: arm["trials"]["complete"] for arm in summary["arms"]} == {"frozen": 1, "lora": 2}
    assert run(["compare", "s"]) == DONE
    assert "report: s/report/index.html" in capsys.readouterr().out
    assert run(["sweep", "--resume", "s"]) == DONE
    assert len(read_sweep(sweep).trials) == 3


def test_train_takes_the_settings_that_a_sweep_recommends_and_says_so(sweep, capsys):
    best = min(read_sweep(sweep).trials[1:], key=lambda row: row.value)
    assert run(["train", "--from", "s", "output=one"]) == DONE
    assert f"settings of trial {best.number} of arm `lora` in {sweep}" in capsys.readouterr().err
    assert run(["train", "--from=s/lora", "trainer.max_steps=3", "output=two"]) == DONE
    one, two = read_run(Path("one")), read_run(Path("two"))
    assert one.origin == two.origin == {"sweep": str(sweep), "name": "mini", "arm": "lora", "trial": best.number}
    assert (one.config["method"]["rank"], one.steps_done, two.steps_done) == (best.params["method.rank"], 2, 3)
    assert one.score == best.value  # the trial ran alone, with the same seed
    found = lorasweep.train_run({"trainer.max_steps": 1}, from_sweep="s", output="three")
    assert (found.record.origin, found.record.steps_done) == (one.origin, 1)


def test_a_finished_sweep_gets_more_confirm_runs(sweep, capsys):
    before = read_sweep(sweep)
    assert run(["sweep", "--resume", "s", "confirm.seeds=2"]) == DONE
    after = read_sweep(sweep)
    assert after.trials == before.trials
    assert [row for row in after.confirm if row in before.confirm] == before.confirm
    assert sorted((row.arm, row.state) for row in after.confirm) == [
        ("frozen", "complete"),
        ("lora", "complete"),
        ("lora", "complete"),
    ]
    assert run(["sweep", "--resume", "s", "confirm.seeds=1"]) == WRONG_REQUEST
    assert "`confirm.seeds >= 2` must hold" in capsys.readouterr().err


def test_an_arm_without_the_test_score_that_was_asked_for_is_exit_code_1(capsys, monkeypatch):
    def score(folder, **others):
        raise OutOfMemory("the evaluation needs 2 GiB.")

    monkeypatch.setattr(worker_file, "score_run", score)
    assert run(["sweep", "mini.yaml", "sweep.output=new"]) == FAILED
    printed = capsys.readouterr()
    assert "report: new/report/index.html" in printed.out
    said = [line for line in printed.err.splitlines() if line.startswith("lorasweep: ")]
    assert any("arm `lora`" in line and "the evaluation needs 2 GiB." in line for line in said)


def test_a_grown_sweep_keeps_its_trials_and_is_not_reproduced_as_a_whole(sweep, capsys):
    before = read_sweep(sweep)
    arm = "{settings: {method: lora, method.variant: dora}, space: {method.rank: [1]}, trials: 1}"
    assert run(["sweep", "--resume", "s", "arms.lora.trials=3", f"arms.dora={arm}"]) == DONE
    after, files = read_sweep(sweep), read_files(sweep)
    assert [row for row in after.trials if row in before.trials] == before.trials
    assert [(arm.name, arm.trials) for arm in after.arms] == [("frozen", 1), ("lora", 3), ("dora", 1)]
    assert {row.arm for row in after.confirm} == {"frozen", "lora", "dora"}
    assert run(["reproduce", "s"]) == WRONG_REQUEST
    assert "grew" in capsys.readouterr().err
    assert read_files(sweep) == files
    assert run(["sweep", "--resume", "s", "arms.lora.trials=2"]) == WRONG_REQUEST
    assert "`arms.lora.trials >= 3` must hold, because the sweep has that many, but got 2." in capsys.readouterr().err


def test_reproduce_says_where_a_sweep_first_differs_and_ends_with_1(sweep, capsys):
    loss = change_loss(sweep)
    assert run(["reproduce", "s", "--output", "new"]) == FAILED
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"different: trial lora-1, step 1: `loss` was {loss!r} and is ")
    assert last.endswith(": new")


@pytest.mark.parametrize("status", ["interrupted", "running"])
def test_a_sweep_that_is_not_complete_is_not_reproduced(sweep, capsys, status):
    record = read_sweep(sweep)
    record.status = status
    write_record(record, sweep)
    assert run(["reproduce", "s"]) == WRONG_REQUEST
    assert f"'s' is {status}" in capsys.readouterr().err
    assert {path.name for path in sweep.parent.iterdir()} == {"s", "mini.yaml"}


@pytest.mark.parametrize("words", [["--steps", "1"], ["--tolerance", "0.1"]])
def test_a_sweep_is_reproduced_as_a_whole_only(sweep, capsys, words):
    assert run(["reproduce", "s", *words]) == WRONG_REQUEST
    assert f"`{words[0]}`" in capsys.readouterr().err
    assert {path.name for path in sweep.parent.iterdir()} == {"s", "mini.yaml"}


def test_reproduce_repeats_one_trial_of_a_sweep(sweep, capsys):
    assert run(["reproduce", "s/runs/lora-0001", "--steps", "1"]) == DONE
    assert "of s/runs/lora-0001 and outputs/reproduce/lora-0001" in capsys.readouterr().out


def test_inspect_takes_the_recommended_run_of_a_sweep(sweep, capsys):
    assert run(["inspect", "s"]) == DONE
    assert "inspecting lora" in capsys.readouterr().out

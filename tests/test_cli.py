"""Exit codes, one line per error, and a disk that bad input leaves as it was."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from tests.files import list_names
from tests.small_runs import MINI

import lorasweep.sweep.workers.worker as worker_file
import lorasweep.training.inputs as workbench_file
from lorasweep.cli import run
from lorasweep.errors import INTERRUPTED_EXIT_CODE, Diverged
from lorasweep.outcome import DONE, FAILED, WRONG_REQUEST
from lorasweep.record import read_sweep
from lorasweep.training.stop_signal import StopSignal

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def mini(here):
    (here / "mini.yaml").write_text(yaml.safe_dump(MINI, sort_keys=False))
    return "mini.yaml"


UNUSABLE_MINUTES = ["inf", "nan", "0", "ten"]


def test_a_command_that_is_not_understood_ends_with_2_and_the_version_with_0(capsys):
    for words, said in {
        "": "lorasweep sweep quickstart ",
        "status --al": "`--al` must be an option of `lorasweep status` (--json), but is none",
        "sweep --resumed": "Did you mean `--resume`?",
        "export run": "`--format` must be given",
        "export run --format peft": "`--out` or `--into` must be given",
        "export run --format pef --out new": "but got 'pef'. Did you mean `peft`?",
        "export run --format peft --out": "`--out` must have a value",
        "reproduce run --steps few": "`--steps` must be a number, but got 'few'",
        "train -m --cfg job": "`--cfg` must be left out with `--multirun`",
    }.items():
        assert run(words.split()) == WRONG_REQUEST
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"lorasweep {version('lorasweep')}\n")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optim.lr", ["optim.lr (optim=adamw)", "Peak learning rate", "a number > 0", "default: `0.001`"]),
        ("data.answers", ["data.answers.score", "data.answers.max_new_tokens", "a whole number >= 1"]),
        ("method", ["method=frozen|full|intrinsic|lora|peft", "lorasweep help method=lora"]),
        ("method=lora", ["method.rank (method=lora)"]),
        ("sweep", ["usage: lorasweep sweep", "--resume [DIR]", "sweep.trials"]),
    ],
)
def test_help_explains_a_setting_a_group_and_a_command(here, capfd, name, said):
    assert run(["help", name]) == DONE
    shown = capfd.readouterr().out
    assert [text for text in said if text not in shown] == []
    assert not list_names(here)


def test_help_without_a_name_lists_commands_and_groups(capsys):
    assert run(["help"]) == DONE
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("compare", "worker=local|ray|slurm", "+experiment=low_memory|quick_check"))


@pytest.mark.parametrize(
    ("words", "words_said"),
    [
        ("status . --json", "must contain sweep.json, but '.' does not"),
        ("sweep quickstart --cfg job --json", "`--cfg`"),
        *((f"plan quickstart --minutes {minutes} --json", f"but got '{minutes}'") for minutes in UNUSABLE_MINUTES),
    ],
)
def test_with_json_an_error_is_one_object_on_standard_output(here, capfd, words, words_said):
    assert run(words.split()) == WRONG_REQUEST
    printed = capfd.readouterr()
    error = json.loads(printed.out)["error"]
    assert (error["class"], words_said in error["message"]) == (
        "RecordError" if words.startswith("status") else "ConfigError",
        True,
    )
    assert error["message"] in printed.err


def test_with_json_a_defect_is_one_object_too_and_shows_where_it_is(capfd, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("lorasweep.sweep.status.read_status", fail)
    with pytest.raises(ZeroDivisionError):
        run(["status", ".", "--json"])
    assert json.loads(capfd.readouterr().out)["error"] == {"class": "ZeroDivisionError", "message": "a defect"}


def test_a_ctrl_c_after_a_command_ends_the_process_without_a_traceback(here):
    code = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    code += "; from lorasweep.cli import main; main(['status', '.'])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGINT
    assert "must contain sweep.json, but '.' does not" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_second_ctrl_c_ends_at_once_and_the_first_says_so(capfd):
    before = signal.getsignal(signal.SIGINT)
    stop = StopSignal("To resume type x")

    def send_twice():
        with stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop()
            assert "second Ctrl-C" in capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal must end the block")

    with pytest.raises(KeyboardInterrupt, match="To resume type x"):
        send_twice()
    assert signal.getsignal(signal.SIGINT) is before
    with StopSignal() as patient:  # with a second SIGTERM as with the first
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert patient()


def test_a_reader_that_ends_first_is_no_error():
    """As in `lorasweep train --cfg job | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "lorasweep", "train", "--cfg", "job"]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_before_anything_runs_ends_with_130(capsys, monkeypatch, mini):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(workbench_file, "load_inputs", interrupted)
    assert run(["sweep", mini]) == INTERRUPTED_EXIT_CODE
    assert capsys.readouterr().err == "lorasweep: interrupted\n"
    assert not Path("outputs").exists()


def test_a_sweep_whose_trials_all_fail_ends_with_1_and_says_where_to_look(capsys, monkeypatch, mini):
    def fail(*_, **__):
        raise Diverged("the training loss became NaN.")

    monkeypatch.setattr(worker_file, "train_runs", fail)
    assert run(["sweep", mini, "sweep.max_failures=2"]) == FAILED
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the training loss became NaN." in error
    assert "outputs/mini/runs" in error
    assert read_sweep(Path("outputs/mini")).status == "interrupted"


def test_a_composed_sweep_is_shown_with_all_settings_and_ranges(capsys, here, mini):
    choice = "arms.lora.method.alpha=choice(1, 2)"
    assert run(["sweep", mini, "--cfg", "job", choice, "sampler=qmc", "optim.weight_decay=0.1"]) == DONE
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["name"], shown["sampler"]["name"], shown["confirm"]["seeds"]) == ("mini", "qmc", 0)
    frozen, lora = shown["arms"]["frozen"], shown["arms"]["lora"]
    assert (frozen["trials"], frozen["method"], lora["trials"]) == (1, {"name": "frozen"}, 2)
    assert (lora["method"]["rank"], lora["method"]["alpha"]) == ([1, 2], [1, 2])
    assert (lora["optim"]["weight_decay"], lora["data"]["block_length"]) == (0.1, 32)
    assert list_names(here) == {"mini.yaml"}


@pytest.mark.slow
def test_a_plan_trains_and_writes_nothing(capsys, here, mini):
    before = list_names(here)
    assert run(["plan", mini, "confirm.seeds=3", "--measure"]) == DONE
    printed = capsys.readouterr()
    assert "lora" in printed.out
    assert "The verdicts rest on" in printed.out
    first, *_, last = printed.err.splitlines()
    assert "mini (frozen, lora)" in first
    assert last.startswith("this plan took ")
    assert " s: measuring lora: 1 trial" in printed.err
    assert list_names(here) == before


def test_a_plan_and_the_start_of_a_sweep_check_test_data_and_workers(capsys, here, mini):
    rows = [{"prompt": f"name {n}", "completion": f"the name is {n}"} for n in range(40)]
    (here / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = {key: value for key, value in MINI["settings"].items() if not key.startswith("data.")}
    files = {"data": "chat", "data.train": "train.jsonl", "data.test": "test.jsonl"}
    (here / "chat.yaml").write_text(yaml.safe_dump({**MINI, "settings": chat | files}))
    for row, seeds, words in (
        ({"prompt": "name 1", "answer": "the name is 1"}, 0, ["test.jsonl", "completion"]),
        ({"prompt": "name 1", "completion": " "}, 1, ["row 1 of", "test.jsonl' must have a text", "confirm.seeds=0"]),
    ):
        (here / "test.jsonl").write_text(json.dumps(row) + "\n")
        for command in ("plan", "sweep"):
            assert run([command, "chat.yaml", f"confirm.seeds={seeds}"]) == WRONG_REQUEST
            said = capsys.readouterr().err
            assert [word for word in words if word not in said] == []
    assert not (here / "outputs").exists()
    assert run(["plan", mini, "trainer.devices=2"]) == WRONG_REQUEST
    assert "`trainer.devices` must be 1 with `worker=local`" in capsys.readouterr().err

"""`lorasweep train`: Hydra's syntax and flags, grids, and what a run says at its end."""

import csv
import json
import os
import signal

import pytest
import yaml
from tests.files import list_names
from tests.word_chats import make_word_chats

from lorasweep.cli import run
from lorasweep.errors import INTERRUPTED_EXIT_CODE
from lorasweep.outcome import DONE, FAILED, WRONG_REQUEST
from lorasweep.record import read_run
from lorasweep.training import solo_run

pytestmark = pytest.mark.usefixtures("here")


def settings_of(capsys, *words):
    """The settings that `--cfg job` prints, one mapping for each job."""
    capsys.readouterr()
    assert run(["train", "--cfg", "job", *words]) == DONE
    return list(yaml.safe_load_all(capsys.readouterr().out))


def test_keys_and_groups_change_as_in_hydra_and_typed_keys_win_over_shipped_experiments(capsys, here):
    (shown,) = settings_of(capsys, "+optim.foreach=false", "~logger", "++method.rank=3", "optim=sgd", "~optim.momentum")
    assert (shown["optim"]["foreach"], shown["logger"], shown["method"]["rank"]) == (False, {}, 3)
    assert "momentum" not in shown["optim"]
    (swept,) = settings_of(capsys, "optim._target_=torch.optim.RMSprop", "optim.momentum=0.5")
    assert "beta1" not in swept["optim"]  # Hydra alone would keep it
    (quick,) = settings_of(capsys, "+experiment=quick_check", "trainer.batch_size=2")
    assert list(quick["callbacks"]) == ["lr_monitor"]
    assert (quick["trainer"]["max_steps"], quick["trainer"]["batch_size"]) == (20, 2)
    (low,) = settings_of(capsys, "+experiment=low_memory", "method=full")
    assert (low["optim"]["_target_"].split(".")[-1], low["trainer"]["activation_checkpointing"]) == ("Adafactor", True)
    assert low["method"]["name"] == "full"


@pytest.fixture
def own_groups(here, monkeypatch):
    """A package `my_parts` whose folder `conf` has a method and an experiment."""
    for group, content in {
        "method": "defaults: [lora]\nrank: 5\n",
        "experiment": "# @package _global_\ndefaults: [{override /method: mine}]\nseed: 9\n",
    }.items():
        (here / "my_parts" / "conf" / group).mkdir(parents=True)
        (here / "my_parts" / "conf" / group / "mine.yaml").write_text(content)
    (here / "my_parts" / "__init__.py").touch()
    (here / "my_parts" / "conf" / "__init__.py").touch()
    monkeypatch.syspath_prepend(here)


@pytest.mark.parametrize("words", [["hydra.searchpath=[pkg://my_parts.conf]"], ["hydra.searchpath=[my_parts/conf]"]])
def test_options_are_also_found_in_other_folders_and_packages(capsys, own_groups, words):
    (chosen,) = settings_of(capsys, *words, "method=mine")
    assert chosen["method"]["rank"] == 5
    (added,) = settings_of(capsys, *words, "+experiment=mine")
    assert (added["method"]["rank"], added["seed"]) == (5, 9)
    assert run(["train", "--cfg", "job", "method=mine"]) == WRONG_REQUEST  # only where they were named


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+method.rank=4"], "Either remove + prefix: 'method.rank=4'"),
        (["+method=full"], "Multiple values for method."),
        (["+mine.key=4"], "`mine` is not a setting."),
        (["~method"], "`method` must be set, but is missing."),
        (["data=chat", "data.template_arguments=[1]"], "data.template_arguments=[1]: the setting must be a mapping."),
        (["~optim.ghost"], "Could not delete from config. 'optim.ghost' does not exist."),
        (["+experiment=ghost"], "`experiment` must be one of low_memory, quick_check, but got 'ghost'."),
        (["experiment=ghost"], "To append to your default list use +experiment=ghost"),
        (["hydra/launcher=ghost"], "`hydra/launcher` must be one of "),
        (["method.rank=1,4"], "To sweep over it, add --multirun"),
        (["model=causal_lm"], "`model.path` must be set, but is missing."),
        (["--show-examples", "0"], "`--show-examples >= 1` must hold, but got 0."),
        (["--from", "nowhere"], "a sweep's folder must exist, but 'nowhere' does not."),
    ],
)
def test_a_wrong_word_of_hydra_is_one_line_and_exit_code_2(capsys, here, words, message):
    assert run(["train", *words]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lorasweep: ")
    assert message in line
    assert not list_names(here)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=lora,lorra"], "`method` must be one of "),
        (["method.rank=1,4", "trainer.devices=2"], "`trainer.devices` must be 1 and `trainer.strategy` auto"),
    ],
)
def test_a_wrong_job_of_a_grid_is_refused_before_one_trains(capsys, here, words, message):
    assert run(["train", "-m", *words]) == WRONG_REQUEST
    assert message in capsys.readouterr().err
    assert not list(here.rglob("run.json"))


def test_train_runs_once_in_a_new_folder_and_says_the_score(capsys, here, short_words):
    assert run(["train", *short_words]) == DONE
    record = read_run(here / "outputs" / "train" / "0001")
    assert record.status == "complete"
    line = capsys.readouterr().out
    assert line.startswith(f"complete: bits_per_byte {record.score:.4f} at step ")
    assert line.endswith(": outputs/train/0001\n")
    assert {path.name for path in here.iterdir()} == {"outputs"}
    assert run(["train", *short_words]) == DONE
    assert {path.name for path in (here / "outputs" / "train").iterdir()} == {"0001", "0002"}


@pytest.mark.parametrize(
    ("words", "example"),
    [
        (["data=chat", "data.train=talks.jsonl"], "<|endoftext|>one\n⟦1<|endoftext|>⟧\n"),
        (["data=text", "data.train=letters.txt", "data.block_length=8"], "a⟦bcdefghi⟧\n"),
        (
            ["data=preferences", "data.train=pairs.jsonl"],
            "chosen: <|endoftext|>none\n⟦0<|endoftext|>⟧\nrejected: <|endoftext|>none\n⟦no<|endoftext|>⟧\n",
        ),
    ],
)
def test_examples_are_shown_with_what_is_scored_and_nothing_is_trained(capsys, here, monkeypatch, words, example):
    rows = [{"prompt": prompt, "completion": str(n)} for n, prompt in enumerate(("none", "one", "two", "three"))]
    (here / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows]
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (here / "letters.txt").write_text("abcdefghijk" * 40)
    assert run(["train", *words, "--show-examples", "1"]) == DONE
    shown = capsys.readouterr()
    assert shown.out.partition("\n")[2] == example
    assert "validation is" in shown.err
    assert list_names(here) == {"talks.jsonl", "pairs.jsonl", "letters.txt"}
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(["train", *words, "--show-examples", "1"]) == DONE
    coloured = capsys.readouterr().out
    assert "\x1b[1;32m" in coloured
    assert "⟦" not in coloured


@pytest.mark.slow
def test_a_grid_runs_every_combination_and_leaves_nothing_else(here, short_words, capsys):
    assert run(["train", "-m", *short_words, "method.rank=1,2"]) == DONE
    folders = sorted((here / "outputs" / "train").glob("0*"))
    assert [read_run(folder).config["method"]["rank"] for folder in folders] == [1, 2]
    shown = [line for line in capsys.readouterr().out.splitlines() if "trained parameters" in line]
    assert [line.partition(": complete: ")[0] for line in shown] == ["method.rank=1", "method.rank=2"]
    assert {path.name for path in here.iterdir()} == {"outputs"}
    assert {path.name for path in (here / "outputs" / "train").iterdir()} == {"0001", "0002", "multirun.yaml"}


def test_pairs_of_answers_train_with_a_chat_template_and_their_prompts_are_answered(here):
    chats = make_word_chats(here)
    rows = [json.loads(line) for line in (here / "chat.jsonl").read_text().splitlines()]
    pairs = [{"prompt": [{"role": "user", "content": row["prompt"]}], "chosen": row["completion"]} for row in rows]
    pairs = [{**pair, "rejected": f"w{(n + 7) % 40} w1"} for n, pair in enumerate(pairs)]
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    changed = {"data": "preferences", "data.train": "pairs.jsonl", "data.answers.on_validation": True}
    words = [f"{key}={value}" for key, value in {**chats, **changed, "trainer.max_steps": 30}.items()]
    assert run(["train", *words, "objective.beta=0.5", "output=run"]) == DONE
    record = read_run(here / "run")
    assert record.metric == "preference_accuracy"
    assert record.score > 0.5
    with (here / "run" / "validation_answers.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == record.data["validation"]["examples"] == record.answers["validation"]["examples"]
    asked = {row["prompt"].split()[-1] for row in rows}
    assert all(line["reference"] == line["prompt"].removesuffix(" <end> <bot>").split()[-1] for line in lines)
    assert {line["reference"] for line in lines} <= asked


@pytest.mark.slow
def test_a_run_is_resumed_with_its_settings_only(here, short_words, capsys):
    words = ["train", *short_words, "output=run", "resume=true"]
    assert run(words) == DONE  # there is none yet
    first = read_run(here / "run")
    assert run(words) == DONE
    assert read_run(here / "run") == first
    capsys.readouterr()
    assert run([*words, "optim.lr=1e-5"]) == WRONG_REQUEST
    assert "`optim.lr` must be" in capsys.readouterr().err


def test_a_run_that_diverges_is_one_line_and_exit_code_1(here, short_words, capsys):
    assert run(["train", *short_words, "optim.lr=1e30"]) == FAILED
    errors = capsys.readouterr().err
    told = [line for line in errors.splitlines() if not line.startswith("•")]  # without the notes of the run
    assert len(told) == 1
    assert told[0].startswith("lorasweep: ")


def test_an_interrupted_run_ends_with_130_and_says_where_it_is(here, short_words, capsys, monkeypatch):
    true_run = solo_run.train_alone

    def interrupted(*arguments, stop_requested, **others):
        os.kill(os.getpid(), signal.SIGINT)
        return true_run(*arguments, stop_requested=stop_requested, **others)

    monkeypatch.setattr(solo_run, "train_alone", interrupted)
    assert run(["train", *short_words]) == INTERRUPTED_EXIT_CODE == 130
    assert read_run(here / "outputs" / "train" / "0001").status == "interrupted"
    assert "outputs/train/0001" in capsys.readouterr().err

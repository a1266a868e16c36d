"""Exit codes, one line per error, and a disk that bad input leaves as it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import lorasweep.sweep.workers.worker as worker_file
import lorasweep.training.inputs as workbench_file
from lorasweep import api
from lorasweep.cli import DONE, FAILED, INTERRUPTED, WRONG_REQUEST, main, run
from lorasweep.errors import Diverged
from lorasweep.record import read_run, read_sweep
from lorasweep.training.stop_signal import StopSignal

MINI = {
    "name": "mini",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 4,
        "data.max_test_blocks": 4,
        "trainer.batch_size": 2,
        "trainer.eval_batch_size": 4,
        "trainer.max_steps": 2,
        "trainer.eval_every_steps": 1,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "worker.pack_size": 1,
        "pruner": "none",
        "confirm.seeds": 0,
    },
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2},
    },
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder; the command line that Hydra saw is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    return tmp_path


@pytest.fixture
def short(short_run):
    """A run of a few seconds as one types it."""
    words = []
    for key, value in short_run.items():
        words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return words


@pytest.fixture
def mini(here):
    (here / "mini.yaml").write_text(yaml.safe_dump(MINI, sort_keys=False))
    return "mini.yaml"


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def own_pruner(target, *arguments):
    """The words that name a pruner's class."""
    return [f"pruner._target_={target}", *arguments]


BAD = [
    (["status", "."], "`lorasweep status` must get the folder of a sweep, but '.' has no sweep.json."),
    (["sweep", "quickstat"], "Did you mean `quickstart`?"),
    (["sweep", "nothing.yaml"], "a sweep file must exist, but 'nothing.yaml' does not."),
    (["sweep", "./notes.txt"], "notes.txt: a sweep file must "),
    (["sweep", "mini.yaml", "method.rnk=4"], "Did you mean `method.rank`?"),
    (["sweep", "mini.yaml", "method.rank=0"], "mini.yaml: arm `lora`: `method.rank >= 1` must hold, but got 0."),
    (["sweep", "mini.yaml", "method.rank=100000"], "arm `lora`: `method.rank <= "),
    (["sweep", "mini.yaml", "method.targets=[q_prj]"], "q_proj"),
    (["sweep", "mini.yaml", "words"], "an override must read `key=value`"),
    (["sweep", "mini.yaml", "+experiment=quick_check"], "`+` and `~` are for `lorasweep train`"),
    (["sweep", "mini.yaml", "~logger"], "`+` and `~` are for `lorasweep train`"),
    (["sweep", "mini.yaml", "worker.num=2"], "`worker.num` must be 1 with `worker=local`, but got 2."),
    (["sweep", "mini.yaml", *own_pruner("pathlib.Path")], "must be a subclass of"),
    (
        ["sweep", "mini.yaml", *own_pruner("optuna.pruners.PercentilePruner", "pruner.percent=5")],
        "arm `lora`: `pruner` must have arguments that 'optuna.pruners.PercentilePruner' takes, but got {'percent': 5",
    ),
    (["sweep", "mini.yaml", "pruner=halving", "pruner.rungs=[0.5,1.5]"], "less than 1, but got [0.5, 1.5]."),
    (["sweep", "mini.yaml", "method.rank=[]"], "arm `lora`: the range of `method.rank` must have"),
    (["sweep", "empty.yaml"], "`arms.lora.trials` must be 1 for an arm without a space, but got 2. Add a `space`."),
    (["sweep", "mini.yaml", "worker.pack_size=99"], "`worker.pack_size <= "),
    (["sweep", "mini.yaml", "arms.frozen.data.metric=loss"], "`data.metric`"),
    (
        ["sweep", "mini.yaml", "sweep.output=full"],
        "`sweep.output` must be a new or empty folder, but 'full' is not. To resume a sweep type `lorasweep sweep ",
    ),
    (["sweep", "mini.yaml", "model=causal_lm", "model.path=./no/model"], "`model.path` must be"),
    (["sweep", "--resume", "nowhere"], "a sweep's folder must contain sweep.json, but 'nowhere' does not."),
    (
        ["sweep", "--resume", "full", "optim.lr=1"],
        "a sweep's folder must contain sweep.json, but 'full' does not.",
    ),
    (["sweep", "--resume", "full", "confirm.seeds=1"], "'full'"),
    (["sweep", "mini.yaml", "arms.lora.confirm.seeds=3"], "`confirm.seeds` must be the same for all arms"),
    (["sweep", "mini.yaml", "arms.lora.method.rnk=[1]"], "Did you mean `method.rank`?"),
    (["plan", "mini.yaml", "method.rnk=4"], "Did you mean `method.rank`?"),
    (["compare", "nowhere"], "nowhere"),
    (["export", "nowhere", "--format", "peft", "--out", "new"], "run.json, but 'nowhere'"),
    (["export", "full", "--format", "merged", "--out", "new"], "run.json, but 'full'"),
    (["inspect", "nowhere", "full"], "a run's folder must contain run.json, but 'nowhere' does not."),
    (["reproduce", "full"], "a run's folder must contain run.json, but 'full' does not."),
    (["reproduce"], "must have either a folder or `--trial SWEEP/ARM/NUMBER`"),
    (["reproduce", "--trial", "full/lora/0"], "a sweep's folder must contain sweep.json, but 'full' does not."),
    (["train", "data.train=https://me:open-sesame@host/a.csv", "data=table"], "but got 'https://***@host/a.csv'."),
    (["sweep", "mini.yaml", "model.path=https://me:open-sesame@host"], "`model.path` must not contain a password"),
    (["train", "method.rnk=4"], "`method.rnk` is not a setting. Did you mean `method.rank`?"),
    (["train", "r=4"], "`r` is not a setting. PEFT's `r` is `method.rank` here."),
    (["train", "method.lora_alpha=4"], "`method.lora_alpha` is not a setting. PEFT's `lora_alpha` is `method.alpha`"),
    (["train", "method=bitfit"], "`method.train=biases` needs a model with biases, but LlamaForCausalLM has none."),
    (["train", "method=intrinsic", "method.dim=6"], "`method.dim` must be more than 6"),
    (["train", "method.rank=1,2"], "Add `-m` to run each of several values"),
    (["train", "model.path=embedded:big"], "`model.path` must name an embedded model (tiny), but got 'embedded:big'."),
    (["train", "output=full"], "`output` must be a new or empty folder, but 'full' is not."),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2_and_changes_nothing(here, mini, capsys, caplog, words, message):
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    (here / "notes.txt").write_text("just words\n")
    empty = MINI | {"arms": {"lora": MINI["arms"]["lora"] | {"space": {}}}}
    (here / "empty.yaml").write_text(yaml.safe_dump(empty))
    before = files_below(here)
    assert run(words) == WRONG_REQUEST == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("lorasweep: ")
    assert message in output.err
    assert output.out == ""
    assert caplog.text == ""  # it would stand on standard error
    assert files_below(here) == before
    assert (here / "notes.txt").read_text() == "just words\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "'mine.yaml' must be a YAML file of settings, but can't be read: No such file or directory."),
        ("folder", "'mine.yaml' must be a YAML file of settings, but can't be read: it is not a regular file."),
        (b"optim.lr: [1", "'mine.yaml' must be a YAML file of settings, but can't be read: while parsing"),
        (b"\xff\xfe\x00", "'mine.yaml' must be a YAML file of settings, but can't be read: 'utf-8' codec"),
        (b"- 1\n- 2", "'mine.yaml' must hold lines such as `optim.lr: 0.001`, but got [1, 2]."),
        (b"1: 2", "'mine.yaml' must hold lines such as `optim.lr: 0.001`, but got {1: 2}."),
        (b"optim.lrr: 1", "`optim.lrr` is not a setting. Did you mean `optim.lr`?"),
        (b"optim.lr: fast", "`optim.lr` must be a number, but got 'fast'."),
    ],
)
def test_a_bad_file_of_settings_is_one_line_and_exit_code_2(here, capsys, content, message):
    if content == "folder":
        (here / "mine.yaml").mkdir()
    elif content is not None:
        (here / "mine.yaml").write_bytes(content)
    assert run(["train", "mine.yaml"]) == WRONG_REQUEST
    output = capsys.readouterr()
    assert output.err.startswith("lorasweep: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert not (here / "outputs").exists()


@pytest.mark.parametrize(
    "override",
    [
        *("method.rank_pattern={down_proj:2}", "++method.rank_pattern={down_proj:2}"),
        *("method.rank_pattern.down_proj=2", "+method.rank_pattern.down_proj=2"),
    ],
)
def test_train_takes_a_mapping_by_layer_as_hydra_does(capsys, here, override):
    assert run(["train", "--cfg", "job", override, "++method.rank=3"]) == DONE
    method = yaml.safe_load(capsys.readouterr().out)["method"]
    assert (method["rank"], method["rank_pattern"]) == (3, {"down_proj": 2})


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in ("sweep", "plan", "compare", "inspect", "export"))]
)
def test_help_is_shown(capsys, words):
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert ended.value.code == 0
    assert "usage: lorasweep" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    shown = capsys.readouterr().out
    for command in ("sweep", "train", "plan", "compare", "inspect", "export"):
        assert f"\n    {command} " in shown


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["swep"],
        ["compare"],
        ["sweep", "--resum"],
        ["export", "run"],
        ["export", "run", "--format", "gguf", "--out", "new"],
    ],
)
def test_a_command_that_is_not_understood_ends_with_2(capsys, words):
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert ended.value.code == 2
    assert "usage: lorasweep" in capsys.readouterr().err


def test_main_ends_the_process_with_the_exit_code(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "nowhere"])
    assert ended.value.code == 2


def test_the_help_of_train_lists_what_train_takes_and_nothing_of_a_sweep(capsys, here):
    with pytest.raises(SystemExit) as ended:
        run(["train", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: lorasweep train ")
    assert "--from SWEEP[/ARM]" in shown
    assert "method=bitfit|frozen|full|head|intrinsic|lora|peft" in shown
    assert "+experiment=low_memory|quick_check" in shown
    assert not {"pruner=", "sampler=", "worker="} & set(re.findall(r"\w+=", shown))
    assert not files_below(here)


def test_the_help_of_sweep_lists_its_own_groups_and_those_of_its_runs(capsys):
    with pytest.raises(SystemExit):
        run(["sweep", "--help"])
    assert {"pruner=", "method="} <= set(re.findall(r"\w+=", capsys.readouterr().out))


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"], ["train", "-m", "--version", "seed=1"]])
def test_the_version_is_that_of_lorasweep(capsys, words):
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert (ended.value.code, capsys.readouterr().out) == (0, f"lorasweep {version('lorasweep')}\n")


def test_train_shows_its_composed_settings_and_trains_nothing(capsys, here):
    assert run(["train", "--cfg", "job", "method.rank=3", "schedule=cosine"]) == DONE
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["method"]["rank"], shown["schedule"]["name"]) == (3, "cosine")
    assert not files_below(here)


def settings_of(capsys, *words):
    """The settings that `--cfg job` prints, one mapping for each job."""
    capsys.readouterr()
    assert run(["train", "--cfg", "job", *words]) == DONE
    return list(yaml.safe_load_all(capsys.readouterr().out))


def test_flags_stand_between_overrides_too(capsys):
    assert run(["train", "method.rank=3", "--package", "method", "seed=1", "-c", "job", "method.alpha=2"]) == DONE
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["rank"], shown["alpha"]) == (3, 2)


def test_keys_and_groups_are_added_removed_and_forced_as_in_hydra(capsys, here):
    (shown,) = settings_of(capsys, "+optim.foreach=false", "~logger", "++method.rank=3", "optim=sgd", "~optim.momentum")
    assert (shown["optim"]["foreach"], shown["logger"], shown["method"]["rank"]) == (False, {}, 3)
    assert "momentum" not in shown["optim"]
    (swept,) = settings_of(capsys, "optim._target_=torch.optim.RMSprop", "optim.momentum=0.5")
    assert "beta1" not in swept["optim"]  # Hydra alone would keep it


def test_shipped_experiments_change_several_groups_and_typed_keys_win(capsys):
    (quick,) = settings_of(capsys, "+experiment=quick_check", "trainer.batch_size=2")
    assert (list(quick["callbacks"]), quick["trainer"]["max_steps"], quick["trainer"]["batch_size"]) == (
        ["lr_monitor"],
        20,
        2,
    )
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


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "my_parts/conf"],
        ["--config-dir=my_parts/conf"],
        ["hydra.searchpath=[pkg://my_parts.conf]"],
        ["hydra.searchpath=[my_parts/conf]"],
    ],
)
def test_options_are_also_found_in_other_folders_and_packages(capsys, own_groups, words):
    (chosen,) = settings_of(capsys, *words, "method=mine")
    assert chosen["method"]["rank"] == 5
    (added,) = settings_of(capsys, *words, "+experiment=mine")
    assert (added["method"]["rank"], added["seed"]) == (5, 9)
    assert run(["train", "--cfg", "job", "method=mine"]) == WRONG_REQUEST  # only where they were named


def test_each_job_of_a_grid_is_shown(capsys, here):
    jobs = settings_of(capsys, "-m", "method.rank=1,2", "+experiment=quick_check,low_memory")
    assert [(job["method"]["rank"], job["trainer"]["max_steps"]) for job in jobs] == [
        (1, 20),
        (1, 150),
        (2, 20),
        (2, 150),
    ]
    assert not files_below(here)


def test_a_file_of_settings_is_shown_under_what_was_typed(capsys, here):
    (here / "mine.yaml").write_text("method.rank: 3\nseed: 4\n")
    assert run(["train", "mine.yaml", "--cfg", "job", "seed=5"]) == DONE
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["method"]["rank"], shown["seed"]) == (3, 5)


def test_a_run_changes_a_key_of_the_option_that_its_file_chooses(capsys, here, short):
    (here / "mine.yaml").write_text("data: text\n")
    (here / "book.txt").write_text("\n".join(f"Line {n} says some words." for n in range(400)))
    words = [word for word in short if not word.startswith("data")]
    assert run(["train", "mine.yaml", *words, "data.train=book.txt", "data.block_length=16", "output=out"]) == DONE
    assert read_run(here / "out").config["data"]["train"] == "book.txt"


@pytest.mark.parametrize("flags", [["--info", "searchpath"], ["--cfg", "hydra"], ["--hydra-help"]])
def test_hydra_shows_its_own_settings(capsys, caplog, here, flags):
    with suppress(SystemExit):
        assert run(["train", *flags]) == DONE
    assert "hydra" in capsys.readouterr().out + caplog.text
    assert not files_below(here)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+method.rank=4"], "Either remove + prefix: 'method.rank=4'"),
        (["+method=full"], "Multiple values for method."),
        (["+mine.key=4"], "`mine` is not a setting."),
        (["~method"], "`method` must be set, but is missing."),
        (["~optim.ghost"], "Could not delete from config. 'optim.ghost' does not exist."),
        (["+experiment=ghost"], "Available options in 'experiment': low_memory quick_check."),
        (["experiment=ghost"], "`experiment` must be added with a plus: `+experiment=low_memory`."),
        (["hydra/launcher=ghost"], "`pip install hydra-ghost-launcher`"),
        (["+optim.beta1=0.5"], "An item is already at 'optim.beta1'."),
        (["--config-dir", "ghost"], "/ghost'."),
        (["hydra.searchpath=[pkg://ghost]"], "'pkg://ghost'."),
        (["-m", "method.rank=4,0"], "`method.rank >= 1` must hold, but got 0."),
        (["-m", "method=lora,lorra"], "but got 'lorra'. Did you mean `lora`?"),
        (["-m", "method.rank=1,4", "trainer.devices=2"], "`trainer.devices` must be 1 and `trainer.strategy` auto"),
        (["--cfg", "job", "method.rank=0"], "`method.rank >= 1` must hold, but got 0."),
        (["--cfg", "job", "--package", "ghost"], "must name a group of settings, such as `method`, but got 'ghost'."),
        (["mine.yaml", "--info"], "`--info` must be used without a file of settings or `--from`."),
        (["model=causal_lm"], "`model.path` must be set, but is missing."),
    ],
)
def test_a_wrong_word_of_hydra_is_one_line_and_exit_code_2(capsys, here, words, message):
    (here / "mine.yaml").write_text("seed: 1\n")
    before = files_below(here)
    assert run(["train", *words]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lorasweep: ")
    assert message in line
    assert files_below(here) == before


@pytest.mark.parametrize("flag", ["--experimental-rerun=a.pickle", "--config-name=sweep", "--shell-completion"])
def test_a_flag_of_hydra_that_train_does_not_take_ends_with_2(capsys, flag):
    with pytest.raises(SystemExit) as ended:
        run(["train", flag])
    assert ended.value.code == 2
    assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("lorasweep train method=b", ["method=bitfit"]),
        ("lorasweep train method=intrinsic method.di", ["method.dim="]),
        ("lorasweep train +experiment=", ["+experiment=low_memory", "+experiment=quick_check"]),
        ("lorasweep train --from x --mul", ["--multirun"]),
        ("lorasweep sweep pruner=ha", ["pruner=halving"]),
    ],
)
def test_the_shell_completes_words(here, line, completions):
    written = here / "completions"  # argcomplete closes file descriptors, so it has a process of its own
    words = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(written), "_ARGCOMPLETE_IFS": "\n"}
    subprocess.run([sys.executable, "-m", "lorasweep"], env={**os.environ, **variables, **words}, timeout=60)
    assert [word.strip() for word in written.read_text().split("\n")] == completions


def test_train_runs_once_in_a_new_folder_and_says_the_score(capsys, here, short):
    assert run(["train", *short]) == DONE
    record = read_run(here / "outputs" / "train" / "0001")
    assert record.status == "complete"
    line = capsys.readouterr().out
    assert line.startswith(f"bits_per_byte {record.score:.4f} at step {record.best['step']:.0f} of 4, ")
    assert line.endswith(": outputs/train/0001\n")
    assert {path.name for path in here.iterdir()} == {"outputs"}
    assert run(["train", *short]) == DONE
    assert {path.name for path in (here / "outputs" / "train").iterdir()} == {"0001", "0002"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "nowhere"], "a sweep's folder must contain sweep.json, but 'nowhere' does not."),
        (["settings.yaml", "--from", "nowhere"], "`--from` must be used without a file of settings"),
    ],
)
def test_a_source_of_settings_that_can_not_be_used_is_one_line_and_exit_code_2(here, capsys, words, message):
    (here / "settings.yaml").write_text("method.rank: 2")
    assert run(["train", *words]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_train_writes_where_it_is_told(here, short):
    (here / "mine").mkdir()
    assert run(["train", *short, "output=mine"]) == DONE
    assert read_run(here / "mine").status == "complete"


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_a_run_is_exported_and_the_difference_said(here, short, capsys, format):
    assert run(["train", *short, "output=mine"]) == DONE
    capsys.readouterr()
    words = ["export", "mine", "--format", format, "--out", "new"]
    assert run(words) == DONE
    shown = capsys.readouterr().out
    assert shown.startswith(f"{format}, ")
    assert ("\nits logits differ from the run's by at most " in shown) == (format == "merged")
    assert (here / "new" / {"peft": "adapter_config.json", "merged": "config.json"}[format]).is_file()
    before = files_below(here)
    assert run(words) == WRONG_REQUEST
    assert capsys.readouterr().err == (
        "lorasweep: `--out` must be a new or empty folder, but 'new' is not. Name another folder.\n"
    )
    assert files_below(here) == before


@pytest.mark.slow
def test_a_grid_runs_every_combination_and_leaves_nothing_else(here, short, capsys):
    assert run(["train", "-m", *short, "method.rank=1,2"]) == DONE
    folders = sorted((here / "outputs" / "train").glob("0*"))
    assert [read_run(folder).config["method"]["rank"] for folder in folders] == [1, 2]
    shown = [line for line in capsys.readouterr().out.splitlines() if "trained parameters" in line]
    assert [line.partition(": bits_per_byte ")[0] for line in shown] == ["method.rank=1", "method.rank=2"]
    assert {path.name for path in here.iterdir()} == {"outputs"}
    assert {path.name for path in (here / "outputs" / "train").iterdir()} == {"0001", "0002", "multirun.yaml"}


@pytest.mark.slow
def test_a_run_is_resumed_with_its_settings_only(here, short, capsys):
    words = ["train", *short, "output=run", "resume=true"]
    assert run(words) == DONE  # there is none yet
    first = read_run(here / "run")
    assert run(words) == DONE
    assert read_run(here / "run") == first
    capsys.readouterr()
    assert run([*words, "optim.lr=1e-5"]) == WRONG_REQUEST
    assert "`optim.lr` must be" in capsys.readouterr().err
    assert run(["train", *short, "resume=true"]) == WRONG_REQUEST
    assert "must come with `output=DIR`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_a_grid_that_fails_does_not_end_the_others(here, short, capsys):
    assert run(["train", "-m", *short, "optim.lr=1e30,1e-3"]) == FAILED == 1
    folders = sorted((here / "outputs" / "train").glob("0*"))
    assert [read_run(folder).status for folder in folders] == ["failed", "complete"]
    errors = capsys.readouterr().err
    assert "lorasweep: optim.lr=1e+30: " in errors
    assert "Lower `optim.lr`." in errors


def test_a_run_that_diverges_is_one_line_and_exit_code_1(here, short, capsys):
    assert run(["train", *short, "optim.lr=1e30"]) == FAILED
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("lorasweep: ")


def test_an_interrupted_run_ends_with_130_and_says_where_it_is(here, short, capsys, monkeypatch):
    true_run = api.train_in_folder

    def interrupted(*arguments, stop_requested, **others):
        os.kill(os.getpid(), signal.SIGINT)
        return true_run(*arguments, stop_requested=stop_requested, **others)

    monkeypatch.setattr(api, "train_in_folder", interrupted)
    assert run(["train", *short]) == INTERRUPTED == 130
    assert read_run(here / "outputs" / "train" / "0001").status == "interrupted"
    assert "outputs/train/0001" in capsys.readouterr().err


def test_a_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    stop = StopSignal("To resume type x")

    def send_twice():
        with stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop()
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal must end the block")

    with pytest.raises(KeyboardInterrupt, match="To resume type x"):
        send_twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_is_as_patient_as_the_first():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_ctrl_c_before_anything_runs_ends_with_130(capsys, monkeypatch, mini):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(workbench_file, "build_inputs", interrupted)
    assert run(["sweep", mini]) == INTERRUPTED
    assert capsys.readouterr().err == "lorasweep: interrupted\n"
    assert not Path("outputs").exists()


def test_a_sweep_whose_trials_all_fail_ends_with_1_and_says_where_to_look(capsys, monkeypatch, mini):
    def fail(*_, **__):
        raise Diverged("the training loss became NaN.")

    monkeypatch.setattr(worker_file, "train_run", fail)
    assert run(["sweep", mini, "sweep.max_failures=2"]) == FAILED
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the training loss became NaN." in error
    assert "outputs/mini/runs" in error
    assert read_sweep(Path("outputs/mini")).status == "interrupted"


def test_a_composed_sweep_is_shown_with_all_settings_and_ranges(capsys, here, mini):
    over_rank = "arms.lora.method.alpha={over_rank: [1, 2]}"
    assert run(["sweep", mini, "--cfg", "job", over_rank, "sampler=random", "optim.weight_decay=0.1"]) == DONE
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["name"], shown["sampler"]["name"], shown["confirm"]["seeds"]) == ("mini", "random", 0)
    frozen, lora = shown["arms"]["frozen"], shown["arms"]["lora"]
    assert (frozen["trials"], frozen["method"], lora["trials"]) == (1, {"name": "frozen"}, 2)
    assert (lora["method"]["rank"], lora["method"]["alpha"]) == ([1, 2], {"over_rank": [1, 2]})
    assert (lora["optim"]["weight_decay"], lora["data"]["block_length"]) == (0.1, 32)
    assert files_below(here) == {"mini.yaml"}


@pytest.mark.slow
def test_a_plan_trains_and_writes_nothing(capsys, here, mini):
    before = files_below(here)
    assert run(["plan", mini]) == DONE
    printed = capsys.readouterr()
    assert "lora" in printed.out
    first, *_, last = printed.err.splitlines()
    assert first == "loading the model and the data"
    assert last.startswith("this plan took ")
    assert " s: measuring lora: 1 trial" in printed.err
    assert files_below(here) == before


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


def test_inspect_shows_a_run_as_a_table_json_or_csv_and_writes_its_files(here, short, capsys):
    assert run(["train", *short, "output=one"]) == run(["train", *short, "output=two", "seed=1"]) == DONE
    capsys.readouterr()
    assert run(["inspect", "one", "two"]) == DONE
    shown = capsys.readouterr().out
    assert "updates by kind of layer" in shown
    assert "This run and `two` share" in " ".join(shown.split())
    assert {path.name for path in (here / "one" / "inspect").iterdir()} == {
        "layers.csv",
        "similarity.csv",
        "spectra.json",
    }
    assert run(["inspect", "one", "--format", "json"]) == DONE
    content = json.loads(capsys.readouterr().out)
    assert len(content["layers"]) == 28
    assert run(["inspect", "one", "--format", "csv"]) == DONE
    assert capsys.readouterr().out == (here / "one" / "inspect" / "layers.csv").read_text()


def test_reproduce_says_identical_or_the_first_step_that_differs(here, short, capsys):
    assert run(["train", *short, "output=one"]) == DONE
    capsys.readouterr()
    assert run(["reproduce", "one", "--steps", "1"]) == DONE
    assert capsys.readouterr().out.startswith("identical: 1 steps and 0 evaluations of one and outputs/reproduce/one ")
    log = here / "one" / "steps.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[1]["loss"] += 1.0
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["reproduce", "one", "--output", "new"]) == FAILED
    assert capsys.readouterr().out.startswith("different: first at step 2 loss was ")
    assert run(["reproduce", "one", "--output", "new"]) == WRONG_REQUEST
    assert "`--output` must be a new or empty folder, but 'new' is not." in capsys.readouterr().err
    assert {path.name for path in (here / "outputs" / "reproduce").iterdir()} == {"one"}


def test_a_small_share_of_trained_parameters_is_not_shown_as_none(short, capsys):
    words = [word for word in short if not word.startswith("method.")]
    assert run(["train", "method=intrinsic", "method.dim=20", *words, "output=few"]) == DONE
    assert "20 trained parameters (0.0016 % of the base)" in capsys.readouterr().out


def test_inspecting_what_trained_nothing_is_one_line_and_exit_code_2(short, capsys):
    words = [word for word in short if not word.startswith("method.")]
    assert run(["train", "method=frozen", *words, "output=base"]) == DONE
    capsys.readouterr()
    assert run(["inspect", "base"]) == WRONG_REQUEST
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert "has `method=frozen`. Name a run of another method." in output.err
    assert output.out == ""

"""A sweep file, a conf file or a record of a stranger's runs no code and writes nothing: refused in one sentence."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import yaml

from lorasweep.cli import DONE, WRONG_REQUEST, run
from lorasweep.config.compose import packaged_folder
from lorasweep.config.trust import set_trusted, split_trust
from lorasweep.record import read_sweep

from .test_cli import MINI

SHORT = {**MINI["settings"], "trainer.max_steps": 1}
ONE_ARM = {**MINI, "settings": SHORT, "arms": {"lora": {"settings": {"method": "lora", "method.rank": 1}}}}
RUN_WORDS = [f"{key}={value}" for key, value in SHORT.items() if key.split(".")[0] in ("data", "trainer")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder with a module of a stranger's, which leaves the file `canary` when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    (tmp_path / "evil.py").write_text(
        "import pathlib, lightning, optuna\n"
        "pathlib.Path('canary').write_text('ran')\n"
        "class Callback(lightning.Callback):\n    pass\n"
    )
    yield tmp_path
    set_trusted(())
    sys.modules.pop("evil", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A complete sweep of one run, as a stranger could hand it on."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "one.yaml").write_text(yaml.safe_dump(ONE_ARM))
        assert run(["sweep", "one.yaml", "sweep.output=sweep"]) == DONE
    return folder / "sweep"


def refused(capsys, words, message):
    set_trusted(())
    before = {path: path.stat().st_mtime_ns for path in sorted(path for path in _files())}
    assert run(words) == WRONG_REQUEST
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert shown.out == ""
    assert {path: path.stat().st_mtime_ns for path in sorted(path for path in _files())} == before
    assert "evil" not in sys.modules


def _files():
    from pathlib import Path  # noqa: PLC0415

    return [path for path in Path().rglob("*") if path.is_file()]


CANARY = "touch canary"
SYSTEM = {"callbacks.a._target_": "os.system", "callbacks.a.command": CANARY}
HOSTILE = {
    "os.system": (SYSTEM, "must be a class of a package that is trusted, but got 'os.system'"),
    "a module here": ({"callbacks.a._target_": "evil.Callback"}, "add `trust=[evil]` to the command line"),
    "_partial_": (
        {"callbacks.a._target_": "lightning.pytorch.callbacks.Timer", "callbacks.a._partial_": True},
        "`callbacks.a._partial_` must be an argument of a class",
    ),
    "nested in a list": (
        {
            "schedule._target_": "torch.optim.lr_scheduler.MultiStepLR",
            "schedule.milestones": [{"_target_": "evil.Callback"}],
        },
        "`schedule.milestones.0._target_` must be a class of a package that is trusted",
    ),
    "a sampler": ({"sampler._target_": "evil.Callback"}, "`sampler._target_` must be a class of a package that is"),
    "a pruner": ({"pruner._target_": "os.system"}, "`pruner._target_` must be a class of a package that is trusted"),
    "a strategy": ({"trainer.strategy._target_": "evil.Callback"}, "`trainer.strategy._target_` must be a class of a"),
    "a profiler": ({"trainer.profiler._target_": "os.system"}, "`trainer.profiler._target_` must be a class of a"),
    "an environment variable": ({"logger": "csv", "logger.csv.prefix": "${oc.env:HOME}"}, "but got '${oc.env:'"),
    "a factory": (
        {"model": "own", "model.factory": "evil:build", "model.kind": "causal_lm"},
        "`model.factory` must be code that you trust, but got 'evil:build'",
    ),
    "remote code": (
        {"model": "own", "model.path": "theirs", "model.trust_remote_code": True},
        "add `trust=[transformers_modules]` to the command line",
    ),
    "trust itself": ({"trust": ["evil"], "callbacks.a._target_": "evil.Callback"}, "trust"),
}


@pytest.mark.parametrize(("settings", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_sweep_file_runs_nothing(here, capsys, settings, message):
    before = {k: v for k, v in SHORT.items() if k != "pruner" or "pruner._target_" not in settings}
    content = {**ONE_ARM, "settings": {**before, **settings}}
    (here / "theirs.yaml").write_text(yaml.safe_dump(content))
    refused(capsys, ["sweep", "theirs.yaml"], message)
    assert not (here / "canary").exists()


def test_a_class_that_is_searched_is_checked_too(here, capsys):
    arm = {"settings": {"optim._target_": "torch.optim.SGD"}, "trials": 2}
    arm["space"] = {"optim._target_": ["torch.optim.SGD", "evil.Callback"]}
    (here / "theirs.yaml").write_text(yaml.safe_dump({**ONE_ARM, "arms": {"lora": arm}}))
    refused(capsys, ["plan", "theirs.yaml"], "`optim._target_` must be a class of a package that is trusted")


def test_a_conf_file_of_a_strangers_runs_nothing(here, capsys):
    (here / "conf" / "optim").mkdir(parents=True)
    (here / "conf" / "optim" / "theirs.yaml").write_text("_target_: evil.Callback\nlr: 0.1\n")
    refused(capsys, ["train", "optim=theirs"], "`optim._target_` must be a class of a package that is trusted")
    (here / "conf" / "model").mkdir()
    theirs = (packaged_folder("conf") / "model" / "own.yaml").read_text().replace("factory: ???", "factory: evil:build")
    (here / "conf" / "model" / "theirs.yaml").write_text(theirs)
    refused(capsys, ["train", "model=theirs"], "`model.factory` must be code that you trust, but got 'evil:build'")


@pytest.mark.parametrize(
    ("command", "where"), [("compare", "file"), ("reproduce", "overrides"), ("sweep --resume", "file")]
)
def test_a_strangers_sweep_runs_nothing(here, capsys, made, command, where):
    shutil.copytree(made, here / "theirs")
    record = json.loads((here / "theirs" / "sweep.json").read_text())
    place = record["definition"]["file"]["settings"] if where == "file" else record["definition"]["overrides"]
    place["callbacks.a._target_"] = "evil.Callback"
    record["source"] = None
    (here / "theirs" / "sweep.json").write_text(json.dumps(record))
    refused(capsys, [*command.split(), "theirs"], "callbacks.a._target_` must be a class of a package")
    assert not (here / "canary").exists()


@pytest.mark.parametrize("command", ["reproduce", "inspect", "export --format peft --out new"])
def test_a_strangers_run_runs_nothing(here, capsys, made, command):
    (folder,) = (made / "runs").iterdir()
    shutil.copytree(folder, here / "theirs")
    record = json.loads((here / "theirs" / "run.json").read_text())
    record["config"]["callbacks"] = {"a": {"_target_": "evil.Callback"}}
    (here / "theirs" / "run.json").write_text(json.dumps(record))
    words = command.split()
    refused(capsys, [words[0], "theirs", *words[1:]], "callbacks.a._target_` must be a class of a package")
    assert not (here / "canary").exists()


@pytest.mark.parametrize(
    ("word", "package"),
    [
        ("model.factory=mine.models:build", "mine"),
        ("arms.lora.data.factory='mine:Data'", "mine"),
        ("model.trust_remote_code=True", "transformers_modules"),
        ("model.allow_pickle=true", "pickle"),
        ("model.allow_pickle=false", None),
    ],
)
def test_code_that_is_typed_is_trusted(word, package):
    assert split_trust([word]) == ([package] if package else [], [word])


def test_trust_in_a_record_is_no_setting(here, capsys, made):
    shutil.copytree(made, here / "theirs")
    record = json.loads((here / "theirs" / "sweep.json").read_text())
    record["definition"]["overrides"] |= {"trust": ["evil"], "callbacks.a._target_": "evil.Callback"}
    record["source"] = None
    (here / "theirs" / "sweep.json").write_text(json.dumps(record))
    refused(capsys, ["sweep", "--resume", "theirs"], "trust")


@pytest.mark.parametrize("word", ["trust=[a/b]", "trust=evil.Callback", "trust=['']"])
def test_what_is_no_package_is_not_trusted(capsys, word):
    refused(capsys, ["sweep", "quickstart", word], "`trust` must be names of packages")


def test_the_user_trusts_a_package_for_one_command_and_says_it_again_to_go_on(here, capsys):
    (here / "mine.yaml").write_text(yaml.safe_dump(ONE_ARM))
    words = ["callbacks.a._target_=evil.Callback", "sweep.output=mine"]
    assert run(["sweep", "mine.yaml", *words, "trust=[evil]"]) == DONE
    assert (here / "canary").exists()
    assert "trust" not in str(read_sweep(here / "mine").definition)
    sys.modules.pop("evil")
    capsys.readouterr()
    refused(capsys, ["sweep", "--resume", "mine"], "add `trust=[evil]` to the command line")
    refused(capsys, ["compare", "mine"], "`--trust` to others")
    assert run(["sweep", "--resume", "mine", "trust=evil"]) == DONE
    assert run(["compare", "mine", "--trust"]) == DONE
    (folder,) = (here / "mine" / "runs").iterdir()
    assert run(["reproduce", str(folder), "--trust"]) == DONE


def test_a_single_run_takes_trust_and_new_arguments(here, capsys):
    words = [*RUN_WORDS, "optim=sgd", "optim.nesterov=true", "callbacks.a._target_=evil.Callback", "output=one"]
    refused(capsys, ["train", *words], "add `trust=[evil]` to the command line")
    assert run(["train", *words, "trust=[evil]"]) == DONE
    record = json.loads((here / "one" / "run.json").read_text())
    assert record["config"]["optim"]["_target_"] == "torch.optim.SGD"
    assert record["config"]["optim"]["nesterov"] is True

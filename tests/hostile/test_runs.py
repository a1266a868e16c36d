"""`export`, `reproduce` and `train --from` on a stranger's run read it or refuse it in one sentence."""

import shutil

import pytest
from tests.files import set_values
from tests.hostile.commands import feed
from tests.small_runs import OWN_MODULE

from lorasweep.config.build import as_settings
from lorasweep.config.compose import compose_run
from lorasweep.outcome import DONE, WRONG_REQUEST

RUN = "theirs/runs/lora-0000"
COMMANDS = {
    "peft": ["export", RUN, "--format", "peft", "--out", "out"],
    "merged": ["export", RUN, "--format", "merged", "--out", "out"],
}
CODE = {"_target_": "evil.Callback"}
SETTINGS = [
    {"config/optim": CODE | {"lr": 1}},
    {"config/trainer/strategy": CODE},
    {"config/model/path": "../../outside"},
    {"config/method": {"name": "peft", "config": {"peft_type": "evil.X"}}},
    {"files": {"best/../../../../outside/kept": {"bytes": 4, "sha256": "0"}}},
]
ADAPTERS = [{"peft_type": "evil.X"}, {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}]


@pytest.mark.parametrize("values", SETTINGS, ids=lambda values: next(iter(values)))
def test_odd_settings_of_a_run_are_used_or_refused(theirs, values, capsys):
    set_values(theirs / "runs/lora-0000/run.json", values)
    for command in COMMANDS.values():
        feed(*command, capsys=capsys)


@pytest.mark.parametrize("values", ADAPTERS, ids=lambda values: next(iter(values)))
def test_the_settings_of_an_adapter_run_no_code(theirs, values, capsys):
    set_values(theirs / "runs/lora-0000/run.json", {"files": {}})  # a stranger can write any hash of a file
    set_values(theirs / "runs/lora-0000/best/adapter_config.json", values)
    for command in COMMANDS.values():
        feed(*command, capsys=capsys)
        shutil.rmtree(theirs.parent / "out", ignore_errors=True)


@pytest.mark.parametrize(
    "values",
    [
        {"arms/2/name": "../x"},
        {"settings/2/params": {"callbacks.a._target_": "evil.Callback"}},
        {"definition/file/settings": {"output": "outside"}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_settings_of_a_sweep_are_used_or_refused(theirs, values, capsys):
    set_values(theirs / "sweep.json", values)
    feed("train", "--from", "theirs/lora", "--cfg", "job", capsys=capsys)
    feed("sweep", "--resume", "theirs", "--cfg", "job", capsys=capsys)
    feed("export", "theirs/lora", "--format", "peft", "--out", "out", capsys=capsys)


def test_the_code_of_a_strangers_model_needs_trust(theirs, capsys):
    set_values(theirs / "runs/lora-0000/run.json", {"config/model/trust_remote_code": True})
    assert feed(*COMMANDS["peft"]) == WRONG_REQUEST
    refused = capsys.readouterr().err
    assert all(word in refused for word in ("`model.trust_remote_code`", "--trust"))


def test_the_code_of_an_objective_runs_in_no_export(theirs, capsys, monkeypatch):
    set_values(theirs / "runs/lora-0000/run.json", {"config/objective": {"_target_": "evil.Objective"}})
    assert feed(*COMMANDS["peft"]) == DONE
    config = compose_run(OWN_MODULE | {"module._target_": "evil.Module", "datamodule._target_": "evil.Data"})
    set_values(theirs / "runs/lora-0000/run.json", {"config": as_settings(config)})
    monkeypatch.setattr("lorasweep.commands.quick_imports", pytest.fail)  # refused before torch is loaded
    assert feed(*COMMANDS["peft"][:-1], "other") == WRONG_REQUEST
    refused = capsys.readouterr().err.splitlines()[-1]
    assert "no model of transformers" in refused
    assert "--trust" not in refused

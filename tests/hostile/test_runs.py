"""`inspect`, `export`, `reproduce` and `train --from` on a stranger's run read it or refuse it in one sentence."""

import math
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.files import DELETED, edit_json, set_values
from tests.fuzzing import feed

from lorasweep.config.build import as_settings
from lorasweep.config.compose import compose_run
from lorasweep.outcome import DONE, WRONG_REQUEST
from lorasweep.record import read_steps

RUN = "theirs/runs/lora-0000"
COMMANDS = {
    "inspect": ["inspect", RUN],
    "peft": ["export", RUN, "--format", "peft", "--out", "out"],
    "merged": ["export", RUN, "--format", "merged", "--out", "out"],
}
HANGS = "([a-z_.0-9]+)+!"  # a name of 40 letters takes centuries
NAN = math.nan
CODE = {"_target_": "evil.Callback"}
SETTINGS = [
    {"config/model/trust_remote_code": True},
    {"config/module": CODE},
    {"config/optim": CODE | {"lr": 1}},
    {"config/trainer/strategy": CODE},
    {"config/model/path": "../../outside"},
    {"config/model/path": "embedded:../../x"},
    {"config/model/path": "a\0b"},
    {"config/model/path": "outside/fifo"},
    {"config/model/quantization": "zzz"},
    {"config/model": None},
    {"config": {"a": f"<<{'[' * 150}{']' * 150}>>"}},
    {"config/method/rank": 10**400},
    {"config/method/targets": [f"re:{HANGS}"]},
    {"config/method/rank_pattern": {f"re:{HANGS}": 2}},
    {"config/method": {"name": "peft", "config": {"peft_type": "evil.X"}}},
    {"config/trainer/batch_size": 1e308},
    {"config/seeds/init": -1},
    {"platform/precision": "fp64"},
    {"base/fingerprint": None},
    {"base/labels": {"kind": "x"}},
    {"files": {"best/../../../../outside/kept": {"bytes": 4, "sha256": "0"}}},
    {"files/best~adapter_config.json/bytes": 0},
    {"data": None},
]
ADAPTERS = [
    {"rank_pattern": {HANGS: 2}},
    {"target_modules": HANGS},
    {"target_modules": "("},
    {"target_modules": "(a{1,9999}){1,9999}"},
    {"target_modules": "(?R)"},
    {"target_modules": "a|" * 100_000},
    {"target_modules": "(" * 5000 + ")" * 5000},
    {"target_modules": 3},
    {"rank_pattern": {f".*{number}": 2 for number in range(10_001)}},
    {"modules_to_save": [HANGS]},
    {"r": 0},
    {"r": 10**400},
    {"r": DELETED},
    {"lora_alpha": 1e308},
    {"lora_alpha": "x"},
    {"alpha_pattern": {"q_proj": 1e308}},
    {"rank_pattern": {"q_proj": -1}},
    {"peft_type": ["LORA"]},
    {"peft_type": DELETED},
    {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}},
    {"layers_to_transform": "x"},
    {"init_lora_weights": [1]},
    {"unknown": "x" * 1_000_000},
    {"unknown": f"<<{'[' * 100_000}>>"},
]


def header(text):
    return struct.pack("<Q", len(text)) + text


WEIGHTS = [
    b"",
    b"\xff" * 8,
    header(b"[" * 100_000),
    header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
    header(b'{"__metadata__":{"base_fingerprint":"x"}}'),
    b"\x80\x04cevil\nX\n.",  # a pickle
]
VALUES = {
    "nan": lambda tensor: tensor * NAN,
    "large": lambda tensor: torch.full_like(tensor, 3e38),
    "zero": torch.zeros_like,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "transposed": lambda tensor: tensor.t().contiguous(),
    "scalar": torch.sum,
}


@pytest.fixture(params=COMMANDS)
def use(request, theirs, capsys):
    """Calls a command on the run: inspects it, or exports it in one of the formats."""

    def call(*, checks_files=True):
        if not checks_files:  # a stranger can write what the record says of the files
            set_values(theirs / "runs/lora-0000/run.json", {"files": {}})
        return feed(*COMMANDS[request.param], capsys=capsys)

    return call


@pytest.mark.parametrize("values", SETTINGS, ids=lambda values: next(iter(values)))
def test_odd_settings_of_a_run_are_used_or_refused(theirs, values, capsys):
    def change(raw):
        for place, value in values.items():
            *parents, key = place.replace("~", "\n").split("/")
            inner = raw
            for part in parents:
                inner = inner[part.replace("\n", "/")]
            inner[key] = value

    edit_json(theirs / "runs/lora-0000/run.json", change)
    for command in COMMANDS.values():
        feed(*command, capsys=capsys)


@pytest.mark.parametrize("values", ADAPTERS, ids=lambda values: next(iter(values)))
def test_odd_settings_of_an_adapter_are_used_or_refused(theirs, use, values):
    set_values(theirs / "runs/lora-0000/best/adapter_config.json", values)
    use(checks_files=False)


@pytest.mark.parametrize("content", WEIGHTS, ids=range(len(WEIGHTS)))
def test_damaged_weights_are_refused(theirs, use, content):
    (theirs / "runs/lora-0000/best/adapter_model.safetensors").write_bytes(content)
    use(checks_files=False)
    assert use() != DONE


@pytest.mark.parametrize("kind", VALUES)
def test_odd_weights_are_used_or_refused(theirs, use, kind):
    path = theirs / "runs/lora-0000/best/adapter_model.safetensors"
    save_file({name: VALUES[kind](tensor) for name, tensor in load_file(path).items()}, path)
    use(checks_files=False)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["run.json", "best/adapter_config.json", "best/adapter_model.safetensors"])
def test_what_is_no_file_is_not_read(theirs, use, name, make):
    path = theirs / "runs/lora-0000" / name
    set_values(theirs / "runs/lora-0000/run.json", {"files": {}})
    path.unlink()
    make(path)
    assert use() == WRONG_REQUEST


@pytest.mark.parametrize("name", ["run.json", "best/adapter_config.json"])
def test_small_files_of_1_tb_are_not_read(theirs, use, name):
    set_values(theirs / "runs/lora-0000/run.json", {"files": {}})
    os.truncate(theirs / "runs/lora-0000" / name, 2**40)  # takes no space on the disk
    assert use() == WRONG_REQUEST


def test_a_log_of_1_tb_is_read_up_to_its_damage(theirs):
    rows = list(read_steps(theirs / "runs/lora-0000"))
    os.truncate(theirs / "runs/lora-0000/steps.jsonl", 2**40)
    assert list(read_steps(theirs / "runs/lora-0000")) == rows != []


@pytest.mark.parametrize(
    "values",
    [
        {"config/logger": {"a": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "outside"}}},
        {"config/trainer/max_steps": 10**400},
        {"platform/threads": 10**9, "batching/micro_batches": "x"},
        {"config/data": {"name": "text", "train": "outside/fifo"}},
        {"config/data": {"name": "table", "train": "/dev/zero"}},
        {"steps_planned": 2**62},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_run_is_repeated_below_the_output_alone(theirs, values, capsys):
    set_values(theirs / "runs/lora-0000/run.json", values)
    feed("reproduce", RUN, "--output", "out", capsys=capsys)


@pytest.mark.parametrize(
    "values",
    [
        {"arms/2/name": "../x"},
        {"settings": []},
        {"settings/2/params": {"callbacks.a._target_": "evil.Callback"}},
        {"settings/2/params": {"method.rank": {"a": 1}}},
        {"definition/file/settings": {"output": "outside"}},
        {"definition/file": [1]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_settings_of_a_sweep_are_used_or_refused(theirs, values, capsys):
    set_values(theirs / "sweep.json", values)
    feed("train", "--from", "theirs/lora", "--cfg", "job", capsys=capsys)
    feed("sweep", "--resume", "theirs", "--cfg", "job", capsys=capsys)
    feed("export", "theirs/lora", "--format", "peft", "--out", "out", capsys=capsys)


@pytest.mark.parametrize("command", ["inspect", "peft"])
def test_the_code_of_a_strangers_model_needs_trust(theirs, capsys, command):
    set_values(theirs / "runs/lora-0000/run.json", {"config/model/trust_remote_code": True})
    assert feed(*COMMANDS[command]) == WRONG_REQUEST
    refused = capsys.readouterr().err
    assert all(word in refused for word in ("`model.trust_remote_code`", "--trust"))


def test_the_code_of_an_objective_runs_in_no_export(theirs, capsys, monkeypatch):
    set_values(theirs / "runs/lora-0000/run.json", {"config/objective": {"_target_": "evil.Objective"}})
    assert feed(*COMMANDS["peft"]) == DONE
    own = {"module._target_": "evil.Module", "datamodule._target_": "evil.Data"}
    config = compose_run({**own, "metric.name": "val_acc", "metric.direction": "maximize"})
    set_values(theirs / "runs/lora-0000/run.json", {"config": as_settings(config)})
    assert feed(*COMMANDS["inspect"]) == WRONG_REQUEST
    monkeypatch.setattr("lorasweep.commands.quick_imports", pytest.fail)  # refused before torch is loaded
    assert feed(*COMMANDS["peft"]) == WRONG_REQUEST
    asked, refused = capsys.readouterr().err.splitlines()[-2:]
    assert "`module._target_`" in asked
    assert "--trust" in asked
    assert "no model of transformers" in refused
    assert "--trust" not in refused

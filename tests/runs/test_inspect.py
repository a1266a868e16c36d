"""A run inspected from its folder: the files have what was found, nothing else changes, and a sweep goes arm by arm."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from lorasweep.errors import RecordError
from lorasweep.models.load import fingerprint_weights
from lorasweep.runs.inspect import inspect_run, render_inspection
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

from .conftest import edit_json

ADAPTER = "best/adapter_model.safetensors"


def read_csv(text):
    return list(csv.DictReader(text.splitlines()))


def test_files_hold_what_was_found_and_repeat_to_the_byte(runs):
    inspection = inspect_run(runs["lora"])
    folder = runs["lora"] / "inspect"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"layers.csv", "spectra.json"}
    rows = read_csv((folder / "layers.csv").read_text())
    assert [float(row["norm_share"]) for row in rows] == [row.norm_share for row in inspection.layers]
    assert sum(row.norm_share for row in inspection.layers) == pytest.approx(1)
    spectra = json.loads((folder / "spectra.json").read_text())
    for row in inspection.layers:
        assert len(spectra[row.layer]) == row.trained_rank == 2
        assert 1 <= row.energy_rank <= 2
    inspect_run(runs["lora"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("settings", [{"method.init": "pissa"}, {"method.targets": ["q_proj[0:32,64:96]"]}])
def test_files_keep_the_rank_that_trained(settings, tmp_path, make_config, inputs):
    """The adapter file has twice the rank: PiSSA's start, or two parts of a projection, as one plain LoRA."""
    train_run(make_config(settings), RunFolder(path=tmp_path), inputs=inputs)
    found = inspect_run(tmp_path)
    assert {row.trained_rank for row in found.layers} == {2}
    assert len(found.layers) == (28 if "method.init" in settings else 8)
    # the update is the difference from the start, which PiSSA takes from the base's own weights
    assert all(row.update_norm < 0.5 * row.base_norm for row in found.layers)


def test_an_adapter_of_peft_is_inspected_as_what_it_changes(inputs, make_config, tmp_path):
    vera = {"peft_type": "VERA", "r": 8, "d_initial": 1.0, "target_modules": ["q_proj"]}
    train_run(make_config({"method": "peft", "method.config": vera}), RunFolder(path=tmp_path), inputs=inputs)
    found = inspect_run(tmp_path)
    assert {row.layer for row in found.layers} == {f"model.layers.{n}.self_attn.q_proj" for n in range(4)}
    spectrum = found.spectra["model.layers.0.self_attn.q_proj"]
    # the update has VeRA's rank; the rest is rounding of the merged weight in fp32
    assert spectrum[7] > 100 * spectrum[8]
    assert fingerprint_weights(inputs.base.model) == inputs.base.fingerprint


def zero_b(run):
    tensors = load_file(run / ADAPTER)
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, run / ADAPTER)
    edit_json(run / "run.json", lambda raw: raw.update(files={}))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), r"run\.json"),
        (zero_b, "equal the base"),
        (lambda run: flip_a_bit(run / ADAPTER), "adapter_model.*has changed"),
        (lambda run: (run / "best/adapter_config.json").unlink(), "adapter_config.*is missing"),
        (lambda run: shutil.rmtree(run / "best"), "`best`"),
        (lambda run: edit_json(run / "run.json", lambda raw: raw["config"]["method"].update(rnk=3)), r"method\.rnk"),
        (
            lambda run: edit_json(run / "run.json", lambda raw: raw["config"].update(method={"name": "frozen"})),
            "frozen",
        ),
    ],
)
def test_a_run_that_can_not_be_inspected_is_refused(runs, damage, message):
    damage(runs["lora"])
    with pytest.raises(RecordError, match=message):
        inspect_run(runs["lora"])
    assert not (runs["lora"] / "inspect").exists()


def test_the_table_has_every_kind_of_layer_and_the_sentences(runs):
    inspection = inspect_run(runs["full"])
    console = Console(file=io.StringIO(), width=80)
    console.print(render_inspection(inspection))
    text = console.file.getvalue()
    assert all(kind in text for kind in {row.kind for row in inspection.layers if row.energy_rank is not None})
    assert all(sentence in " ".join(text.split()) for sentence in inspection.sentences)

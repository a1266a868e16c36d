"""A run inspected from its folder: what is found fits the record, what is written is what was found."""

from __future__ import annotations

import csv
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasweep.config.build import as_settings
from lorasweep.config.compose import compose_run
from lorasweep.config.method import FullConfig, HeadConfig, IntrinsicConfig
from lorasweep.errors import RecordError
from lorasweep.lora import lora_layers
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel, fingerprint_weights
from lorasweep.record import compute_sha256
from lorasweep.runs.inspect.inspect_run import (
    build_initial_model,
    inspect_run,
    measure_run,
    read_finished_run,
    restore_trained,
)
from lorasweep.runs.inspect.weight_updates import read_weight_updates
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

from .conftest import edit_json, lora

FILES = {"layers.csv", "spectra.json", "summary.json"}


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_files_hold_what_was_found(runs):
    inspection = inspect_run(runs["lora"])
    folder = runs["lora"] / "inspect"
    assert {path.name for path in folder.iterdir()} == FILES
    rows = read_csv(folder / "layers.csv")
    assert [row["layer"] for row in rows] == [row.layer for row in inspection.layers]
    assert [float(row["norm_share"]) for row in rows] == [row.norm_share for row in inspection.layers]
    assert sum(row.norm_share for row in inspection.layers) == pytest.approx(1)
    spectra = json.loads((folder / "spectra.json").read_text())["singular_values"]
    for row in inspection.layers:
        assert len(spectra[row.layer]) == 2
        assert 1 <= row.energy_rank <= 2
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["format"], summary["version"]) == ("lorasweep.inspection", 1)
    assert summary["sentences"] == list(inspection.sentences)


def test_an_inspection_repeats_to_the_byte(runs):
    inspect_run(runs["lora"])
    before = {path.name: path.read_bytes() for path in (runs["lora"] / "inspect").iterdir()}
    inspect_run(runs["lora"])
    assert {path.name: path.read_bytes() for path in (runs["lora"] / "inspect").iterdir()} == before


def test_a_run_is_like_itself_and_less_like_another(runs):
    itself = inspect_run(runs["lora"], other=runs["lora"])
    assert all(row.phi == pytest.approx(1) for row in itself.overlaps)
    inspection = inspect_run(runs["lora"], other=runs["other"])
    rows = read_csv(runs["lora"] / "inspect" / "similarity.csv")
    means = {(r["i"], r["j"]): float(r["phi"]) for r in rows if r["layer"] == "mean"}
    assert means.keys() == {(i, j) for i in "12" for j in "1234"}
    assert all(0 < value < 1 for value in means.values())
    assert str(runs["other"]) in inspection.sentences[-1]


def test_lora_and_full_are_compared_layer_by_layer(runs):
    inspection = inspect_run(runs["lora"], other=runs["full"])
    assert len({row.layer for row in inspection.overlaps} - {"mean"}) == 28


def test_files_of_an_earlier_inspection_that_no_longer_hold_are_removed(runs):
    inspect_run(runs["lora"], other=runs["other"])
    inspect_run(runs["lora"])
    assert {path.name for path in (runs["lora"] / "inspect").iterdir()} == FILES


def test_inspecting_changes_nothing_else_of_the_run(runs):
    before = {path: compute_sha256(path) for path in runs["lora"].rglob("*") if path.is_file()}
    inspect_run(runs["lora"])
    assert {path: compute_sha256(path) for path in before} == before


def test_inspecting_needs_no_data(runs):
    data = as_settings(compose_run({"data": "text", "data.train": "nowhere.txt"}))["data"]
    edit_json(runs["lora"] / "run.json", lambda raw: raw["config"].update(data=data))
    assert len(inspect_run(runs["lora"]).layers) == 28


def test_a_run_whose_weights_are_the_bases_is_refused(runs):
    path = runs["lora"] / "best/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, path)
    edit_json(runs["lora"] / "run.json", lambda raw: raw.update(files={}))
    with pytest.raises(RecordError, match=r"lora'.*equal the base"):
        inspect_run(runs["lora"])
    assert not (runs["lora"] / "inspect").exists()


def test_runs_that_changed_different_layers_are_not_compared(runs, inputs, make_config, tmp_path):
    for name in ("q_proj", "k_proj"):
        train_run(make_config({"method.targets": [name]}), RunFolder(path=tmp_path / name), inputs=inputs)
    with pytest.raises(RecordError, match=r"k_proj.*`method\.targets`"):
        inspect_run(tmp_path / "q_proj", other=tmp_path / "k_proj")


def test_an_adapter_of_peft_is_inspected_as_what_it_changes(inputs, make_config, tmp_path):
    vera = {"peft_type": "VERA", "r": 8, "d_initial": 1.0, "target_modules": ["q_proj"]}
    train_run(make_config({"method": "peft", "method.config": vera}), RunFolder(path=tmp_path), inputs=inputs)
    found = inspect_run(tmp_path)
    assert {row.layer for row in found.layers} == {f"model.layers.{n}.self_attn.q_proj" for n in range(4)}
    spectrum = found.spectra["model.layers.0.self_attn.q_proj"]
    # the update has VeRA's rank; the rest is rounding of the merged weight in fp32
    assert spectrum[7] > 100 * spectrum[8]
    assert fingerprint_weights(inputs.base.model) == inputs.base.fingerprint


def test_runs_of_different_bases_are_not_compared(runs):
    edit_json(runs["other"] / "run.json", lambda raw: raw["base"].update(fingerprint="f" * 16))
    with pytest.raises(RecordError, match="f" * 16):
        inspect_run(runs["lora"], other=runs["other"])
    assert not (runs["lora"] / "inspect").exists()


def test_a_restored_model_has_the_best_weights_on_the_shared_base(runs, inputs):
    random = torch.random.get_rng_state()
    model = restore_trained(read_finished_run(runs["lora"]), inputs.base)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not model.training
    layers = lora_layers(model)
    assert all(layer.lora_b.any() for layer in layers.values())
    name, layer = next(iter(layers.items()))
    assert layer.weight is inputs.base.model.get_submodule(name).weight


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"run\.json"):
        read_finished_run(tmp_path)


def test_a_run_that_trains_nothing_is_refused(runs):
    with pytest.raises(RecordError, match="`method=frozen`"):
        read_finished_run(runs["frozen"])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_weights_that_are_not_as_written_are_refused(runs, name):
    path = runs["lora"] / "best" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecordError, match=rf"{name}.*has changed"):
        read_finished_run(runs["lora"])
    path.unlink()
    with pytest.raises(RecordError, match=rf"{name}.*is missing"):
        read_finished_run(runs["lora"])


def test_a_run_without_weights_is_refused(runs):
    shutil.rmtree(runs["lora"] / "best")
    with pytest.raises(RecordError, match="`best`"):
        read_finished_run(runs["lora"])


def test_settings_that_this_version_does_not_know_are_refused(runs):
    edit_json(runs["lora"] / "run.json", lambda raw: raw["config"]["method"].update(rnk=3))
    with pytest.raises(RecordError, match=r"`method\.rnk`"):
        read_finished_run(runs["lora"])


def test_another_base_is_refused(runs, inputs):
    base = BaseModel(**{**vars(inputs.base), "fingerprint": "0123456789abcdef"})
    with pytest.raises(RecordError, match="0123456789abcdef"):
        restore_trained(read_finished_run(runs["lora"]), base)


def test_pissa_comes_back_with_the_rank_that_trained(tmp_path, make_config, inputs):
    train_run(make_config({"method.init": "pissa"}), RunFolder(path=tmp_path), inputs=inputs)
    run = read_finished_run(tmp_path)
    found = measure_run(run, inputs.base)
    assert {row.trained_rank for row in found.layers} == {2}
    for change in read_weight_updates(restore_trained(run, inputs.base), inputs.base.model):
        # what trained is near where it started, the layer's principal part; its difference is what is stored
        assert torch.linalg.matrix_norm(change.left @ change.right.double()) < 0.5 * torch.linalg.matrix_norm(
            change.base
        )


@pytest.mark.parametrize("config", [lora(), FullConfig(), HeadConfig(), IntrinsicConfig(dim=40)], ids=str)
def test_a_head_that_the_run_drew_counts_as_its_base(base, config):
    base = BaseModel(**{**vars(base), "new_head_names": ("lm_head",)})
    run = SimpleNamespace(config=SimpleNamespace(seeds=SimpleNamespace(init=5)))
    start = build_initial_model(run, base)
    assert not torch.equal(start.lm_head.weight, base.model.lm_head.weight)
    model = copy_sharing_weights(base.model)
    METHODS[config.name].prepare(
        model, config, generator=torch.Generator().manual_seed(5), new_head_names=base.new_head_names
    )
    assert not any(change.left.any() for change in read_weight_updates(model, start))  # nothing has trained yet

"""A run comes back as it was, or a sentence says why not."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from lorasweep.config.method import FullConfig, HeadConfig, IntrinsicConfig
from lorasweep.errors import RecordError
from lorasweep.lora import lora_layers
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel
from lorasweep.runs.inspect.changes import weight_changes
from lorasweep.runs.inspect.inspect_run import measure_run
from lorasweep.runs.inspect.restore_weights import read_finished_run, require_same_base, restore_trained, starting_model
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunPlace

from .conftest import edit_json, lora


def test_a_restored_model_has_the_best_weights_on_the_shared_base(runs, inputs):
    random = torch.random.get_rng_state()
    model = restore_trained(read_finished_run(runs["lora"]), inputs.base)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not model.training
    layers = lora_layers(model)
    assert all(layer.lora_b.any() for layer in layers.values())
    name, layer = next(iter(layers.items()))
    assert layer.weight is inputs.base.model.get_submodule(name).weight


def test_the_precision_is_that_of_the_run_and_the_device_any(runs):
    edit_json(runs["lora"] / "run.json", lambda raw: raw["platform"].update(precision="bf16"))
    edit_json(runs["lora"] / "run.json", lambda raw: raw["config"]["trainer"].update(precision="auto", device="gpu"))
    trainer = read_finished_run(runs["lora"]).config.trainer
    assert (trainer.precision, trainer.device) == ("bf16", "auto")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"a run's folder must contain run\.json, but .* does not"):
        read_finished_run(tmp_path)


def test_a_run_that_trains_nothing_is_refused(runs):
    with pytest.raises(RecordError, match=r"has `method=frozen`\. Name a run of another method"):
        read_finished_run(runs["frozen"])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_weights_that_are_not_as_written_are_refused(runs, name):
    path = runs["lora"] / "best" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecordError, match=rf"{name}' must be as the run wrote it, but has changed"):
        read_finished_run(runs["lora"])
    path.unlink()
    with pytest.raises(RecordError, match="must be as the run wrote it, but is missing"):
        read_finished_run(runs["lora"])


def test_damaged_weights_without_a_checksum_are_refused_when_loaded(runs, inputs):
    edit_json(runs["lora"] / "run.json", lambda raw: raw.update(files={}))  # as while a run goes on
    path = runs["lora"] / "best/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecordError, match="must be a whole safetensors file"):
        restore_trained(read_finished_run(runs["lora"]), inputs.base)


def test_a_run_without_weights_is_refused(runs):
    shutil.rmtree(runs["lora"] / "best")
    with pytest.raises(RecordError, match="a run must have kept weights in `best`"):
        read_finished_run(runs["lora"])


def test_settings_that_this_version_does_not_know_are_refused(runs):
    edit_json(runs["lora"] / "run.json", lambda raw: raw["config"]["method"].update(rnk=3))
    with pytest.raises(RecordError, match=r"must hold settings of this version.*`method\.rnk` is not a setting"):
        read_finished_run(runs["lora"])


def test_another_base_is_refused(runs, inputs):
    base = BaseModel(**{**vars(inputs.base), "fingerprint": "0123456789abcdef"})
    with pytest.raises(RecordError, match="must be inspected on the base model it was trained on"):
        restore_trained(read_finished_run(runs["lora"]), base)


def test_two_runs_of_different_bases_are_not_compared(runs):
    edit_json(runs["other"] / "run.json", lambda raw: raw["base"].update(fingerprint="f" * 16))
    first, second = read_finished_run(runs["lora"]), read_finished_run(runs["other"])
    with pytest.raises(RecordError, match="two runs must have one base model in one precision to be compared"):
        require_same_base(first, second)
    require_same_base(first, first)


def test_pissa_comes_back_with_the_rank_that_trained(tmp_path, make_config, inputs):
    train_run(make_config({"method.init": "pissa"}), RunPlace(folder=tmp_path), inputs=inputs)
    run = read_finished_run(tmp_path)
    found = measure_run(run, inputs, scores=False)
    assert {row.trained_rank for row in found.layers} == {2}
    for change in weight_changes(restore_trained(run, inputs.base), inputs.base.model):
        # what trained is near where it started, the layer's principal part; its difference is what is stored
        assert torch.linalg.matrix_norm(change.left @ change.right.double()) < 0.5 * torch.linalg.matrix_norm(
            change.base
        )


@pytest.mark.parametrize("config", [lora(), FullConfig(), HeadConfig(), IntrinsicConfig(dim=40)], ids=str)
def test_a_head_that_the_run_drew_counts_as_its_base(base, config):
    base = BaseModel(**{**vars(base), "head": ("lm_head",)})
    run = SimpleNamespace(config=SimpleNamespace(seeds=SimpleNamespace(init=5)))
    start = starting_model(run, base)
    assert not torch.equal(start.lm_head.weight, base.model.lm_head.weight)
    model = copy_sharing_weights(base.model)
    METHODS[config.name].prepare(model, config, generator=torch.Generator().manual_seed(5), new_head_names=base.head)
    assert not any(change.left.any() for change in weight_changes(model, start))  # nothing has trained yet

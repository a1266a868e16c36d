import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasweep.lora import LoraConfig, inject_lora, load_adapter, lora_state, save_adapter

SETTINGS = LoraConfig(rank=2, alpha=8, targets=("up",), dropout=0.1)


@pytest.fixture
def saved(make_model, fill_b, tmp_path):
    """A folder with an adapter of rank 2 on the `up` layers."""
    model = make_model()
    inject_lora(model, SETTINGS)
    fill_b(model)
    save_adapter(model, tmp_path / "adapter", base_path="tiny")
    return tmp_path / "adapter"


def test_peft_reads_what_is_said_of_the_base(make_model, tmp_path):
    model = make_model()
    inject_lora(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path / "plain", base_path="owner/name")
    save_adapter(model, tmp_path / "said", base_path="owner/name", base_revision="v2")
    plain, said = (peft.PeftConfig.from_pretrained(tmp_path / name) for name in ("plain", "said"))
    assert (plain.base_model_name_or_path, plain.revision) == ("owner/name", None)
    assert (said.base_model_name_or_path, said.revision) == ("owner/name", "v2")
    assert torch.equal(*(load_file(tmp_path / n / "adapter_model.safetensors").popitem()[1] for n in ("plain", "said")))


def test_a_failed_write_leaves_what_was_there(make_model, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = make_model()
    inject_lora(model, LoraConfig(rank=4))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, saved, base_path="tiny")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


WEIGHTS = "adapter_model.safetensors"


def change_weights(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def change_tensors(change):
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


DAMAGES = {
    "missing": (lambda folder: (folder / WEIGHTS).unlink(), "can't be read"),
    "cut off": (change_weights(lambda content: content[:-5]), "can't be read"),
    "another tensor": (change_tensors(lambda tensors: {**tensors, "x": torch.zeros(2)}), r"of 'x' .* none .* \(2,\)"),
    "one less": (change_tensors(lambda tensors: dict([*tensors.items()][1:])), r"shape \(.*the file none"),
    "another rank": (change_tensors(lambda tensors: {k: t[:1] for k, t in tensors.items()}), r"\(2, 8\) .* \(1, 8\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(make_model, saved, damage):
    apply, words = DAMAGES[damage]
    apply(saved)
    model = make_model()
    with pytest.raises(ValueError, match="must have LoRA layers"):
        load_adapter(model, saved)
    inject_lora(model, SETTINGS)
    before = {key: tensor.clone() for key, tensor in lora_state(model).items()}
    with pytest.raises(ValueError, match=words):
        load_adapter(model, saved)
    assert all(torch.equal(tensor, before[key]) for key, tensor in lora_state(model).items())

import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.files import edit_json

from lorasweep.lora import LoraConfig, inject_lora, load_adapter, lora_layers, save_adapter


@pytest.fixture
def saved(make_model, fill_b, tmp_path):
    """A folder with an adapter of rank 2 on the `up` layers."""
    model = make_model()
    inject_lora(model, LoraConfig(rank=2, alpha=8, targets=("up",), dropout=0.1))
    fill_b(model)
    save_adapter(model, tmp_path / "adapter", base_path="tiny", base_fingerprint="abc")
    return tmp_path / "adapter"


def test_saved_and_loaded_is_the_same(make_model, fill_b, tokens, tmp_path):
    model = make_model()
    coverage = inject_lora(model, LoraConfig(rank=2, alpha=8, scaling="alpha_over_sqrt_rank", targets=("up", "0.proj")))
    fill_b(model)
    save_adapter(model, tmp_path, base_path="tiny")
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    save_adapter(model, tmp_path, base_path="tiny")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    loaded = make_model()
    load_adapter(loaded, tmp_path)
    assert set(lora_layers(loaded)) == set(coverage.layers)
    assert torch.equal(loaded(tokens), model(tokens))
    trained, expected = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (loaded, model))
    assert trained == expected


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


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut_weights(length):
    def cut(folder):
        file = folder / WEIGHTS
        file.write_bytes(file.read_bytes()[:length])

    return cut


def change_config(**changes):
    return lambda folder: edit_json(folder / CONFIG, lambda settings: settings.update(changes))


def change_tensors(change):
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NO_CONFIG, NO_WEIGHTS = [CONFIG, "must be a LoRA configuration"], [WEIGHTS, "must be a whole safetensors file"]
DAMAGES = {
    "missing weights": (lambda folder: (folder / WEIGHTS).unlink(), NO_WEIGHTS),
    **{f"cut off at {length}": (cut_weights(length), NO_WEIGHTS) for length in (-5, 20, 0)},
    "other weights": (write(WEIGHTS, b"\xff" * 100), NO_WEIGHTS),
    "missing config": (lambda folder: (folder / CONFIG).unlink(), NO_CONFIG),
    "half a config": (write(CONFIG, b'{"peft_type": '), NO_CONFIG),
    "peft_type": (change_config(peft_type="IA3"), ["`peft_type` must be LORA, but got 'IA3'"]),
    "lora_bias": (change_config(lora_bias=True), ["got `lora_bias` True"]),
    "bias": (change_config(bias="all"), ["got `bias` 'all'"]),
    "target_modules": (change_config(target_modules=None), NO_CONFIG),
    "other target_modules": (change_config(target_modules=["upp"]), ["Did you mean `up`"]),
    "r": (change_config(r=0), NO_CONFIG),
    "lora_alpha": (change_config(lora_alpha=10**400), NO_CONFIG),
    "rank_pattern": (change_config(rank_pattern={"up": 10**400}), NO_CONFIG),
    "memory": (change_config(r=10**9), ["shape (1000000000, 8)", "got (2, 8)"]),  # before memory is taken
    "another tensor": (
        change_tensors(lambda tensors: {**tensors, "base_model.model.embed.weight": torch.zeros(11, 8)}),
        ["'base_model.model.embed.weight' is not"],
    ),
    "integers": (
        change_tensors(lambda tensors: {key: tensor.int() for key, tensor in tensors.items()}),
        ["dtype like torch.float32", "torch.int32"],
    ),
    "another base": (lambda folder: None, ["must be 'abc'", "but got 'xyz'"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(make_model, saved, damage):
    apply, words = DAMAGES[damage]
    apply(saved)
    model = make_model()
    with pytest.raises(ValueError, match="must ") as raised:
        load_adapter(model, saved, base_fingerprint="xyz" if damage == "another base" else "abc")
    assert [word for word in words if word not in str(raised.value)] == []
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), make_model().parameters(), strict=True))

import json
import os
import shutil

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.fuzzing import FUZZ, NESTED, damage, damage_bytes, refusal_allowed

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


def assert_refused(make_model, folder, message, **kwargs):
    """Loading fails with `message` and leaves a fresh model as it was."""
    model = make_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder, **kwargs)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), make_model().parameters(), strict=True))


def test_another_base_is_refused_by_its_fingerprint(make_model, saved):
    assert_refused(make_model, saved, "must be 'abc'.* but got 'xyz'", base_fingerprint="xyz")
    load_adapter(make_model(), saved, base_fingerprint="abc")


def test_files_that_are_missing_or_broken_are_refused(make_model, saved):
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    whole = weights.read_bytes()
    for broken in (whole[:-5], whole[:20], b"", b"\xff" * 100):
        weights.write_bytes(broken)
        assert_refused(make_model, saved, "must be a whole safetensors file")
    weights.unlink()
    assert_refused(make_model, saved, "adapter_model.safetensors' must be")
    for broken in ('{"peft_type": ', NESTED):
        config.write_text(broken)
        assert_refused(make_model, saved, "adapter_config.json' must be a LoRA configuration")
    config.unlink()
    assert_refused(make_model, saved, "adapter_config.json' must be a LoRA configuration")
    os.mkfifo(config)
    assert_refused(make_model, saved, "it is not a regular file")  # and is not opened


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "`peft_type` must be LORA, but got 'IA3'"),
        ({"lora_bias": True}, "got `lora_bias` True"),
        ({"bias": "all"}, "got `bias` 'all'"),
        ({"target_modules": None}, "must be a LoRA configuration"),
        ({"r": 0}, "must be a LoRA configuration"),
        ({"lora_alpha": 10**400}, "must be a LoRA configuration"),
        ({"rank_pattern": {"up": 10**400}}, "must be a LoRA configuration"),
        ({"target_modules": ["upp"]}, "Did you mean `up`"),
        ({"r": 10**9}, r"shape \(1000000000, 8\) .* got \(2, 8\)"),  # before memory is taken
    ],
)
def test_a_configuration_that_would_be_misread_is_refused(make_model, saved, changes, message):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_refused(make_model, saved, message)


def test_tensors_that_do_not_belong_are_refused(make_model, saved):
    path = saved / "adapter_model.safetensors"
    good = load_file(path)
    save_file({**good, "base_model.model.embed.weight": torch.zeros(11, 8)}, path)
    assert_refused(make_model, saved, "'base_model.model.embed.weight' is not")
    save_file({key: tensor.int() for key, tensor in good.items()}, path)
    assert_refused(make_model, saved, "dtype like torch.float32, but got .* torch.int32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@FUZZ
@given(data=st.data())
def test_a_damaged_adapter_is_loaded_or_refused(make_model, saved, name, data):
    folder = saved.with_name("damaged")
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    content = (saved / name).read_bytes()
    (folder / name).write_bytes(data.draw(damage(content) if name.endswith(".json") else damage_bytes(content)))
    with refusal_allowed(unchanged=saved.parent, error=ValueError):
        load_adapter(make_model(), folder)

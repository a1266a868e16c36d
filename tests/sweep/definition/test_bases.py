"""A quantisation for the whole sweep is for arms that leave the base as it is; the others have the unquantised base."""

from __future__ import annotations

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.packing import plan_packing


def quantizations(definition):
    return {arm.name: {config.model.quantization for config in arm.corner_configs} for arm in definition.arms}


def test_arms_that_train_weights_of_the_base_have_it_unquantised(write_file, content):
    content["settings"]["model.quantization"] = "nf4"
    content["arms"]["head"] = {"settings": {"method": "head"}}
    definition = read_definition(write_file(content), [])
    assert quantizations(definition) == {"frozen": {"nf4"}, "lora": {"nf4"}, "full": {"none"}, "head": {"none"}}


def test_a_model_of_the_sweep_may_be_quantised_by_its_file(write_file, content, tmp_path, monkeypatch):
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [causal_lm, _self_]\nname: mine\npath: own/name\nquantization: nf4\n")
    monkeypatch.chdir(tmp_path)
    content["settings"]["model"] = "mine"
    assert quantizations(read_definition(write_file(content), []))["full"] == {"none"}
    content["settings"]["model"] = "tiny"
    content["arms"]["full"]["settings"]["model"] = "mine"
    with pytest.raises(ConfigError, match=r"arm `full`: `model.quantization` must be none with `method=full`"):
        read_definition(write_file(content), [])


def test_arms_on_different_bases_share_no_packs(write_file, content):
    del content["settings"]["worker.pack_size"]
    lora = content["arms"].pop("lora")
    for kind in ("none", "nf4"):
        content["arms"][f"lora-{kind}"] = lora | {"settings": {"method": "lora", "model.quantization": kind}}
    definition = read_definition(write_file(content), [])
    plans = plan_packing(definition)
    keys = [plans[f"lora-{kind}"].key for kind in ("none", "nf4")]
    assert None not in keys
    assert len(set(keys)) == 2

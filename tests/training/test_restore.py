"""A run's folder gives back the model that it trained; what does not fit its record is refused."""

import dataclasses

import pytest
import torch
from tests.training.runs import VERA

from lorasweep.errors import ConfigError, RecordError
from lorasweep.methods import bind
from lorasweep.models.load import fingerprint_weights
from lorasweep.record import read_run, restore_config
from lorasweep.training.finished_run import check_kept_files, restore_base, restore_model
from lorasweep.training.open_run import RunFolder
from lorasweep.training.prepare import prepare_model
from lorasweep.training.run import train_alone

METHOD_SETTINGS = (
    {"method.dropout": 0.5},
    {"method": "full"},
    {"method": "full", "method.parameters": "lm_head.*"},
    {"method": "intrinsic"},
    {"method": "peft", "method.config": VERA | {"vera_dropout": 0.5}},
)
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("settings", METHOD_SETTINGS, ids=lambda settings: settings.get("method", "lora"))
def test_a_restored_model_is_the_trained_one_without_dropout(make_config, inputs, tmp_path, settings):
    config, before = make_config(settings), fingerprint_weights(inputs.base.model)
    train_alone(config, RunFolder(path=tmp_path), inputs=inputs)
    assert restore_config(read_run(tmp_path)) == config
    restored = restore_model(config, inputs.base, folder=tmp_path / "best")
    assert not any(module.training for module in restored.modules())
    with torch.inference_mode():
        logits = restored(input_ids=TOKENS).logits
        if not (method := bind(config.method)).loads_onto_base:
            prepared = prepare_model(config, inputs.base).eval()
            method.load(prepared, tmp_path / "best")
            assert torch.equal(logits, prepared(input_ids=TOKENS).logits)
        assert not torch.equal(logits, inputs.base.model(input_ids=TOKENS).logits)
    assert fingerprint_weights(inputs.base.model) == before


def test_an_adapter_is_put_on_without_drawing_its_start_again(finished, inputs):
    """So a start that another machine works out otherwise does no harm, nor does a seed."""
    config = restore_config(read_run(finished))
    first = restore_model(config, inputs.base, folder=finished / "best")
    other = dataclasses.replace(config, seeds=dataclasses.replace(config.seeds, init=7))
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    second = restore_model(other, inputs.base, folder=finished / "best")
    assert torch.equal(torch.get_rng_state(), stream)
    assert fingerprint_weights(first) == fingerprint_weights(second)


def test_the_base_is_loaded_in_the_precision_of_the_run_and_one_that_is_gone_is_refused(finished):
    record = read_run(finished)
    base = restore_base(record, restore_config(record))
    assert base.fingerprint == record.base["fingerprint"]
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    record.platform["precision"] = "bf16"
    with pytest.raises(RecordError, match=r"`model.path` .* in bf16\), but .* has"):
        restore_base(record, restore_config(record))
    record = read_run(finished)
    record.config["model"]["path"] = "./gone"
    with pytest.raises(ConfigError, match=r"'\./gone'"):
        restore_base(record, restore_config(record))


@pytest.mark.parametrize("config", [{}, {"method": 3}, {"method": {"name": "lora", "rank": 0}}])
def test_settings_that_this_version_does_not_know_are_refused(finished, config):
    record = read_run(finished)
    record.config |= config
    if not config:
        record.config.pop("method")
    with pytest.raises(RecordError, match=r"`config` .* of this version of lorasweep"):
        restore_config(record)


def test_kept_files_are_checked_by_what_the_record_says(finished):
    record = read_run(finished)
    check_kept_files(record, finished)
    with pytest.raises(RecordError, match=r"kept weights in `best`, but .* \(status complete\) has"):
        check_kept_files(record, finished.parent)
    record.files["best/adapter_config.json"]["sha256"] = "0"
    with pytest.raises(RecordError, match=r"adapter_config.json'"):
        check_kept_files(record, finished)

"""No setting of a run is out of range, and none is without effect."""

import pytest

from lorasweep.config.compose import compose_run, packaged_folder
from lorasweep.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.path", "", "`model.path` must name a folder or hub id, but is empty."),
        ("optim.lr", 0.0, "`optim.lr > 0` must hold, but got 0.0."),
        ("trainer.accumulate", 17, "`trainer.accumulate <= trainer.batch_size` must hold, but got 17 and 16."),
        ("seeds.data_order", 2**32, r"`seeds.data_order < 4294967296` must hold, but got 4294967296."),
    ],
)
def test_a_setting_out_of_range_is_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        compose_run({key: value})


FSDP = {"trainer.strategy": "fsdp", "trainer.devices": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"method": method, "optim.lr_ratio_b": 16.0}, f"with `method={method}`, where it has no effect.")
            for method in ("full", "head", "frozen")
        ),
        *(
            ({**FSDP, key: value}, f"`trainer.strategy` must be ddp .*`{key}`.*'fsdp'")
            for key, value in (("method", "head"), ("trainer.compile", True), ("model.quantization", "nf4"))
        ),
        *(
            (
                {"method": method, "model.quantization": "nf4"},
                f"`model.quantization` must be none with `method={method}",
            )
            for method in ("full", "head", "bitfit", "intrinsic")
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_run(settings)


def test_one_seed_sets_every_seed_that_is_not_set_by_itself():
    seeds = compose_run({"seed": 5, "seeds.dropout": 7}).seeds
    assert (seeds.init, seeds.data_order, seeds.dropout) == (5, 5, 7)


@pytest.mark.parametrize("file", sorted((packaged_folder("conf") / "model").glob("*.yaml")), ids=lambda file: file.stem)
def test_no_model_of_conf_allows_a_risk(file):
    given = {"model.path": "owner/name"} if file.stem in ("causal_lm", "classifier") else {}
    config = compose_run({"model": file.stem, **given}).model
    assert config.name == file.stem
    assert not config.trust_remote_code

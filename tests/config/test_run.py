"""No setting of a run is out of range, and none is without effect."""

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.path", "", "`model.path` must name a folder or hub id, but is empty."),
        ("optim.lr", 0.0, "`optim.lr > 0` must hold, but got 0.0."),
        ("schedule.warmup_fraction", 1.0, "`schedule.warmup_fraction < 1` must hold, but got 1.0."),
        ("trainer.accumulate", 17, "`trainer.accumulate <= trainer.batch_size` must hold, but got 17 and 16."),
        ("seeds.data_order", 2**32, r"`seeds.data_order < 4294967296` must hold, but got 4294967296."),
    ],
)
def test_a_setting_out_of_range_is_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        compose_run({key: value})


@pytest.mark.parametrize("method", ["full", "head", "frozen"])
def test_a_learning_rate_of_b_is_refused_where_there_is_no_b(method):
    with pytest.raises(ConfigError, match=f"with `method={method}`, where it has no effect."):
        compose_run({"method": method, "optim.lr_ratio_b": 16.0})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"method": "head"}, "`method`"),
        ({"trainer.compile": True}, "`trainer.compile`"),
        ({"model.quantization": "nf4"}, "`model.quantization`"),
    ],
)
def test_what_can_not_be_sharded_is_refused(settings, key):
    with pytest.raises(ConfigError, match=f"`trainer.strategy` must be ddp .*{key}.*'fsdp'"):
        compose_run({"trainer.strategy": "fsdp", "trainer.devices": 2, **settings})


def test_one_seed_sets_every_seed_that_is_not_set_by_itself():
    seeds = compose_run({"seed": 5, "seeds.dropout": 7}).seeds
    assert (seeds.init, seeds.data_order, seeds.dropout) == (5, 5, 7)

"""Model and data that runs share are loaded once, and the record says how."""

from dataclasses import replace

import pytest

import lorasweep.training.inputs as inputs_file
from lorasweep.errors import ConfigError
from lorasweep.models.load import AttentionChoice
from lorasweep.record import read_run
from lorasweep.training.inputs import InputsCache, check_batch_memory
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder


def test_inputs_are_loaded_once_for_all_runs_that_can_share_them(make_config, monkeypatch):
    loaded = []
    monkeypatch.setattr(inputs_file, "build_inputs", lambda config, **given: loaded.append(config) or object())
    inputs_cache = InputsCache()
    first = inputs_cache.load(make_config())
    assert inputs_cache.load(make_config({"method": "full", "optim.lr": 1.0, "trainer.max_steps": 9})) is first
    assert inputs_cache.load(make_config({"data.block_length": 16})) is not first
    assert len(loaded) == 2


def test_the_attention_that_was_chosen_is_said_and_recorded(make_config, inputs, tmp_path):
    assert inputs.notes == inputs.splits.notes
    chosen = replace(inputs, attention=AttentionChoice("eager", "short"))
    told = "Attention is eager: short."
    assert chosen.notes == (*inputs.splits.notes, told)
    train_run(make_config({"method": "frozen"}), RunFolder(path=tmp_path), inputs=chosen)
    assert told in read_run(tmp_path).notes


@pytest.mark.parametrize("accumulate", [1, 10**9])
def test_a_batch_larger_than_the_memory_is_refused_before_it_is_drawn(make_config, inputs, accumulate):
    config = make_config({"trainer.batch_size": 10**10, "trainer.accumulate": accumulate}).trainer
    with pytest.raises(ConfigError, match=r"`trainer\.batch_size` must fit the free memory .* 10000000000 examples"):
        check_batch_memory(config, inputs.splits.train)

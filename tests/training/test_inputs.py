"""A process loads a base model and reads a data set once, also for runs that cut or split the data differently."""

import dataclasses

import pytest
import torch

import lorasweep.training.inputs as inputs_file
from lorasweep.config.compose import compose_run
from lorasweep.models.attention import AttentionChoice
from lorasweep.record import read_run
from lorasweep.training.inputs import InputsCache
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone


@pytest.fixture
def compose(here):
    """Returns settings of a run on a table of 400 rows."""
    (here / "topics.csv").write_text("label,text\n" + "".join(f"{n % 3},text number {n}\n" for n in range(400)))
    words = {"model": "classifier", "model.path": "embedded:tiny", "data": "table", "data.train": "topics.csv"}
    return lambda **data: compose_run(words | {f"data.{key}": value for key, value in data.items()})


def test_runs_on_other_data_share_the_weights_but_not_the_choice_of_attention(make_config, monkeypatch):
    names = []
    load = inputs_file.load_base
    monkeypatch.setattr(inputs_file, "load_base", lambda *given, **more: names.append(given) or load(*given, **more))
    inputs_cache = InputsCache()
    configs = [make_config({"data.block_length": length, "trainer.precision": "bf16"}) for length in (32, 512)]
    short, long = map(inputs_cache.load, configs)
    assert len(names) == 1
    other = {"method": "full", "optim.lr": 1.0, "trainer.max_steps": 9, "trainer.precision": "bf16"}
    assert inputs_cache.load(make_config(other)) is short
    assert short.base.fingerprint == long.base.fingerprint
    pairs = zip(short.base.model.parameters(), long.base.model.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    short.base.model.set_attn_implementation("eager")  # as a run on another device would
    assert long.attention.name == long.base.model.config._attn_implementation != "eager"
    labelled = InputsCache().load_base(make_config().model, dtype=torch.float32, labels=None)
    assert labelled.fingerprint != short.base.fingerprint  # of another precision, so it was loaded


def test_other_lengths_get_the_examples_that_were_read(compose):
    cache = InputsCache()
    first = cache.read_source(compose().data)
    assert cache.read_source(compose(group_by_length=False).data) is first
    assert cache.read_source(compose(test_fraction=0.3).data) is not first


def test_other_columns_are_read(compose):
    cache = InputsCache()
    before, after = (cache.read_source(compose(labels=names).data) for names in (None, ["a", "b", "c"]))
    assert (before.label_names, after.label_names) == (("0", "1", "2"), ("a", "b", "c"))


def test_the_attention_that_was_chosen_is_said_and_recorded(make_config, inputs, tmp_path):
    config, told = make_config({"method": "frozen"}), "Attention is eager: short."
    before = dataclasses.replace(inputs, attention=None).list_notes(config)
    chosen = dataclasses.replace(inputs, attention=AttentionChoice("eager", "short"))
    assert [note.text for note in chosen.list_notes(config) if note not in before] == [told]
    train_alone(config, RunFolder(path=tmp_path), inputs=chosen)
    assert told in read_run(tmp_path).notes

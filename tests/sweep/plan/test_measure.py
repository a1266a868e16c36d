"""A plan measures the sweep's own code on the trials that the sweep begins with, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import SHORT_RUN

import lorasweep.sweep.plan.measure as measure_file
from lorasweep.config.data import get_built_in_metric
from lorasweep.errors import Diverged, OutOfMemory, RunError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.plan.measure import MAX_EVALUATION_BATCHES, describe_work, measure_sweep, take_part
from lorasweep.training.inputs import InputsCache


@pytest.fixture
def measure(write_file, content, inputs, tmp_path, monkeypatch):
    """Returns a function that measures the sweep of `content` on the embedded model."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    content["settings"] |= {key: value for key, value in SHORT_RUN.items() if key.startswith(("data.", "trainer."))}
    content["settings"] |= {"trainer.eval_every_steps": 1, "worker.pack_size": 3, "confirm.seeds": 2}
    del content["settings"]["trainer.progress"]
    content["arms"]["lora"]["space"]["method.rank"] = [1, 2]
    content["arms"]["full"]["space"] |= {"seed": [1, 2]}

    class Cache(InputsCache):
        def load(self, config):
            return inputs

    cache = Cache()
    cache.telemetry = inputs.telemetry

    def measure():
        definition = read_definition(write_file(content), [])
        said = []
        cost = measure_sweep(definition, cache, metric=get_built_in_metric("bits_per_byte"), on_progress=said.append)
        assert list((tmp_path / "temporary").iterdir()) == []
        return {group.arms[0].name: group for group in cost.groups}, cost, said

    return measure


def test_each_arm_is_measured_and_the_base_stays(measure, inputs):
    weights = {name: p.clone() for name, p in inputs.base.model.named_parameters()}
    groups, cost, said = measure()
    assert said == [
        "frozen: 1 trial",
        "full: 1 trial",
        "lora: 3 trials in a pack",
        "lora: 1 trial in a pack",
        "the report",
    ]
    assert groups["frozen"].large.steps_s == ()
    assert groups["frozen"].large.trainable_params == 0
    assert groups["full"].small.steps_s == groups["full"].large.steps_s  # trials differ in learning rate and seed only
    for name, slots in (("full", (1, 1)), ("lora", (1, 3))):
        group = groups[name]
        assert (group.small.slots, group.large.slots) == slots
        assert len(group.large.steps_s) == 5  # of two times three steps, the first one warms up
        assert len(group.large.evaluations_s) == 2
        assert min(*group.large.steps_s, *group.large.evaluations_s, group.large.saving_s) > 0
        assert group.large.kept_bytes > 4 * group.large.trainable_params  # the best and the last weights
    assert groups["lora"].small.trainable_params <= groups["lora"].large.trainable_params
    assert groups["lora"].test_ratio == 1  # four blocks each
    assert min(cost.start_s, cost.report_s) > 0
    assert all(torch.equal(p, weights[name]) for name, p in inputs.base.model.named_parameters())


def test_an_arm_alone_whose_rank_is_searched_is_measured_at_both_ends(measure, content):
    content["settings"]["worker.pack_size"] = "auto"
    content["arms"]["lora"]["settings"]["method.variant"] = "dora"
    groups, _, _ = measure()
    assert groups["lora"].small.config.method.rank == 1
    assert groups["lora"].large.config.method.rank == 2
    assert groups["lora"].small.trainable_params < groups["lora"].large.trainable_params


def test_a_pack_that_does_not_fit_is_halved_as_in_the_sweep(measure, monkeypatch):
    train_pack = measure_file.train_pack

    def train_if_small(requests, **named):
        if len(requests) > 1:
            raise OutOfMemory("too large")
        return train_pack(requests, **named)

    monkeypatch.setattr(measure_file, "train_pack", train_if_small)
    groups, _, _ = measure()
    assert (groups["lora"].slots, groups["lora"].first_slots, groups["lora"].large.slots) == (1, 1, 1)


def test_a_training_that_fails_names_its_arm(measure, monkeypatch):
    def fail(*arguments, **named):
        raise Diverged("the loss is infinite")

    monkeypatch.setattr(measure_file, "train_run", fail)
    with pytest.raises(RunError, match=r"arm `frozen`.*the loss is infinite"):
        measure()


def test_a_part_of_a_split_has_its_longest_examples():
    few, many = (SimpleNamespace(name="", fingerprint="", lengths=torch.arange(1, n + 1)) for n in (4, 100))
    assert take_part(few, batch_size=4) is few
    part = take_part(many, batch_size=5)
    assert int(part.lengths.max()) == 100
    assert len(measure_file.EvaluationSampler(part, batch_size=5).batches) <= MAX_EVALUATION_BATCHES
    assert 10 < int(part.lengths.double().mean()) < 90


def test_settings_that_change_no_cost_are_one_work(make_config):
    work = describe_work(make_config())
    assert describe_work(make_config({"optim.lr": 1e-5, "seed": 3, "method.alpha": 1, "schedule": "cosine"})) == work
    for setting in ({"method.rank": 4}, {"trainer.batch_size": 4}, {"optim": "sgd"}, {"method.dropout": 0.1}):
        assert describe_work(make_config(setting)) != work

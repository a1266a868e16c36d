"""A plan counts runs and steps exactly, and measures one training of each group of arms with the sweep's own code."""

import io
import re
import tempfile
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tests.conftest import SHORT_RUN

import lorasweep.sweep.plan as plan_file
from lorasweep.data.batching import StepBatchSampler
from lorasweep.errors import ConfigError, OutOfMemory
from lorasweep.record import RunRecord
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.overrides import SweepOverrides
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.sweep.plan import (
    GroupPlan,
    choose_data_order,
    choose_evaluated,
    fit_minutes,
    plan_sweep,
    render_plan,
)
from lorasweep.training.inputs import InputsCache


@pytest.fixture
def define(write_file, content):
    """Returns a sweep with 8 LoRA trials of 8 steps and four evaluations."""

    def define(*overrides):
        content["arms"]["lora"]["trials"] = 8
        definition = read_definition(write_file(content), SweepOverrides.parse(overrides))
        return definition, {arm.name: arm for arm in definition.arms}

    return define


@pytest.fixture
def plan_group(inputs):
    def plan_group(arm, **measured):
        record = RunRecord.__new__(RunRecord)
        record.metric = "bits_per_byte"
        record.trainable_params = 123_456
        values = {
            "slots": 1,
            "step_tokens": 512.0,
            "peak_memory_bytes": 1234 * 2**20,
            "loading_s": 0.5,
            "step_s": 1.0,
            "evaluation_s": 10.0,
            "final_s": 0.0,
            "test_s": 0.0,
        }
        values |= measured
        values["trained_params"] = {arm.name: 123_456 if arm.space else 0}
        return GroupPlan(arms=(arm,), reason="", record=record, kept_bytes=2**20, **values)

    return plan_group


def test_estimates_count_the_steps_and_evaluations_of_the_sweep(define, plan_group):
    _, arms = define("confirm.seeds=3")
    run_s = 0.5 + 8 + 4 * 10
    group = plan_group(arms["lora"], slots=3)
    # packs share their time; at most, each batch of 4 trials takes whole packs
    assert group.estimate_search() == pytest.approx((8 / 3 * run_s, (2 + 2) * run_s))
    # confirm runs are scored on test data, and the frozen base is evaluated once
    assert plan_group(arms["lora"], test_s=20.0).estimate_confirm(3) == 3 * (run_s + 20)
    assert plan_group(arms["frozen"], step_s=0.0).estimate_confirm(1) == 10.5
    assert plan_group(arms["lora"], final_s=7.0).estimate_confirm(1) == run_s + 7
    _, arms = define("sampler=qmc")  # one batch
    assert plan_group(arms["lora"], slots=3).estimate_search() == pytest.approx((8 / 3 * run_s, 3 * run_s))


@pytest.mark.parametrize(
    ("looks", "longest"),
    [([3], None), ([3, 5], "8.9 min")],  # 6 trials and 5 confirm runs of 48.5 s
)
def test_a_plan_says_how_long_the_last_look_takes(content, write_file, plan_group, looks, longest):
    content["arms"] = {"lora": content["arms"]["lora"]}
    content["settings"] |= {"confirm.seeds": "auto", "confirm.looks": looks}
    definition = read_definition(write_file(content))
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render_plan(definition, [plan_group(definition.arms[0])]))
    found = re.findall(r"stays open to the last look: (.*)\.", console.export_text())
    assert found == ([] if longest is None else [longest])


def test_a_plan_fits_eighty_columns_and_breaks_no_name(content, write_file, plan_group):
    content["settings"]["confirm.seeds"] = 3
    content["arms"] = {"frozen": content["arms"]["frozen"], "loraplus-rank16": content["arms"]["lora"] | {"trials": 8}}
    definition = read_definition(write_file(content))
    groups = [plan_group(arm, step_s=60.0, evaluation_s=0.0) for arm in definition.arms]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(render_plan(definition, groups))
    shown = console.export_text()
    assert "…" not in shown
    lines = [line.split() for line in shown.splitlines()]
    (line,) = [line for line in lines if line[:1] == ["loraplus-rank16"]]
    assert line[:9] == ["loraplus-rank16", "8", "+", "3", "45.1", "k", "≤", "123", "k"]
    assert "1.21 GiB" in " ".join(line)
    assert "≤ 11 MiB" in " ".join(line)  # of 11 runs


@pytest.fixture
def plan(write_file, content, inputs, tmp_path, monkeypatch):
    """Returns a function that plans the sweep of `content` on the embedded model."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    content["settings"] |= {key: value for key, value in SHORT_RUN.items() if key.startswith(("data.", "trainer."))}
    content["settings"] |= {"trainer.eval_every_steps": 1, "worker.pack_size": 3, "confirm.seeds": 2}
    del content["settings"]["trainer.progress"]
    content["arms"]["lora"]["space"]["method.rank"] = [1, 2]

    class Cache(InputsCache):
        def load(self, config):
            return inputs

    def plan():
        said = []
        groups = plan_sweep(read_definition(write_file(content)), Cache(), on_progress=said.append)
        assert list((tmp_path / "temporary").iterdir()) == []
        return {group.arms[0].name: group for group in groups}, said

    return plan


def test_the_measured_steps_have_a_row_that_is_as_long_as_those_of_a_whole_run(make_config, inputs):
    class Rows:
        lengths, weights = torch.full((100,), 5), torch.ones(100)

        def __len__(self):
            return 100

    split = Rows()
    split.lengths[13] = 50
    config = make_config({"trainer.max_steps": 100, "trainer.batch_size": 1})
    order = choose_data_order(config, split=split, num_steps=4)
    steps = StepBatchSampler(split, batch_size=1, num_steps=4, seed=order)
    assert [13] in [micro.indices for micro in steps]
    assert choose_data_order(config, split=inputs.splits.train, num_steps=4) == 0  # blocks have one length


def test_each_group_is_measured_once_and_the_base_stays(plan, inputs):
    weights = {name: p.clone() for name, p in inputs.base.model.named_parameters()}
    groups, said = plan()
    assert said[1:] == [
        f"measuring {what}" for what in ("frozen: 1 trial", "full: 1 trial", "lora: 3 trials in a pack")
    ]
    assert (groups["frozen"].step_s, groups["frozen"].record.trainable_params) == (0, 0)
    assert groups["lora"].slots == 3
    assert groups["lora"].record.config["method"]["rank"] == 2
    assert groups["lora"].trained_params == {"lora": groups["lora"].record.trainable_params}
    assert groups["lora"].test_s > 0
    for name in ("full", "lora"):
        assert min(groups[name].step_s, groups[name].evaluation_s, groups[name].loading_s) > 0
        # the best and the last weights
        assert groups[name].kept_bytes > 4 * groups[name].record.trainable_params
    assert all(torch.equal(p, weights[name]) for name, p in inputs.base.model.named_parameters())


def test_a_pack_of_many_tokens_is_measured_with_fewer_slots_and_scaled(plan, monkeypatch):
    whole = plan()[0]["lora"]
    monkeypatch.setattr(plan_file, "MAX_MEASURED_TRAINING_S", 0.0)
    scaled, said = plan()
    assert said[-1] == "measuring lora: 3 trials in a pack, from 1"
    assert (scaled["lora"].slots, scaled["lora"].step_tokens) == (whole.slots, whole.step_tokens)
    assert scaled["lora"].trained_params == whole.trained_params
    # the two other slots have at least their parameters, gradients and moments
    slot_bytes = 16 * whole.record.trainable_params
    assert scaled["lora"].peak_memory_bytes >= scaled["lora"].record.peak_memory_bytes + 2 * slot_bytes


def test_the_measured_evaluation_has_the_longest_examples_and_lengths_as_in_the_whole_split():
    lengths = torch.arange(1000) % 50 + 1
    part = choose_evaluated(lengths, batch_size=64)
    assert len(part.unique()) == len(part)
    assert lengths[part].max() == 50
    assert 64 * 50 <= int(lengths[part].sum()) <= 1.2 * 64 * 50  # one batch of 64 examples of 50 tokens
    assert float(lengths[part].float().mean()) == pytest.approx(25.5, abs=1)
    assert choose_evaluated(lengths[:50], batch_size=64).sort().values.tolist() == list(range(50))


def test_a_pack_that_does_not_fit_is_halved_as_in_the_sweep(plan, monkeypatch):
    def run_out_of_memory(*_, **__):
        raise OutOfMemory("too large")

    monkeypatch.setattr(plan_file, "train_pack", run_out_of_memory)
    groups, said = plan()
    assert said[-2:] == ["measuring lora: 3 trials in a pack", "measuring lora: 1 trial"]
    assert groups["lora"].slots == 1


@pytest.fixture
def quickstart(monkeypatch):
    """The quickstart with 240 steps, of which each takes a tenth of a second."""

    def measure(definition, inputs_cache, **_):
        zeros = {"loading_s": 0.0, "evaluation_s": 0.0, "final_s": 0.0, "test_s": 0.0}
        zeros |= {"step_tokens": 0.0, "peak_memory_bytes": 0, "record": None, "kept_bytes": 0}
        return [
            GroupPlan(arms=(arm,), slots=1, reason="", step_s=0.1, trained_params={}, **zeros)
            for arm in definition.arms
        ]

    monkeypatch.setattr(plan_file, "plan_sweep", measure)
    return read_definition(find_sweep_file("quickstart"), SweepOverrides.parse(["trainer.max_steps=240"]))


def fit(definition, minutes):
    fitted, groups, given_up = fit_minutes(definition, minutes, None, on_progress=print)
    assert [group.arms[0] for group in groups] == list(fitted.arms)
    arm = fitted.find_arm("lora")
    return (arm.trials, arm.base.num_steps, fitted.sweep_config.confirm.looks), given_up


def test_seeds_go_first_then_trials_then_steps(quickstart):
    assert fit(quickstart, 30)[0] == (16, 240, (3, 6, 10))
    assert fit(quickstart, 29)[0] == (16, 240, (3, 6))
    assert fit(quickstart, 14)[0] == (12, 240, (3,))
    found, given_up = fit(quickstart, 8)
    assert found == (16, 120, (3,))
    assert "3 of 10 seeds" in given_up
    assert "120 of 240 steps" in given_up
    with pytest.raises(ConfigError, match=r"`--minutes` must be at least \d+ .* but got 0.5.*confirm.seeds=3"):
        fit(quickstart, 0.5)


def test_the_least_minutes_that_one_measurement_names_are_enough_for_the_next(quickstart, monkeypatch):
    with pytest.raises(ConfigError) as refused:
        fit(quickstart, 0.5)
    minutes = int(re.search(r"at least (\d+)", str(refused.value))[1])
    groups = plan_file.plan_sweep(quickstart, None)

    def measure_slower(factor):
        slower = [replace(group, step_s=factor * group.step_s) for group in groups]
        monkeypatch.setattr(plan_file, "plan_sweep", lambda *_, **__: slower)

    measure_slower(1.12)
    assert fit(quickstart, minutes)[1].startswith("within")
    measure_slower(2.0)
    with pytest.raises(ConfigError, match="at least"):
        fit(quickstart, minutes)

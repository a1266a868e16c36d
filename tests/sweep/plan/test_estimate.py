"""The time of a sweep is a range, whose ends follow from the stopping rule and the measured parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.plan.estimate import Part, Price, Seconds, estimate_group, estimate_sweep, list_parts
from lorasweep.sweep.plan.measure import GroupCost, SweepCost, TrainingCost


def training(config, *, slots=1, loading_s=0.0, steps_s=(1.0,), evaluations_s=(10.0,), memory_bytes=7):
    return TrainingCost(
        config=config,
        run=Path(),
        slots=slots,
        loading_s=loading_s,
        steps_s=steps_s,
        evaluations_s=evaluations_s,
        saving_s=0.0,
        memory_bytes=memory_bytes,
        host_bytes=memory_bytes,
        trainable_params=5,
        kept_bytes=11,
    )


def alone(arm, **measured):
    cost = training(arm.corners[0], **measured)
    return GroupCost(arms=(arm,), slots=1, first_slots=1, small=cost, large=cost, test_ratio=0.0, answers_s=0.0)


@pytest.fixture
def define(write_file, content):
    """Returns a sweep with 8 LoRA trials of 8 steps and four evaluations under halving at steps 2 and 4."""

    def define(*overrides, **settings):
        content["settings"] |= settings or {"pruner": "halving", "pruner.rungs": [0.25, 0.5]}
        content["arms"]["lora"]["trials"] = 8
        definition = read_definition(write_file(content), overrides)
        return definition, {arm.name: arm for arm in definition.arms}

    return define


def test_the_lower_end_prunes_all_that_the_rule_allows(define):
    definition, arms = define()
    assert list_parts(arms["lora"]) == [
        Part(start=0, stop=2, trials=8),
        Part(start=2, stop=4, trials=4),
        Part(start=4, stop=8, trials=2),
    ]
    times = estimate_group(alone(arms["lora"]), definition)
    # pruned: 8 · 2 + 4 · 2 + 2 · 4 = 32 steps and 8 + 4 + 2 · 2 = 16 evaluations; else 64 steps and 32 evaluations
    assert times["search"] == Seconds(32 + 160, 64 + 320)
    assert times["confirm"] == Seconds()


def test_without_pruning_the_ends_differ_by_the_measured_steps_only(define):
    definition, arms = define(pruner="none")
    times = estimate_group(alone(arms["lora"], steps_s=(1.0, 1.0, 1.1, 1.2, 50.0)), definition)
    assert times["search"].low == 64 + 320
    # the quartiles are 1.0 and 1.2, and the step of 50 seconds is an outlier
    assert times["search"].high == pytest.approx(64 * 1.4 + 320)


def test_a_pruner_of_another_package_may_prune_all_but_one(define, content):
    del content["settings"]["pruner"]
    _, arms = define(**{"pruner._target_": "optuna.pruners.MedianPruner"})
    assert [part.trials for part in list_parts(arms["lora"])] == [8, 1]


def test_early_stopping_moves_the_lower_end(define):
    definition, arms = define("trainer.early_stop_evaluations=1", pruner="none")
    times = estimate_group(alone(arms["lora"]), definition)
    assert times["search"] == Seconds(8 * 4 + 8 * 2 * 10, 64 + 320)


def test_confirm_runs_and_scores_on_test_data_count(define):
    definition, arms = define("confirm.seeds=3")
    group = alone(arms["lora"], loading_s=0.5)
    group = GroupCost(**{**vars(group), "test_ratio": 2.0, "answers_s": 100.0})
    times = estimate_group(group, definition)
    run_s = 0.5 + 8 + 4 * 10
    confirm_s = 3 * run_s + 3 * (0.5 + 2 * 10 + 100)
    assert times["confirm"] == Seconds(confirm_s, confirm_s)


def test_the_frozen_base_is_evaluated_once(define):
    definition, arms = define("confirm.seeds=3")
    times = estimate_group(alone(arms["frozen"], steps_s=()), definition)
    assert times == {"search": Seconds(10, 10), "confirm": Seconds(10, 10)}


def test_the_price_of_a_pack_lies_between_the_measured_packs(define):
    _, arms = define(pruner="none")
    config = arms["lora"].corners[0]
    small, large = (training(config, slots=n, steps_s=(s,), evaluations_s=(0.0,)) for n, s in ((1, 1.0), (5, 3.0)))
    group = GroupCost(
        arms=(arms["lora"],), slots=5, first_slots=5, small=small, large=large, test_ratio=0.0, answers_s=0.0
    )
    price = Price(group, "high")
    assert price.of_runs(1, slots=5) == 8 * 1.0
    assert price.of_runs(3, slots=5) == 8 * 2.0
    assert price.of_runs(8, slots=5) == 8 * (3.0 + 2.0)  # a full pack, then a pack of three


def test_the_largest_moment_may_be_the_report(define):
    definition, arms = define()
    groups = tuple(alone(arm, memory_bytes=100) for arm in arms.values())
    cost = SweepCost(groups=groups, start_s=2, start_bytes=50, report_s=3, report_bytes=120, omitted_loggers=())
    plan = estimate_sweep(definition, cost)
    assert (plan.host_bytes, plan.largest_moment) == (120, "the report")
    assert (plan.stages["start"].low, plan.stages["report"].high) == (2, 3)
    assert plan.total.low == sum(time.low for time in plan.stages.values())
    assert [arm.arm.name for arm in plan.arms] == list(arms)

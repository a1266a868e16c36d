"""A plan counts runs and steps exactly, and measures one training of each group of arms with the sweep's own code."""

import io
import re
import tempfile
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tests.conftest import SHORT_RUN

import lorasweep.sweep.measure as measure_file
from lorasweep.errors import ConfigError, OutOfMemory
from lorasweep.sweep.cost import WHOLE, Budget, Rates, cut_sweep, estimate_cost, fit_minutes, list_cuts
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.sweep.measure import measure_sweep
from lorasweep.sweep.plan import render_plan
from lorasweep.training.inputs import InputsCache


@pytest.fixture
def define(write_file, content):
    """Returns a sweep with 8 LoRA trials of 8 steps and four evaluations."""

    def define(*overrides):
        content["arms"]["lora"]["trials"] = 8
        definition = read_definition(write_file(content), overrides)
        return definition, {arm.name: arm for arm in definition.arms}

    return define


@pytest.fixture
def rates_of():
    """Returns made-up rates of one arm."""

    def rates_of(arm, **measured):
        values = {
            "slots": 1,
            "step_tokens": 512.0,
            "peak_memory_bytes": 1234 * 2**20,
            "loading_s": 0.5,
            "step_s": 1.0,
            "evaluation_s": 10.0,
            "final_s": 0.0,
            "test_s": 0.0,
            "answers_s": {},
            "num_scored": {},
        }
        values |= measured
        values["trained_params"] = {arm.name: 123_456 if arm.space else 0}
        return Rates(arms=(arm.name,), reason="", metric="bits_per_byte", **values)

    return rates_of


def test_the_cost_counts_the_steps_and_evaluations_of_the_sweep(define, rates_of):
    definition, arms = define("confirm.seeds=3")
    run_s = 0.5 + 8 + 4 * 10

    def cost(name, definition=definition, budget=WHOLE, **measured):
        return estimate_cost(definition, [rates_of(arms[name], **measured)], budget=budget)

    # packs share their time; at most, each batch of 4 trials takes whole packs
    assert cost("lora", slots=3)[:2] == pytest.approx((8 / 3 * run_s, (2 + 2) * run_s))
    # confirm runs are scored on test data, and the frozen base is evaluated once
    assert cost("lora", test_s=20.0).confirm_s == 3 * (run_s + 20)
    assert cost("frozen", step_s=0.0).confirm_s == 10.5
    assert cost("lora", final_s=7.0).confirm_s == 3 * (run_s + 7)
    assert cost("lora", definition=define("sampler=qmc")[0], slots=3)[:2] == pytest.approx(  # one batch
        (8 / 3 * run_s, 3 * run_s)
    )
    cut = Budget(trials=4, steps=4, looks=(2,))  # two evaluations
    assert cost("lora", budget=cut) == pytest.approx((4 * 24.5, 4 * 24.5, 2 * 24.5))


@pytest.mark.parametrize(
    ("looks", "longest"),
    [([3], None), ([3, 5], "8.9 min")],  # 6 trials and 5 confirm runs of 48.5 s
)
def test_a_plan_says_how_long_the_last_look_takes(content, write_file, rates_of, looks, longest):
    content["arms"] = {"lora": content["arms"]["lora"]}
    content["settings"] |= {"confirm.seeds": looks}
    definition = read_definition(write_file(content))
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render_plan(definition, [rates_of(definition.arms[0])]))
    found = re.findall(r"stays open to the last look: (.*)\.", console.export_text())
    assert found == ([] if longest is None else [longest])
    assert "--minutes" not in console.export_text()


def test_a_plan_fits_eighty_columns_and_breaks_no_name(content, write_file, rates_of):
    content["settings"]["confirm.seeds"] = 3
    content["arms"] = {"frozen": content["arms"]["frozen"], "loraplus-rank16": content["arms"]["lora"] | {"trials": 8}}
    definition = read_definition(write_file(content))
    groups = [rates_of(arm, step_s=60.0, evaluation_s=0.0) for arm in definition.arms]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(render_plan(definition, groups))
    shown = console.export_text()
    assert "…" not in shown
    lines = [line.split() for line in shown.splitlines()]
    assert "`--minutes N` cuts a sweep to a time" in shown  # it takes hours
    (line,) = [line for line in lines if line[:1] == ["loraplus-rank16"]]
    assert line[:9] == ["loraplus-rank16", "8", "+", "3", "45.1", "k", "≤", "123", "k"]
    assert "1.21 GiB" in " ".join(line)
    assert "≤ 5.18 MiB" in " ".join(line)  # of 11 runs


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
        groups = measure_sweep(read_definition(write_file(content)), Cache(), on_progress=said.append)
        assert list((tmp_path / "temporary").iterdir()) == []
        return {group.arms[0]: group for group in groups}, said

    return plan


def test_each_group_is_measured_once_and_the_base_stays(plan, inputs):
    weights = {name: p.clone() for name, p in inputs.base.model.named_parameters()}
    groups, said = plan()
    runs = ("frozen: 1 trial", "full: 1 trial", "lora: 3 trials in a pack")
    assert said == [f"measuring {what}" for what in runs]
    assert (groups["frozen"].step_s, groups["frozen"].trained_params) == (0, {"frozen": 0})
    assert groups["lora"].slots == 3
    assert 0 < groups["lora"].trained_params["lora"] < groups["full"].trained_params["full"]
    assert groups["lora"].test_s > 0
    assert groups["lora"].num_scored["validation"] == len(inputs.splits.validation)
    for name in ("full", "lora"):
        assert min(groups[name].step_s, groups[name].evaluation_s, groups[name].loading_s) > 0
    assert all(torch.equal(p, weights[name]) for name, p in inputs.base.model.named_parameters())


def test_arms_that_could_share_packs_are_measured_one_by_one_if_trials_run_alone(plan, content):
    content["settings"]["worker.pack_size"] = 1
    content["arms"]["present"] = {"settings": {"method": "lora", "optim.lr": 1e-3}}
    content["settings"]["trainer.max_steps"] = 2
    groups, _ = plan()
    assert {*groups} == {*content["arms"]}


def test_a_pack_that_does_not_fit_is_halved_as_in_the_sweep(plan, monkeypatch):
    def run_out_of_memory(*_, **__):
        raise OutOfMemory("too large")

    monkeypatch.setattr(measure_file, "train_pack", run_out_of_memory)
    groups, said = plan()
    assert said[-2:] == ["measuring lora: 3 trials in a pack", "measuring lora: 1 trial"]
    assert groups["lora"].slots == 1


@pytest.fixture(scope="module")
def quickstart():
    """The quickstart with 240 steps."""
    return read_definition(find_sweep_file("quickstart"), ["trainer.max_steps=240"])


def step_rates(definition, *, step_s=0.1):
    """Returns rates in which only steps take time."""
    zeros = {"loading_s": 0.0, "evaluation_s": 0.0, "final_s": 0.0, "test_s": 0.0, "answers_s": {}, "num_scored": {}}
    zeros |= {"step_tokens": 0.0, "peak_memory_bytes": 0, "metric": "bits_per_byte"}
    return [
        Rates(arms=(arm.name,), slots=1, reason="", step_s=step_s, trained_params={}, **zeros)
        for arm in definition.arms
    ]


def fit(definition, minutes, **given):
    spent = {"spent_s": given.pop("spent_s", 0.0)}
    return fit_minutes(definition, step_rates(definition, **given), minutes, **spent)


def test_seeds_ranks_and_trials_go_before_steps_and_full_last(quickstart):
    assert fit(quickstart, 30)[0] == Budget()
    assert fit(quickstart, 29)[0] == Budget(looks=(3, 6))
    budget, given_up = fit(quickstart, 12)
    assert budget.steps is None
    assert "3 of 10 seeds" in given_up
    budget, given_up = fit(quickstart, 4)
    assert (budget.looks, budget.ranks, budget.without) == ((3,), 2, ())
    assert f"{budget.steps} of 240 steps" in given_up
    assert "`method.rank` 1 and 64 alone" in given_up
    budget, given_up = fit(quickstart, 1.2)
    assert (budget.without, "whether LoRA is as good" in given_up) == (("full",), True)


@pytest.mark.parametrize("minutes", [3, 5, 8, 14, 29, 30])
def test_a_sweep_that_was_cut_costs_what_its_budget_costs(quickstart, minutes):
    budget, _ = fit(quickstart, minutes)
    cut, rates = cut_sweep(quickstart, budget), step_rates(quickstart)
    before = [group.limit(budget, quickstart.find_arm(group.arms[0]).base) for group in rates]
    cost = estimate_cost(cut, before, look=-1)
    assert cost == pytest.approx(estimate_cost(quickstart, rates, budget=budget, look=-1))
    assert cost.high_s <= 60 * minutes
    assert cut.sweep_config.confirm.seeds == (budget.looks or (3, 6, 10))
    assert len(cut.find_arm("lora").subjects) == (budget.ranks or 4)


def test_a_run_keeps_one_epoch_and_the_smallest_number_of_steps(quickstart):
    def fit_epochs(minutes, num_steps):
        rates = [replace(group, num_train=8 * num_steps) for group in step_rates(quickstart)]
        assert quickstart.find_arm("lora").base.trainer.batch_size == 8
        return fit_minutes(quickstart, rates, minutes)[0]

    budget = fit_epochs(4, 100)
    assert (budget.without, budget.steps >= 100) == ((), True)
    with pytest.raises(
        ConfigError, match=r"`--minutes` must be at least \d .*which `method.rank` is enough.* 80 of 240 st"
    ):
        fit_epochs(0.5, 160)
    with pytest.raises(ConfigError, match="at least") as refused:
        fit_epochs(0.5, 1000)
    assert "of 240 steps" not in str(refused.value)  # the run has less than half an epoch in any case


def test_what_was_typed_is_not_cut(quickstart):
    rates = step_rates(quickstart)
    typed = ["trainer.max_steps", "confirm.seeds", "arms.lora.method.rank", "arms.full.optim.lr"]
    fields = [{cut.field for cut in list_cuts(quickstart, rates, typed=typed[:end])} for end in range(5)]
    assert fields[0] - fields[1] == {"steps"}
    assert fields[1] - fields[2] == {"looks"}
    assert fields[2] - fields[3] == {"ranks"}
    assert fields[3] - fields[4] == {"without"}
    with pytest.raises(ConfigError, match="at least"):
        fit_minutes(quickstart, rates, 1, typed=typed)


def test_trials_that_were_typed_for_one_arm_leave_those_of_others_to_be_cut(quickstart):
    definition = quickstart.with_overrides({"arms.full.trials": 4})
    rates = step_rates(definition)
    budget, _ = fit_minutes(definition, rates, 9, typed=["arms.full.trials", "trainer.max_steps"])
    cut = cut_sweep(definition, budget)
    assert cut.find_arm("full").trials == 4
    assert cut.find_arm("lora").trials < definition.find_arm("lora").trials


def test_the_minutes_that_ask_every_question_are_named_where_full_fine_tuning_goes(quickstart):
    rates = step_rates(quickstart)
    for minutes in (3, 2.5, 2, 1.5):
        with suppress(ConfigError):
            budget, given_up = fit_minutes(quickstart, rates, minutes)
            if budget.without:
                break
    assert given_up.index("NOT ASKED") < given_up.index("seeds")
    needed = int(re.search(r"`--minutes (\d+)` asks it", given_up)[1])
    assert not fit_minutes(quickstart, rates, needed)[0].without


def test_time_that_is_left_goes_into_steps(quickstart):
    budget, given_up = fit(quickstart, 4)
    rates = step_rates(quickstart)
    more = estimate_cost(quickstart, rates, budget=replace(budget, steps=budget.steps + 2), look=-1)
    assert more.low_s > 4 * 60
    assert f"{budget.steps} of 240 steps" in given_up


def test_every_budget_above_the_smallest_yields_a_sweep(quickstart):
    with pytest.raises(ConfigError, match=r"`--minutes` must be at least \d+ .* but got 1.*60 of 240 steps") as refused:
        fit(quickstart, 1, spent_s=30.0)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    for minutes in (least, least + 0.5, least + 1, 5, 8, 12, 20):
        budget, _ = fit(quickstart, minutes, spent_s=30.0)
        assert cut_sweep(quickstart, budget).find_arm("lora").trials >= 6


def test_time_that_was_spent_is_no_time_for_the_sweep(quickstart):
    assert fit(quickstart, 30, spent_s=30.0)[0] == Budget(looks=(3, 6))


def test_fewer_examples_are_cut_where_scoring_takes_the_time(quickstart, write_file, content):
    def fit_scored(definition, *, test_s=0.0, answers_s=None, num=1000):
        rates = [
            replace(group, test_s=test_s, answers_s=answers_s or {}, num_scored={"validation": num, "test": num})
            for group in step_rates(definition, step_s=0.0)
        ]
        budget, given_up = fit_minutes(definition, rates, 8)
        cut_sweep(definition, budget)
        assert f"of {num:,} scored examples" in given_up
        return budget

    assert fit_scored(quickstart, test_s=60.0).examples < 1000
    settings = {"model": "tiny", "data": "chat", "data.train": "c.jsonl", "data.answers.score": "exact_match"}
    settings |= {"data.answers.max_examples": 400}
    content["settings"] = {"trainer.max_steps": 8, **settings}
    definition = read_definition(write_file(content), ["confirm.seeds=3"])
    assert fit_scored(definition, answers_s={"test": 100.0}, num=400).examples < 400


def test_arms_that_search_one_key_keep_the_minimum_of_trials(content, write_file):
    content["arms"] = {"full": content["arms"]["full"] | {"trials": 8}}
    definition = read_definition(write_file(content), ["confirm.seeds=0", "trainer.max_steps=60"])
    budget, given_up = fit(definition, 0.7)  # 7 trials of 6 s
    assert [arm.trials for arm in cut_sweep(definition, budget).arms] == [6]
    assert "6 of 8 trials an arm" in given_up


def test_a_budget_raises_no_number_and_cuts_those_that_are_typed_for_one_arm(content, write_file):
    content["arms"]["lora"]["trials"] = 12
    typed = ["arms.lora.trials=16", "arms.lora.trainer.max_steps=200", "trainer.max_steps=120"]
    definition = read_definition(write_file(content), typed)
    cut = cut_sweep(definition, Budget(trials=12, steps=160))
    assert {arm.name: arm.trials for arm in cut.arms} == {"frozen": 1, "full": 3, "lora": 12}
    assert {arm.name: arm.base.num_steps for arm in cut.arms} == {"frozen": 0, "full": 120, "lora": 160}


def test_the_least_minutes_that_one_measurement_names_are_enough_for_the_next(quickstart):
    with pytest.raises(ConfigError) as refused:
        fit(quickstart, 0.5, step_s=200.0)
    minutes = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert fit(quickstart, minutes, step_s=220.0)[1].startswith("within")
    with pytest.raises(ConfigError, match="at least"):
        fit(quickstart, minutes, step_s=400.0)

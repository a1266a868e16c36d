"""A plan counts runs and steps exactly, and measures one training of each group of arms with the sweep's own code."""

import io
import re
import tempfile
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.conftest import SHORT_RUN

import lorasweep.sweep.cost as cost_file
import lorasweep.sweep.measure as measure_file
from lorasweep.errors import ConfigError, OutOfMemory
from lorasweep.sweep.cost import Rates, estimate_cost, fit_minutes, list_cuts
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.confirm import list_questions
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


@pytest.mark.parametrize("empty", [0.25, 1.0])
def test_the_cost_counts_the_steps_and_evaluations_of_the_sweep(define, rates_of, empty, monkeypatch):
    monkeypatch.setattr(cost_file, "_find_empty_cost", lambda config: empty)
    definition, arms = define("confirm.seeds=3")
    run_s = 0.5 + 8 + 4 * 10

    def cost(name, definition=definition, **measured):
        return estimate_cost(definition, [rates_of(arms[name], **measured)])

    # packs share their time; at most, each batch of 4 trials leaves 2 of 6 slots empty, at their cost
    assert cost("lora", slots=3)[:2] == pytest.approx((8 / 3 * run_s, 2 * (4 + 2 * empty) / 3 * run_s))
    # confirm runs are scored on test data, and the frozen base is evaluated once
    assert cost("lora", test_s=20.0).confirm_s == 3 * (run_s + 20)
    assert cost("frozen", step_s=0.0).confirm_s == 10.5
    assert cost("lora", final_s=7.0).confirm_s == 3 * (run_s + 7)
    assert cost("lora", definition=define("sampler=qmc")[0], slots=3)[:2] == pytest.approx(  # one batch
        (8 / 3 * run_s, (8 + empty) / 3 * run_s)
    )
    cut = define("sweep.trials=4", "trainer.max_steps=4", "confirm.seeds=2")[0]  # two evaluations
    assert cost("lora", definition=cut) == pytest.approx((4 * 24.5, 4 * 24.5, 2 * 24.5))


def test_workers_share_the_time_but_no_run_and_no_batch_is_divided(define, rates_of):
    run_s = 0.5 + 8 + 4 * 10

    def cost(*worker):
        definition, arms = define("confirm.seeds=3", *worker)
        return estimate_cost(definition, [rates_of(arms["lora"])])

    assert cost("worker=ray", "worker.num=2") == pytest.approx((8 / 2 * run_s, 8 / 2 * run_s, 3 / 2 * run_s))
    slurm = "worker=slurm", "worker.jobs=4", "worker.processes_per_job=2"
    assert cost(*slurm) == pytest.approx((8 / 8 * run_s, 2 * run_s, run_s))  # two batches, one after the other
    assert cost(*slurm, "trainer.devices=2").search_low_s == pytest.approx(8 / 4 * run_s)


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


def test_a_measurement_beside_other_work_is_said_first(content, write_file, rates_of):
    content["arms"] = {"lora": content["arms"]["lora"]}
    definition = read_definition(write_file(content), ["worker.num=64"])  # no core is said to be idle
    shown = {}
    for share in (0.1, 0.9):
        console = Console(record=True, width=200, file=io.StringIO())
        console.print(render_plan(definition, [replace(rates_of(definition.arms[0]), busy_share=share)]))
        shown[share] = console.export_text()
    assert shown[0.9].startswith("warning: Measured while other work kept 90 % of the cores busy")
    assert "other work" not in shown[0.1]


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
    (line,) = [line for line in lines if line[:1] == ["loraplus-rank16"]]
    assert line[:9] == ["loraplus-rank16", "8", "+", "3", "45.1", "k", "≤", "123", "k"]
    assert "1.21 GiB" in " ".join(line)
    assert "≤ 5.18 MiB" in " ".join(line)  # of 11 runs


@pytest.fixture
def plan(write_file, content, inputs, tmp_path, monkeypatch):
    """Returns a function that plans the sweep of `content` on the embedded model."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # where rates are kept
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


def test_rates_are_kept_for_these_settings_and_measured_anew_if_asked(plan, content):
    first, _ = plan()
    again, said = plan()
    assert again == first
    assert all("measured within a day" in sentence for sentence in said)
    content["settings"]["confirm.seeds"] = 3  # and the number of steps change no rates
    assert plan()[0] == first
    content["settings"]["trainer.batch_size"] = 3
    assert plan()[0]["lora"] != first["lora"]


def test_arms_that_could_share_packs_are_measured_one_by_one_if_trials_run_alone(plan, content):
    content["settings"]["worker.pack_size"] = 1
    content["arms"]["present"] = {"settings": {"method": "lora", "optim.lr": 1e-3}}
    content["settings"]["trainer.max_steps"] = 2
    groups, _ = plan()
    assert {*groups} == {*content["arms"]}


def test_a_pack_that_does_not_fit_is_halved_as_in_the_sweep(plan, monkeypatch):
    def run_out_of_memory(requests, **options):
        if len(requests) > 1:
            raise OutOfMemory("too large")
        return train_runs(requests, **options)

    train_runs = measure_file.train_runs
    monkeypatch.setattr(measure_file, "train_runs", run_out_of_memory)
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


def count_steps(fitted):
    return fitted.definition.find_arm("lora").base.num_steps


def list_names(definition):
    return [arm.name for arm in definition.arms]


def test_seeds_ranks_and_trials_go_before_steps_and_full_last(quickstart):
    whole = fit(quickstart, 30)
    assert (whole.definition, whole.overrides) == (quickstart, {})
    assert fit(quickstart, 29).overrides == {"confirm.seeds": [3, 6]}
    fitted = fit(quickstart, 12)
    assert count_steps(fitted) == 240
    assert "3 of 10 seeds" in fitted.given_up
    fitted = fit(quickstart, 4)
    assert fitted.overrides["confirm.seeds"] == [3]
    assert fitted.overrides["arms.lora.method.rank"] == [4, 16]
    assert "full" in list_names(fitted.definition)
    assert f"{count_steps(fitted)} of 240 steps" in fitted.given_up
    assert "`method.rank` 4 and 16 alone" in fitted.given_up
    fitted = fit(quickstart, 1.2)
    assert list_names(fitted.definition) == ["frozen", "lora"]
    assert "whether LoRA is as good" in fitted.given_up


def test_one_rank_in_the_middle_goes_before_full_and_both_choices_are_named(quickstart):
    cuts = list_cuts(quickstart, step_rates(quickstart))
    names = [*dict.fromkeys(cut.name for cut in cuts)]
    assert names.index("ranks") < names.index("steps") < names.index("rank") < names.index("full")
    (one,) = [cut for cut in cuts if cut.name == "rank"]
    definition = quickstart.with_overrides(one.overrides)
    assert definition.find_arm("lora").settings["method.rank"] == 16
    assert [question.name for question in list_questions(definition)] == ["as_good_as_full"]
    fitted = next(
        found
        for minutes in np.arange(4, 1, -0.1)
        if "rank" in (found := fit(quickstart, float(minutes))).given_up and "method.rank` 16 alone" in found.given_up
    )
    assert "full" in list_names(fitted.definition)
    asked = int(re.search(r"`--minutes (\d+)` asks it too, `arms.full=null` asks it instead", fitted.given_up)[1])
    assert [*fit(quickstart, asked).definition.find_arm("lora").space["method.rank"].choices] == [4, 16]


@pytest.mark.parametrize("minutes", [3, 5, 8, 14, 29, 30])
def test_a_sweep_that_was_cut_fits_and_its_overrides_give_it_again(quickstart, minutes):
    fitted = fit(quickstart, minutes)
    assert estimate_cost(fitted.definition, step_rates(quickstart), look=-1).high_s <= 60 * minutes
    assert quickstart.with_overrides(fitted.overrides) == fitted.definition


def test_a_run_keeps_one_epoch_and_the_smallest_number_of_steps(quickstart):
    def fit_epochs(minutes, num_steps):
        rates = [replace(group, num_train=8 * num_steps) for group in step_rates(quickstart)]
        assert quickstart.find_arm("lora").base.trainer.batch_size == 8
        return fit_minutes(quickstart, rates, minutes)

    fitted = fit_epochs(4, 100)
    assert "full" in list_names(fitted.definition)
    assert count_steps(fitted) >= 100
    with pytest.raises(
        ConfigError, match=r"`--minutes` must be at least \d .*which `method.rank` is enough.* 80 of 240 st"
    ):
        fit_epochs(0.5, 160)
    with pytest.raises(ConfigError, match="at least") as refused:
        fit_epochs(0.5, 1000)
    assert "of 240 steps" not in str(refused.value)  # the run has less than half an epoch in any case


def test_what_was_typed_is_not_cut(quickstart):
    rates = step_rates(quickstart)
    typed = ["trainer.max_steps", "confirm.seeds", "method.rank", "arms.full.optim.lr"]
    names = [{cut.name for cut in list_cuts(quickstart, rates, typed=typed[:end])} for end in range(5)]
    assert names[0] - names[1] == {"steps"}
    assert names[1] - names[2] == {"seeds"}
    assert names[2] - names[3] == {"ranks", "rank"}
    assert names[3] - names[4] == {"full"}
    of_arm = [f"arms.lora.{key}" for key in ("trainer.max_steps", "method.rank")]
    assert not {"steps", "ranks", "rank"} & {cut.name for cut in list_cuts(quickstart, rates, typed=of_arm)}
    with pytest.raises(ConfigError, match="at least"):
        fit_minutes(quickstart, rates, 1, typed=typed)


def test_trials_that_were_typed_for_one_arm_leave_those_of_others_to_be_cut(quickstart):
    definition = quickstart.with_overrides({"arms.full.trials": 4})
    rates = step_rates(definition)
    cut, *_ = fit_minutes(definition, rates, 9, typed=["arms.full.trials", "trainer.max_steps"])
    assert cut.find_arm("full").trials == 4
    assert cut.find_arm("lora").trials < definition.find_arm("lora").trials


def test_the_minutes_that_ask_every_question_are_named_where_full_fine_tuning_goes(quickstart):
    rates = step_rates(quickstart)
    for minutes in (3, 2.5, 2, 1.5):
        with suppress(ConfigError):
            given_up = fit_minutes(quickstart, rates, minutes).given_up
            if "NOT ASKED" in given_up:
                break
    assert given_up.index("NOT ASKED") < given_up.index("seeds")
    needed = int(re.search(r"`--minutes (\d+)` asks it", given_up)[1])
    assert "full" in list_names(fit_minutes(quickstart, rates, needed).definition)


def test_time_that_is_left_goes_into_steps(quickstart):
    fitted = fit(quickstart, 4)
    longer = fitted.definition.with_overrides({"trainer.max_steps": count_steps(fitted) + 2})
    assert estimate_cost(longer, step_rates(quickstart), look=-1).low_s > 4 * 60


def test_every_time_above_the_least_yields_a_sweep(quickstart):
    with pytest.raises(ConfigError, match=r"`--minutes` must be at least \d+ .* but got 1.*60 of 240 steps") as refused:
        fit(quickstart, 1, spent_s=30.0)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    for minutes in (least, least + 0.5, least + 1, 5, 8, 12, 20):
        assert fit(quickstart, minutes, spent_s=30.0).definition.find_arm("lora").trials >= 6


def test_time_that_was_spent_is_no_time_for_the_sweep(quickstart):
    assert fit(quickstart, 30, spent_s=30.0).overrides == {"confirm.seeds": [3, 6]}


def test_test_examples_are_cut_only_where_scoring_them_is_slow(quickstart):
    def list_examples(*, test_s):
        scored = {"validation": 1000, "test": 1000}
        rates = [replace(group, test_s=test_s, num_scored=scored) for group in step_rates(quickstart)]
        return {key for cut in list_cuts(quickstart, rates) for key in cut.overrides if key.startswith("data.")}

    assert list_examples(test_s=1.0) == {"data.max_validation_blocks"}
    assert list_examples(test_s=20.0) == {"data.max_validation_blocks", "data.max_test_blocks"}


@pytest.mark.parametrize(
    ("threads", "workers", "said"),
    [("1", 1, "Trains on 1 of 4 cores"), ("2", 1, "2 of 4"), ("1", 2, "2 of 4"), ("4", 1, ""), ("", 1, "")],
)
def test_cores_that_omp_num_threads_keeps_idle_are_said_where_a_time_is(
    quickstart, monkeypatch, threads, workers, said
):
    monkeypatch.setattr(cost_file, "count_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    definition = quickstart.with_overrides({"worker.num": workers})
    rates, shown = step_rates(definition), Console(file=io.StringIO(), width=200)
    counted = [replace(group, trained_params=dict.fromkeys(group.arms, 1)) for group in rates]
    shown.print(render_plan(definition, counted))
    with pytest.raises(ConfigError) as refused:
        fit_minutes(definition, rates, 0.1)
    for text in (fit_minutes(definition, rates, 9).given_up, str(refused.value), shown.file.getvalue()):
        assert said in text
        assert ("`OMP_NUM_THREADS` is" in text) is bool(said)


def test_fewer_examples_are_cut_where_scoring_takes_the_time(quickstart, write_file, content):
    def fit_scored(definition, minutes, *, test_s=0.0, answers_s=None, num=1000):
        rates = [
            replace(group, test_s=test_s, answers_s=answers_s or {}, num_scored={"validation": num, "test": num})
            for group in step_rates(definition, step_s=0.001)
        ]
        fitted = fit_minutes(definition, rates, minutes)
        assert f"of {num:,} test examples" in fitted.given_up
        return max(value for key, value in fitted.overrides.items() if key.startswith("data.max_test_"))

    assert fit_scored(quickstart, 6, test_s=60.0) < 1000
    settings = {"model": "tiny", "data": "chat", "data.train": "c.jsonl", "data.answers.score": "exact_match"}
    settings |= {"data.answers.max_examples": 400}
    content["settings"] = {"trainer.max_steps": 8, **settings}
    definition = read_definition(write_file(content), ["confirm.seeds=3"])
    assert fit_scored(definition, 6, answers_s={"test": 100.0}, num=400) < 400


def test_full_fine_tuning_keeps_trials_with_which_verdicts_on_it_hold(content, write_file):
    content["arms"] = {"full": content["arms"]["full"] | {"trials": 12}}
    definition = read_definition(write_file(content), ["confirm.seeds=0", "trainer.max_steps=60"])
    fitted = fit(definition, 0.82)  # 8 trials of 6 s
    assert [arm.trials for arm in fitted.definition.arms] == [8]
    assert "8 of 12 trials of `full`" in fitted.given_up
    with pytest.raises(ConfigError, match="at least"):
        fit(definition, 0.6)


def test_a_cut_raises_no_number_of_an_arm(content, write_file):
    content["arms"]["lora"]["trials"] = 12
    content["arms"]["full"]["settings"]["trainer.max_steps"] = 120
    content["settings"] |= {"trainer.max_steps": 200, "trainer.eval_every_steps": 10}
    definition = read_definition(write_file(content), ["confirm.seeds=3"])
    for cut in list_cuts(definition, step_rates(definition)):
        arms = definition.with_overrides(cut.overrides).arms
        for arm in arms:
            before = definition.find_arm(arm.name)
            assert arm.trials <= before.trials
            assert arm.base.num_steps <= before.base.num_steps
            assert arm.base.num_steps % 10 == 0  # packs need evaluations at the last step


def test_the_least_minutes_that_one_measurement_names_are_enough_for_the_next(quickstart):
    with pytest.raises(ConfigError) as refused:
        fit(quickstart, 0.5, step_s=200.0)
    minutes = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert fit(quickstart, minutes, step_s=220.0).given_up.startswith(("within", "in about"))
    with pytest.raises(ConfigError, match="at least"):
        fit(quickstart, minutes, step_s=400.0)

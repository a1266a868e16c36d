"""Learning rates that are carried over: `search.steps_fraction` and `lorasweep transfer`."""

from types import SimpleNamespace

import pytest
from tests.small_runs import SMALL_RUN, rates

import lorasweep
import lorasweep.sweep.transfer as transfer_file
from lorasweep.cli import DONE, WRONG_REQUEST, run
from lorasweep.config.run import LR, STEPS_KEY
from lorasweep.errors import ConfigError
from lorasweep.record import read_run
from lorasweep.sweep.controller.encoding import BATCH_KEY, POWERS, scale_rate
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.status import read_status
from lorasweep.sweep.transfer import NEIGHBOURS, PREDICTED, plan_transfer

CONTENT = {
    "name": "short",
    "settings": SMALL_RUN | {"trainer.max_steps": 8, "sweep.trials": 2, "confirm.seeds": 1, "confirm.margin": 0.01},
    "arms": {
        "lora": {"settings": {"method": "lora", "method.rank": 2}, "space": {"optim.lr": rates(1e-3, 1e-1)}},
    },
}


@pytest.fixture(scope="module")
def short_sweep(tmp_path_factory):
    """A complete sweep whose trials train a quarter of the steps."""
    folder = tmp_path_factory.mktemp("sweeps") / "short"
    overrides = {"search.steps_fraction": 0.25, "trainer.eval_every_steps": 1}
    return lorasweep.run_sweep(CONTENT, overrides=overrides, output=folder, progress=None)


def test_a_rate_moves_by_the_power_of_its_method_and_setting():
    power = POWERS[BATCH_KEY]
    rate, low, high = scale_rate(0.01, "lora", {BATCH_KEY: 4.0})
    assert rate == pytest.approx(0.01 * 4**power.value)
    assert (low, high) == (pytest.approx(0.01 * 4**power.low), pytest.approx(0.01 * 4**power.high))
    assert low < rate < high
    assert scale_rate(0.01, "head", {BATCH_KEY: 4.0}) == (0.01, 0.01, 0.01)
    assert scale_rate(0.01, "lora", {STEPS_KEY: 1.0, BATCH_KEY: 1.0}) == (0.01, 0.01, 0.01)


def test_trials_train_a_fraction_of_the_steps_and_confirm_runs_all(short_sweep):
    record = short_sweep.record
    assert {read_run(short_sweep.folder / trial.run).steps_planned for trial in record.trials} == {2}
    assert {read_run(short_sweep.folder / trial.run).steps_planned for trial in record.confirm} == {8}
    (setting,) = record.settings
    winner = short_sweep.best("lora")
    expected = scale_rate(winner.params[LR], "lora", {STEPS_KEY: 4.0})[0]
    assert setting.params[LR] == pytest.approx(expected, rel=0.01)
    assert setting.trial is None  # no trial has trained all steps
    assert "carried over from trials of 2 of 8 steps" in " ".join(short_sweep.table().split())
    (arm,) = read_status(short_sweep.folder).arms
    assert (arm.search_steps, arm.steps) == (2, 8)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.steps_fraction=0", "`search.steps_fraction > 0` must hold"),
        ("search.steps_fraction=1.5", "`search.steps_fraction <= 1` must hold"),
        ("confirm.seeds=0", "`search.steps_fraction` must be 1 if `trainer.max_steps` is searched and without"),
        ("arms.lora.trainer.max_steps=[8,16]", "`search.steps_fraction` must be 1 if `trainer.max_steps` is searched"),
    ],
)
def test_a_fraction_that_can_not_be_carried_over_is_refused(override, said):
    with pytest.raises(ConfigError) as raised:
        read_definition(CONTENT, ["search.steps_fraction=0.25", override])
    assert said in str(raised.value)


def test_the_plan_has_the_predicted_rate_half_of_it_and_twice_of_it(short_sweep):
    planned = plan_transfer(short_sweep.folder / "lora", {STEPS_KEY: 16, "confirm.seeds": 5, "data.block_length": 64})
    before = short_sweep.record.settings[0].params[LR]
    assert planned.source_rate == before
    assert planned.rate == pytest.approx(scale_rate(before, "lora", {STEPS_KEY: 2.0})[0])
    assert planned.unknown == ("data.block_length",)
    definition = read_definition(planned.content)
    configs = {arm.name: arm.corner_configs[0] for arm in definition.arms}
    assert {config.trainer.max_steps for config in configs.values()} == {16}
    assert {config.method.rank for config in configs.values()} == {2}
    for name, factor in NEIGHBOURS.items():
        assert configs[name].optim.lr == pytest.approx(factor * configs[PREDICTED].optim.lr, rel=0.01)
    confirm = definition.sweep_config.confirm
    assert (confirm.seeds, confirm.margin) == (5, 0.01)


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["better", "equivalent"], "hit: the predicted rate is better against `half` and equivalent against `twice`"),
        (["better", "worse"], "miss: the predicted rate is better against `half` and worse against `twice`"),
        (["open", "not worse"], "open: the predicted rate is open against `half`"),
    ],
)
def test_a_prediction_is_a_hit_a_miss_or_open(short_sweep, monkeypatch, verdicts, said):
    answers = [
        SimpleNamespace(reference=name, verdict=verdict, is_settled=verdict != "open")
        for name, verdict in zip(NEIGHBOURS, verdicts, strict=True)
    ]
    data = SimpleNamespace(evidence=SimpleNamespace(means={}, list_answers=lambda name: answers))
    monkeypatch.setattr(transfer_file, "load_sweep_data", lambda folder: data)
    verdict, arm = transfer_file.judge_transfer(short_sweep.folder)
    assert verdict.startswith(said)
    assert arm == ("twice" if "worse" in verdicts else PREDICTED)


def test_the_command_trains_the_three_rates_and_says_what_it_found(short_sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = str(short_sweep.folder / "lora")
    assert run(["transfer", source, "trainer.max_steps=16", "confirm.seeds=2", "sweep.output=long"]) == DONE
    printed = capsys.readouterr().out
    assert f"from {short_sweep.record.settings[0].params[LR]:.3g} of the sweep" in printed
    (verdict,) = [line for line in printed.splitlines() if line.split(": ")[0] in ("hit", "miss", "open")]
    assert all(f"`{name}` " in verdict for name in (PREDICTED, *NEIGHBOURS))
    result = lorasweep.load_sweep(tmp_path / "long")
    assert {read_run(result.folder / trial.run).steps_planned for trial in result.record.confirm} == {16}


@pytest.mark.parametrize(
    ("source", "overrides", "said"),
    [
        ("lora", [], "a setting of the run other than `optim.lr` must be changed"),
        ("lora", ["optim.lr=0.1"], "a setting of the run other than `optim.lr` must be changed"),
        ("lora", ["confirm.seeds=2"], "a setting of the run other than `optim.lr` must be changed"),
        ("lora", ["trainer.max_step=16"], "`trainer.max_step` is not a setting. Did you mean `trainer.max_steps`?"),
        ("nothing", ["trainer.max_steps=16"], "`SWEEP` must be SWEEP or SWEEP/ARM"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(short_sweep, capsys, source, overrides, said):
    assert run(["transfer", str(short_sweep.folder / source), *overrides]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line

"""Whole sweeps of the embedded model, as a person runs them: from a file to a report."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorasweep.cli import run
from lorasweep.record import read_run, read_steps, read_sweep

from .conftest import SETTINGS

MINI = {
    "name": "mini",
    "settings": SETTINGS
    | {"data.max_test_blocks": 8, "trainer.max_steps": 8, "trainer.eval_every_steps": 2, "confirm.seeds": 0},
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {
            "settings": {"method": "full"},
            "space": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
            "trials": 3,
        },
        "lora": {
            "settings": {"method": "lora"},
            "space": {"method.rank": [1, 2, 4], "optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
            "trials": 6,
        },
    },
}
pytestmark = pytest.mark.slow
ASKED = {"frozen": 1, "full": 3, "lora": 6}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the sweep's file in it, made the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(MINI, sort_keys=False))
    return tmp_path


def trials_of(folder):
    found = {}
    for row in read_sweep(folder).trials:
        found[row.arm] = found.get(row.arm, 0) + 1
    return found


def test_a_sweep_ends_with_its_trials_and_its_report(here):
    assert run(["sweep", "mini.yaml"]) == 0
    folder = here / "outputs" / "mini"
    record = read_sweep(folder)
    assert record.status == "complete"
    assert trials_of(folder) == ASKED
    for row in record.trials:
        kept = read_run(folder / row.run)
        assert (kept.arm, kept.trial, kept.status, kept.score) == (row.arm, row.number, row.state, row.value)
        assert row.state in ("complete", "pruned")
        steps = [step["step"] for step in read_steps(folder / row.run) if "loss" in step]
        assert steps == list(range(1, kept.steps_done + 1))
        (swept,) = {path.parent for path in (folder / row.run).rglob("events.out.tfevents.*")} & {folder / row.run}
        assert EventAccumulator(str(swept)).Reload().Tags()["scalars"]
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert set(summary) >= {
        "sweep",
        "metric",
        "direction",
        "makespan_s",
        "tokens_trained",
        "steps_saved_by_pruning",
        "base",
        "arms",
    }
    assert summary["base"]["score"] == next(row.value for row in record.trials if row.arm == "frozen")
    for arm in summary["arms"]:
        assert sum(arm["trials"].values()) == ASKED[arm["name"]]
        best = min(row.value for row in record.trials if row.arm == arm["name"] and row.state == "complete")
        assert arm["best"]["score"] == best
        assert read_run(folder / arm["best"]["run"]).score == best
    page = (folder / "report" / "index.html").read_text()
    assert "mini" in page
    assert len((folder / "report" / "trials.csv").read_text().splitlines()) == 1 + sum(ASKED.values())


def test_packed_trials_train_as_trials_alone(here):
    """Without a model-based sampler and pruner, both propose the same trials; fp32 sums in another order in a pack."""
    # where training explodes (rates near 0.1) a rounding of 1e-7 grows to 1e-1 in 8 steps, packed or not
    common = ["sampler=random", "pruner=none", "sweep.trials=3", "arms.lora.optim.lr=tag(log,interval(1e-3,2e-2))"]
    for size in ("1", "3"):
        assert run(["sweep", "mini.yaml", *common, f"worker.pack_size={size}", f"sweep.output=packed-{size}"]) == 0
    alone, packed = (
        {(row.arm, row.number): row for row in read_sweep(here / f"packed-{size}").trials} for size in ("1", "3")
    )
    assert set(alone) == set(packed)
    for key, row in alone.items():
        assert packed[key].params == row.params
        assert packed[key].value == pytest.approx(row.value, rel=1e-5)  # 2e-7 as measured


CONFIRMED = {"frozen": 1, "full": 2, "lora": 2}


def check_confirmed(folder):
    """Each arm has exactly its seeds, each scored as its run's record and its rows on test data say."""
    record = read_sweep(folder)
    arms = [row.arm for row in record.confirm]
    assert {arm: arms.count(arm) for arm in arms} == CONFIRMED
    assert len({(row.arm, row.seed) for row in record.confirm}) == sum(CONFIRMED.values())
    winners = {row.arm: row.trial for row in record.settings}
    for row in record.confirm:
        kept = read_run(folder / row.run)
        assert (row.state, kept.status) == ("complete", "complete")
        assert (kept.arm, kept.trial, kept.config["seed"]) == (row.arm, winners[row.arm], row.seed)
        winner = read_run(folder / f"runs/{row.arm}-{winners[row.arm]:04d}")
        assert (kept.config["method"], kept.config["optim"]) == (winner.config["method"], winner.config["optim"])
        assert row.value == kept.test["bits_per_byte"]
        with (folder / row.run / "test_scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        weights = [float(row["weight"]) for row in rows]
        mean = sum(float(row["score"]) * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
        assert mean == pytest.approx(row.value, rel=1e-9)  # sums of float64 in another order
        assert len(rows) == 8
    for row in record.trials:
        assert read_run(folder / row.run).test == {}
        assert not (folder / row.run / "test_scores.csv").exists()
    return record


def test_the_best_of_each_arm_is_confirmed_on_fresh_seeds_and_test_data(here):
    words = ("worker.pack_size=3", "pruner=none", "sweep.trials=3", "confirm.seeds=2")
    assert run(["sweep", "mini.yaml", *words]) == 0
    record = check_confirmed(here / "outputs" / "mini")
    seeds = {arm: [row.seed for row in record.confirm if row.arm == arm] for arm in CONFIRMED}
    assert seeds["full"] == seeds["lora"] == record.confirm_seeds
    assert {row.arm: row.trial for row in record.settings if row.arm != "frozen"} == {
        arm: min((row for row in record.trials if row.arm == arm), key=lambda row: row.value).number
        for arm in ("full", "lora")
    }
    runs = [row.run for row in record.confirm if row.arm == "lora"]
    assert all(read_run(here / "outputs" / "mini" / run).pack for run in runs)

"""A whole sweep of the embedded model, as a person runs it: from a file to a report."""

import csv
import json
from collections import Counter

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorasweep.cli import run
from lorasweep.record import read_run, read_steps, read_sweep

CHANGES = {"data.max_test_blocks": 8, "trainer.max_steps": 8, "trainer.eval_every_steps": 2, "worker.pack_size": 3}
TRIALS = {"frozen": 1, "full": 2, "lora": 6}
CONFIRM_RUNS = {"frozen": 1, "full": 2, "lora": 2}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, halved_sweep):
    """The folder of the sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mini.yaml").write_text(yaml.safe_dump(halved_sweep, sort_keys=False))
    words = [f"{key}={value}" for key, value in CHANGES.items()]
    assert run(["sweep", str(folder / "mini.yaml"), f"sweep.output={folder}/out", *words]) == 0
    return folder / "out"


def test_a_sweep_ends_with_its_trials(folder):
    record = read_sweep(folder)
    assert record.status == "complete"
    assert Counter(row.arm for row in record.trials) == TRIALS
    for row in record.trials:
        kept = read_run(folder / row.run)
        assert (kept.arm, kept.trial, kept.status, kept.score) == (row.arm, row.number, row.state, row.value)
        assert row.state in ("complete", "pruned")
        steps = [step["step"] for step in read_steps(folder / row.run) if "loss" in step]
        assert steps == list(range(1, kept.steps_done + 1))
        (events,) = (folder / row.run).glob("events.out.tfevents.*")
        assert EventAccumulator(str(events)).Reload().Tags()["scalars"]
        assert kept.test == {}  # only the confirm runs may see test data
        assert not (folder / row.run / "test_scores.csv").exists()


def test_a_sweep_ends_with_its_report(folder):
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert set(summary) >= {"sweep", "metric", "direction", "makespan_s", "tokens_trained", "base", "arms"}
    trials = read_sweep(folder).trials
    for arm in summary["arms"]:
        assert sum(arm["trials"].values()) == TRIALS[arm["name"]]
        best = min(row.value for row in trials if row.arm == arm["name"] and row.state == "complete")
        assert arm["best"]["score"] == best
        assert read_run(folder / arm["best"]["run"]).score == best
    assert "halved" in (folder / "report" / "index.html").read_text()
    assert len((folder / "report" / "trials.csv").read_text().splitlines()) == 1 + sum(TRIALS.values())


def test_the_best_of_each_arm_is_confirmed_on_fresh_seeds_and_test_data(folder):
    record = read_sweep(folder)
    assert Counter(row.arm for row in record.confirm) == CONFIRM_RUNS
    seeds = {arm: [row.seed for row in record.confirm if row.arm == arm] for arm in CONFIRM_RUNS}
    assert seeds["full"] == seeds["lora"] == record.confirm_seeds
    winners = {row.arm: row.trial for row in record.settings}
    for arm in ("full", "lora"):
        complete = [row for row in record.trials if (row.arm, row.state) == (arm, "complete")]
        assert winners[arm] == min(complete, key=lambda row: row.value).number
    for row in record.confirm:
        kept = read_run(folder / row.run)
        assert (row.state, kept.status) == ("complete", "complete")
        assert (kept.arm, kept.trial, kept.config["seed"]) == (row.arm, winners[row.arm], row.seed)
        winner = read_run(folder / f"runs/{row.arm}-{winners[row.arm]:04d}")
        assert (kept.config["method"], kept.config["optim"]) == (winner.config["method"], winner.config["optim"])
        assert row.value == kept.test["bits_per_byte"]
        with (folder / row.run / "test_scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 8
        weights = [float(row["weight"]) for row in rows]
        mean = sum(float(row["score"]) * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
        assert mean == pytest.approx(row.value, rel=1e-9)  # sums of float64 in another order

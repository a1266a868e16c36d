"""The winners of a sweep, inspected and compared; what can't be inspected is a sentence."""

from __future__ import annotations

import csv
import json

import pytest

from lorasweep.errors import RecordError
from lorasweep.record import read_sweep, write_record
from lorasweep.runs.inspect.inspect_sweep import inspect_sweep
from lorasweep.selection import find_winners

from .conftest import edit_json


def change_record(folder, change):
    record = read_sweep(folder)
    change(record)
    write_record(record, folder)


def test_winners_are_the_best_complete_trials_of_arms_that_train(sweep):
    record = read_sweep(sweep)
    lora = [trial for trial in record.trials if trial.arm == "lora"]
    best = min(lora, key=lambda trial: trial.value)
    assert find_winners(record) == {"lora": best, "full": record.trials[-1], "none": None}
    record.direction = "maximize"
    assert find_winners(record)["lora"] is max(lora, key=lambda trial: trial.value)
    lora[0].value = lora[1].value
    assert find_winners(record)["lora"] is lora[0]  # the earlier of equals
    lora[0].state = "pruned"
    assert find_winners(record)["lora"] is lora[1]
    lora[1].value = float("nan")
    assert find_winners(record)["lora"] is None


def test_winners_are_inspected_and_compared(sweep):
    found = inspect_sweep(sweep)
    assert set(found.inspections) == {"lora", "full"}
    best = find_winners(read_sweep(sweep))
    for arm in ("lora", "full"):
        assert (sweep / best[arm].run / "inspect" / "summary.json").is_file()
    summary = json.loads((sweep / "inspect" / "summary.json").read_text())
    assert summary["arms"] == {arm: best[arm].run for arm in ("lora", "full")}
    assert summary["sentences"][0] == "Arm `none` has no complete trial to inspect."
    assert summary["sentences"][1].startswith("`lora` and `full` share")
    rows = list(csv.DictReader((sweep / "inspect" / "similarity.csv").read_text().splitlines()))
    assert {(row["arm"], row["other"]) for row in rows} == {("lora", "full")}
    assert {row["layer"] for row in rows} == {"mean"}


def test_more_pairs_than_anybody_reads_are_counted(sweep, monkeypatch):
    monkeypatch.setattr("lorasweep.runs.inspect.inspect_sweep.MAX_PAIRS", 0)
    found = inspect_sweep(sweep)
    assert found.sentences[-1] == "`inspect/similarity.csv` compares 1 more pairs of winners."


def test_a_winner_that_is_damaged_is_a_sentence_and_the_others_are_inspected(sweep):
    weights = sweep / find_winners(read_sweep(sweep))["lora"].run / "best/adapter_model.safetensors"
    weights.write_bytes(b"no")
    found = inspect_sweep(sweep)
    assert set(found.inspections) == {"full"}
    assert any("Arm `lora` can't be inspected:" in sentence for sentence in found.sentences)


def test_winners_of_different_bases_are_not_compared(sweep):
    folder = sweep / find_winners(read_sweep(sweep))["full"].run
    edit_json(folder / "run.json", lambda raw: raw["base"].update(fingerprint="f" * 16))
    found = inspect_sweep(sweep)
    assert set(found.inspections) == {"lora"}  # the base that is loaded is not the recorded one
    assert any("f" * 16 in sentence for sentence in found.sentences)


def test_a_run_outside_the_sweep_is_not_touched(sweep, runs):
    def lead_outside(record):
        next(trial for trial in record.trials if trial.arm == "full").run = f"../{runs['full'].name}"

    change_record(sweep, lead_outside)
    found = inspect_sweep(sweep)
    assert any("../full" in sentence for sentence in found.sentences)
    assert not (runs["full"] / "inspect").exists()


def test_a_sweep_without_a_winner_is_refused(sweep):
    change_record(sweep, lambda record: [setattr(trial, "state", "pruned") for trial in record.trials])
    with pytest.raises(RecordError, match="trained winner"):
        inspect_sweep(sweep)
    assert not (sweep / "inspect").exists()

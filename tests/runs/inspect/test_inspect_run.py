"""A run inspected from its folder: what is found fits the record, what is written is what was found."""

from __future__ import annotations

import csv
import json

import pytest
from safetensors.torch import load_file, save_file

from lorasweep.errors import RecordError
from lorasweep.record import read_run, sha256_of
from lorasweep.runs.inspect.inspect_run import inspect_run
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunPlace

from .conftest import edit_json

FILES = {"layers.csv", "spectra.json", "truncation.csv", "summary.json"}


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_whole_change_scores_what_the_run_scored_and_none_of_it_less(runs, inputs, name):
    inspection = inspect_run(runs[name], inputs=inputs)
    record, frozen = read_run(runs[name]), read_run(runs["frozen"])
    scores = inspection.truncation.scores
    assert scores[-1].rank == {"lora": 2, "full": 160}[name]
    assert scores[-1].score == record.score  # the same model on the same batches
    assert inspection.truncation.loss(scores[-1]) == 0
    if name == "lora":  # under full the norms stay as they were trained
        assert scores[0].score == pytest.approx(frozen.score, rel=1e-5)
    assert scores[0].score > scores[-1].score


def test_files_hold_what_was_found(runs, inputs):
    inspection = inspect_run(runs["lora"], inputs=inputs)
    folder = runs["lora"] / "inspect"
    assert {path.name for path in folder.iterdir()} == FILES
    rows = read_csv(folder / "layers.csv")
    assert [row["layer"] for row in rows] == [row.layer for row in inspection.layers]
    assert [float(row["norm_share"]) for row in rows] == [row.norm_share for row in inspection.layers]
    assert sum(row.norm_share for row in inspection.layers) == pytest.approx(1)
    spectra = json.loads((folder / "spectra.json").read_text())["singular_values"]
    for row in inspection.layers:
        assert len(spectra[row.layer]) == 2
        assert 1 <= row.stable_rank <= row.effective_rank**2
    ranks = read_csv(folder / "truncation.csv")
    assert [(int(r["rank"]), float(r["score"])) for r in ranks] == [
        (row.rank, row.score) for row in inspection.truncation.scores
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["format"], summary["version"]) == ("lorasweep.inspection", 1)
    assert summary["sentences"] == list(inspection.sentences)
    assert sum(summary["shares_by_kind"].values()) == pytest.approx(1)
    assert set(summary["shares_by_block"]) == {"0", "1", "2", "3"}


def test_an_inspection_repeats_to_the_byte(runs, inputs):
    inspect_run(runs["lora"], inputs=inputs)
    before = {path.name: path.read_bytes() for path in (runs["lora"] / "inspect").iterdir()}
    inspect_run(runs["lora"], inputs=inputs)
    assert {path.name: path.read_bytes() for path in (runs["lora"] / "inspect").iterdir()} == before


def test_a_run_is_like_itself_and_less_like_another(runs, inputs):
    itself = inspect_run(runs["lora"], other=runs["lora"], inputs=inputs, scores=False)
    assert all(row.phi == pytest.approx(1) for row in itself.overlaps)
    inspection = inspect_run(runs["lora"], other=runs["other"], inputs=inputs, scores=False)
    rows = read_csv(runs["lora"] / "inspect" / "similarity.csv")
    means = {(r["i"], r["j"]): float(r["phi"]) for r in rows if r["layer"] == "mean"}
    assert means.keys() == {(i, j) for i in "12" for j in "1234"}
    assert all(0 < value < 1 for value in means.values())
    assert str(runs["other"]) in inspection.sentences[-1]


def test_lora_and_full_are_compared_layer_by_layer(runs, inputs):
    inspection = inspect_run(runs["lora"], other=runs["full"], inputs=inputs, scores=False)
    assert len({row.layer for row in inspection.overlaps} - {"mean"}) == 28


def test_files_of_an_earlier_inspection_that_no_longer_hold_are_removed(runs, inputs):
    inspect_run(runs["lora"], other=runs["other"], inputs=inputs)
    inspect_run(runs["lora"], inputs=inputs, scores=False)
    assert {path.name for path in (runs["lora"] / "inspect").iterdir()} == FILES - {"truncation.csv"}


def test_inspecting_changes_nothing_else_of_the_run(runs, inputs):
    before = {path: sha256_of(path) for path in runs["lora"].rglob("*") if path.is_file()}
    inspect_run(runs["lora"], inputs=inputs)
    assert {path: sha256_of(path) for path in before} == before


def test_a_folder_that_cannot_be_written_to_is_one_sentence(runs, inputs):
    (runs["lora"] / "inspect").write_text("mine")
    with pytest.raises(RecordError, match=r"inspect' must be a folder that can be written to, but is not: "):
        inspect_run(runs["lora"], inputs=inputs, scores=False)
    assert (runs["lora"] / "inspect").read_text() == "mine"


def test_other_data_than_the_runs_is_said_and_the_rest_still_appears(runs, inputs):
    edit_json(runs["lora"] / "run.json", lambda raw: raw["data"]["validation"].update(fingerprint="0" * 16))
    inspection = inspect_run(runs["lora"], inputs=inputs)
    assert inspection.truncation is None
    assert any("Smaller ranks are not scored" in sentence for sentence in inspection.sentences)
    assert len(inspection.layers) == 28


def test_a_run_whose_weights_are_the_bases_is_refused(runs, inputs):
    path = runs["lora"] / "best/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, path)
    edit_json(runs["lora"] / "run.json", lambda raw: raw.update(files={}))
    with pytest.raises(RecordError, match=r"the best weights of .* are the base's own"):
        inspect_run(runs["lora"], inputs=inputs)
    assert not (runs["lora"] / "inspect").exists()


def test_runs_that_changed_different_layers_are_not_compared(runs, inputs, make_config, tmp_path):
    for name in ("q_proj", "k_proj"):
        train_run(make_config({"method.targets": [name]}), RunPlace(folder=tmp_path / name), inputs=inputs)
    with pytest.raises(RecordError, match="two runs must have changed the same layers to be compared"):
        inspect_run(tmp_path / "q_proj", other=tmp_path / "k_proj", inputs=inputs, scores=False)

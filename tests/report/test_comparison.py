"""Several sweeps side by side: in which settings they differ, and what follows."""

import json

import pytest
from tests.files import edit_json

from lorasweep.cli import run
from lorasweep.outcome import DONE, WRONG_REQUEST
from lorasweep.report.comparison import compare_sweeps

from .conftest import build_rank_sweep, build_sweep

RANKS = {1: 1.8, 4: 1.7, 16: 1.662}


def build(folder, *, scores=RANKS, examples=20, num_train=1000, **overrides):
    """Writes a sweep that was asked for with these overrides (`data__max_train_examples=1`)."""
    build_rank_sweep(folder, scores, seeds=3, examples=examples, noise=0.001)
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    file = {"name": "quickstart", "settings": {"data": "stdlib_docs", "trainer.batch_size": 16}, "arms": {}}
    edit_json(folder / "sweep.json", lambda raw: raw.update(definition={"file": file, "overrides": given}))
    for path in folder.glob("runs/*/run.json"):
        edit_json(path, lambda raw: raw["data"].update(train={"blocks": num_train}))
    return folder


def test_a_row_has_the_subject_its_sweep_and_the_settings_that_differ(tmp_path):
    amounts = {"a": 10, "b": 20}
    folders = [
        build(tmp_path / name, num_train=100 * n, data__max_train_documents=n, method__alpha=4)
        for name, n in amounts.items()
    ]
    table = compare_sweeps(folders)
    assert table["subject"].tolist() == ["full", "lora-rank-1", "lora-rank-4", "lora-rank-16"] * 2
    assert "method.alpha" not in table
    for folder, of_sweep in zip(folders, (table[:4], table[4:]), strict=True):
        n = amounts[folder.name]
        columns = ["sweep", "data.max_train_documents", "examples", "metric"]
        assert of_sweep[columns].drop_duplicates().values.tolist() == [[str(folder), n, 100 * n, "bits_per_byte"]]
        first = of_sweep.iloc[1]
        assert first["share_low"] <= first["share_of_full_gain"] <= first["share_high"] < 1
        assert (first["as_good_as_full"], first["smallest"]) == ("worse", "insufficient")


@pytest.mark.parametrize(
    ("first", "second", "differing"),
    [
        # folders, names and workers decide nothing
        (
            {"data__max_train_documents": 1, "trainer__max_steps": 60, "sweep__epochs": 2},
            {"data__max_train_documents": 2, "trainer__max_steps": 120, "sweep__epochs": 2},
            ["data.max_train_documents", "trainer.max_steps"],
        ),
        (
            {"sweep__output": "a", "worker": "local", "worker__pack_size": 1},
            {"sweep__output": "b"},
            [],
        ),
        ({"trainer__max_steps": 60}, {"trainer__max_steps": 120}, ["trainer.max_steps"]),
        # a default that one sweep names
        ({"data__block_length": 128}, {}, []),
    ],
)
def test_only_settings_that_decide_results_are_differences(tmp_path, first, second, differing):
    table = compare_sweeps([build(tmp_path / "a", **first), build(tmp_path / "b", **second)])
    assert [name for name in table if "." in name] == differing


def test_wrong_folders_are_one_sentence(here, capsys):
    for name in ("a", "early", "damaged"):
        build(here / name)
    edit_json(here / "early" / "sweep.json", lambda raw: raw.update(status="interrupted"))
    (here / "damaged" / "sweep.json").write_text("{")
    (here / "empty").mkdir()
    wrong = {"early": "--resume early", "damaged": "damaged", "empty": "sweep.json"}
    for name, said in wrong.items():
        assert run(["compare", "a", name]) == WRONG_REQUEST
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_command_prints_the_table_and_its_json_the_rows(here, capfd):
    for number in (1, 2):
        build(here / f"{number}", data__max_train_documents=number, num_train=100 * number)
    assert run(["compare", "1", "2"]) == DONE
    shown = capfd.readouterr().out
    assert len(shown.splitlines()) == 9
    assert run(["compare", "1", "2", "--json"]) == DONE
    rows = json.loads(capfd.readouterr().out)["subjects"]
    assert [row["examples"] for row in rows] == [100] * 4 + [200] * 4
    assert all(row["subject"] in shown for row in rows)


def test_sweeps_without_test_scores_are_compared_by_their_search(tmp_path):
    table = compare_sweeps([build_sweep(tmp_path / name) for name in "ab"])
    assert table[table["subject"] == "full"]["share_of_full_gain"].tolist() == [1.0, 1.0]
    assert table["share_low"].isna().all()

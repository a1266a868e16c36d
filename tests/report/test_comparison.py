"""Several sweeps side by side: in which settings they differ, and what follows."""

import json
from dataclasses import fields

import pytest
from tests.files import edit_json

from lorasweep.cli import run
from lorasweep.errors import ConfigError
from lorasweep.outcome import DONE, WRONG_REQUEST
from lorasweep.report.comparison import Comparison, compare_sweeps, list_rows

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


@pytest.fixture
def growing(tmp_path):
    """Three sweeps on 4,000, 1,000 and 2,000 blocks, in which rank 1 falls behind as the data grows."""
    amounts = {4000: 40, 1000: 10, 2000: 20}
    return [
        build(
            tmp_path / f"{n}",
            scores=RANKS | {1: 1.7 + 0.03 * documents / 10},
            num_train=n,
            data__max_train_documents=documents,
        )
        for n, documents in amounts.items()
    ]


def test_sweeps_are_sorted_by_the_setting_that_differs(growing):
    comparison = compare_sweeps(growing)
    assert (list(comparison.sweeps), comparison.examples) == (["10", "20", "40"], [1000, 2000, 4000])  # sorted
    assert comparison.differences == {"data.max_train_documents": [10, 20, 40]}
    assert comparison.enough == {"lora": ["16", "16", "16"]} or set(comparison.enough["lora"]) <= {"only 16", "16"}
    assert [row[0] for row in list_rows(comparison)] == [
        "full",
        "lora-rank-1",
        "lora-rank-4",
        "lora-rank-16",
        "lora: enough",
    ]


def test_sweeps_that_differ_in_several_settings_are_named_by_their_folders(tmp_path):
    first = build(tmp_path / "a", data__max_train_documents=10, method__alpha=8, num_train=100)
    comparison = compare_sweeps([first, build(tmp_path / "b", data__max_train_documents=20, method__alpha=4)])
    assert comparison.differences == {"data.max_train_documents": [10, 20], "method.alpha": [8, 4]}
    assert list(comparison.sweeps) == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize(
    ("first", "second", "differing"),
    [
        # steps that follow from the number of epochs, folders, names and workers
        (
            {"data__max_train_documents": 1, "trainer__max_steps": 60, "sweep__epochs": 2},
            {"data__max_train_documents": 2, "trainer__max_steps": 120, "sweep__epochs": 2},
            ["data.max_train_documents"],
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
    comparison = compare_sweeps([build(tmp_path / "a", **first), build(tmp_path / "b", **second)])
    assert list(comparison.differences) == differing


def test_wrong_folders_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "other", "early", "damaged"):
        build(tmp_path / name)
    edit_json(tmp_path / "other" / "sweep.json", lambda raw: raw["search_metric"].update(name="loss"))
    edit_json(tmp_path / "early" / "sweep.json", lambda raw: raw.update(status="interrupted"))
    (tmp_path / "damaged" / "sweep.json").write_text("{")
    (tmp_path / "empty").mkdir()
    wrong = {"a": "once", "other": "one metric", "early": "--resume early", "damaged": "damaged", "empty": "sweep.json"}
    for name, said in wrong.items():
        assert run(["compare", "a", name]) == WRONG_REQUEST
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_json_of_a_comparison_has_its_fields_which_the_reference_lists(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = tmp_path / "group"
    for number in (1, 2):
        build(group / f"{number}", data__max_train_documents=number, num_train=100 * number)
    assert run(["compare", "group/1", "group/2", "--json"]) == DONE
    found = json.loads(capfd.readouterr().out)
    assert found.keys() == {field.name for field in fields(Comparison)}
    assert found["examples"] == [100, 200]


def test_sweeps_without_test_scores_are_compared_by_their_search(tmp_path):
    folders = [build_sweep(tmp_path / name) for name in "ab"]
    comparison = compare_sweeps(folders)
    assert not comparison.differences
    assert comparison.cells["full"][0].value == 1.0
    with pytest.raises(ConfigError, match="on test data"):
        compare_sweeps([folders[0], build(tmp_path / "c")])

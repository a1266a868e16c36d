"""An arm with `confirm_each` has one entry per value; its trials and its row stay those of the arm."""

from pathlib import Path

import pytest
from tests.report.conftest import build_rank_sweep, edit_json

from lorasweep.errors import RecordError
from lorasweep.record import read_sweep, write_record
from lorasweep.report.sweep_data import load_sweep_data


def test_each_value_of_confirm_each_is_an_entry_with_its_trials_and_runs(tmp_path: Path) -> None:
    data = load_sweep_data(build_rank_sweep(tmp_path, {16: 1.68, 1: 1.75}, seeds=3))

    assert [arm.name for arm in data.arms] == ["frozen", "full", "lora-rank-1", "lora-rank-16"]
    assert [arm.name for arm in data.searches] == ["frozen", "full", "lora"]
    one, sixteen = data.arms[2:]
    assert [arm.row.settings["method.rank"] for arm in (one, sixteen)] == [1, 16]
    assert "method.rank" not in one.row.space
    assert {trial.params["method.rank"] for trial in one.trials} == {1}
    assert [run.seed for run in sixteen.confirm_runs] == [0, 1, 2]
    assert len(data.searches[2].trials) == len(one.trials) + len(sixteen.trials)
    assert len({trial.run for trial in data.trials}) == len(data.trials)


def test_a_predicted_setting_has_the_record_of_its_first_confirm_run(tmp_path: Path) -> None:
    data = load_sweep_data(build_rank_sweep(tmp_path, {1: 1.75, 16: 1.68}, seeds=3))
    best = data.arms[3].best

    assert best is not None
    assert best.is_predicted
    assert best.params == {"method.rank": 16, "optim.lr": 0.0102}
    assert best.run == data.arms[3].confirm_runs[0].run
    assert best.record is not None
    assert data.arms[3].cost("trainable_params") == best.record.trainable_params
    assert not data.arms[1].best.is_predicted  # type: ignore[union-attr]


def test_before_the_confirm_stage_the_best_complete_trial_of_each_value_leads(tmp_path: Path) -> None:
    folder = build_rank_sweep(tmp_path, {1: 1.75, 16: 1.68})
    record = read_sweep(folder)
    record.settings, record.confirm = [], []
    for row in record.trials:
        if row.arm == "lora" and row.params["method.rank"] == 1:
            row.state = "paused"
    write_record(record, folder)
    one, sixteen = load_sweep_data(folder).arms[2:]

    assert one.best is None
    assert one.so_far is not None
    assert one.so_far.value == 1.75
    assert sixteen.best is not None
    assert sixteen.best.params["optim.lr"] == 0.01
    assert sixteen.so_far is None


def test_an_arm_whose_key_is_not_a_list_is_one_entry(tmp_path: Path) -> None:
    folder = build_rank_sweep(tmp_path, {1: 1.75, 16: 1.68})
    edit_json(folder / "sweep.json", lambda raw: raw["arms"][2].update(confirm_each="method.dim"))
    assert [arm.name for arm in load_sweep_data(folder).arms] == ["frozen", "full", "lora"]


def test_looks_and_questions_that_no_sweep_writes_are_refused(tmp_path: Path) -> None:
    folder = build_rank_sweep(tmp_path, {1: 1.75, 16: 1.68})
    for change in ({"looks": [3, 2]}, {"looks": [0]}):
        edit_json(folder / "sweep.json", lambda raw, change=change: raw.update(change))
        with pytest.raises(RecordError, match="`looks` must be ascending"):
            load_sweep_data(folder)

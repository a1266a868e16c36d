"""Records are whole or absent, hold JSON only, and what can't be read is one sentence."""

import json
import math

import pytest

from lorasweep.config.data import ScoreMetric
from lorasweep.errors import RecordError
from lorasweep.record import (
    RUN_FILE,
    STEPS_FILE,
    SWEEP_FILE,
    ArmRow,
    LookRow,
    Question,
    RunRecord,
    SettingRow,
    Subject,
    SweepRecord,
    Trial,
    build_frame,
    count_seeds_due,
    find_winner,
    get_run_folder,
    list_confirm_runs,
    read_run,
    read_steps,
    read_sweep,
    write_record,
)


def make_run(**values):
    return RunRecord(
        **({"status": "complete", "config": {"seed": 0}, "metric": "loss", "direction": "minimize"} | values)
    )


def make_sweep(**values):
    common = {"arm": "lora", "number": 0, "params": {"method.rank": 1}}
    space = {"method.rank": [1, 2]}
    subjects = [Subject(arm="lora", key="method.rank", value=rank) for rank in (1, 2)]
    arm = ArmRow(name="lora", method="lora", trials=2, settings={}, space=space, subjects=subjects)
    confirmed = Trial(
        stage="confirm",
        setting_number=0,
        seed=7,
        state="complete",
        run="runs/lora-0001",
        test_scores={"loss": 1.5},
        **common,
    )
    given = {
        "status": "running",
        "name": "s",
        "search_metric": ScoreMetric(name="loss", direction="minimize"),
        "margin": "5%",
        "definition": {"file": {}},
        "arms": [arm],
        "trials": [Trial(state="failed", run="runs/lora-0000", reason="x", **common)],
        "questions": [Question(name="as_good_as_full", arm="lora", key=None, subjects=["lora"], reference="full")],
        "looks": [3, 6],
        "settings": [SettingRow(subject="lora", arm="lora", setting=0, params={}, trial=0, score=1.5)],
        "looks_done": [LookRow(seeds=3, open=["lora"], is_last=True)],
        "confirm": [confirmed],
    }
    return SweepRecord(**(given | values))


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = make_run(best={"loss": 1.5, "step": 2}, reason="because", packages={"torch": "2"}, wall_s=0.5)
    write_record(record, tmp_path)
    assert read_run(tmp_path) == record
    write_record(make_sweep(), tmp_path)
    assert read_sweep(tmp_path) == make_sweep()


@pytest.mark.parametrize(
    ("key", "value", "name", "label"),
    [
        (None, None, "lora", "lora"),
        ("method.rank", 16, "lora-rank-16", "rank 16"),
        ("optim.lr", 1.23456e-3, "lora-lr-0.00123", "lr 0.00123"),
        ("method.targets", "q proj/v", "lora-targets-q_proj_v", "targets q proj/v"),  # the name of a folder
        ("a/../../x", 1, "lora-_x-1", "/x 1"),  # in a record of somebody else
    ],
)
def test_a_subject_is_named_by_its_arm_and_its_value(key, value, name, label):
    subject = Subject(arm="lora", key=key, value=value)
    assert (subject.name, subject.label, subject.params) == (name, label, {key: value} if key else {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_becomes_null_at_any_depth(tmp_path, value):
    write_record(make_run(best={"loss": value}, config={"a": [{"b": value}, (value,)]}, wall_s=value), tmp_path)
    raw = json.loads((tmp_path / RUN_FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (raw["best"]["loss"], raw["config"], raw["wall_s"]) == (None, {"a": [{"b": None}, [None]]}, None)


@pytest.mark.parametrize("read", [read_run, read_sweep])
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b'{"format": "lorasw',
        b"\xff\xfe\x00",
        b"[]",
        b'{"format": "KIND", "version": 2}',
        b'{"format": "KIND", "version": 1}',
    ],
)
def test_a_missing_damaged_or_foreign_record_is_refused(tmp_path, read, content):
    kind, name = ("run", RUN_FILE) if read is read_run else ("sweep", SWEEP_FILE)
    if content is not None:
        (tmp_path / name).write_bytes(content.replace(b"KIND", f"lorasweep.{kind}".encode()))
    with pytest.raises(RecordError, match=name):
        read(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "lo',  # cut off by a killed process
        '{"step": 1e999}',
        "[2]",
        '{"step": 2, "loss": {}}',
        '{"step": 2, "validation": {"loss": "x"}}',
    ],
)
def test_steps_end_before_a_row_that_no_run_writes(tmp_path, line):
    assert list(read_steps(tmp_path)) == []
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "validation": {"loss": 3.0, "accuracy": None}}]
    lines = [*map(json.dumps, rows), line, json.dumps({"step": 3, "loss": 2.0})]
    (tmp_path / STEPS_FILE).write_text("\n".join(lines))
    assert list(read_steps(tmp_path)) == rows


@pytest.mark.parametrize("run", ["../elsewhere", "/etc", "runs/../../elsewhere", "a\0b", "\ud800"])
def test_a_run_outside_of_its_sweep_is_refused(tmp_path, run):
    with pytest.raises(RecordError, match="a trial's run must be inside the sweep's folder, but "):
        get_run_folder(tmp_path, run)


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1), ("maximize", 3)])
def test_the_best_complete_trial_wins(direction, best):
    ended = [("complete", v) for v in (2.0, 1.0, 1.0, 3.0, 3.0, math.inf, -math.inf, None)]
    ended += [("stopped", 0.0), ("stopped", 9.0), ("failed", None)]
    trials = [
        Trial(arm="lora", number=n, state=state, params={}, search_score=value, run="r")
        for n, (state, value) in enumerate(ended)
    ]
    record = make_sweep(search_metric=ScoreMetric(name="loss", direction=direction))
    assert find_winner(trials[::-1], record=record).number == best  # the earliest of equals
    assert find_winner(trials[5:], record=record) is None


def test_the_table_has_a_row_for_each_run_and_a_column_for_each_dotted_key():
    sweep = make_sweep()
    sweep.trials[0].record = make_run(config={"optim": {"lr": 0.5}}, wall_s=2.5, best={"loss": 1.5, "step": 4})
    (trial,) = build_frame(sweep.trials, metric="loss", keys=["optim.lr"]).to_dict("records")
    assert (trial["trial"], trial["method.rank"], trial["loss"]) == (0, 1, None)
    assert (trial["optim.lr"], trial["wall_s"], trial["best_step"]) == (0.5, 2.5, 4)
    (run,) = build_frame(sweep.confirm, metric="loss").to_dict("records")
    assert (run["seed"], run["method.rank"], run["test/loss"]) == (7, 1, 1.5)


def test_confirm_runs_of_all_subjects_are_due_up_to_the_next_look_or_the_last_one():
    looks, done = [2, 3, 4], [LookRow(seeds=2, open=["b"], is_last=False), LookRow(seeds=3, open=[], is_last=True)]
    assert [count_seeds_due(looks, done[:num_done]) for num_done in range(3)] == [2, 3, 3]
    assert count_seeds_due([], []) == 0
    assert list_confirm_runs(["a", "b"], seeds=2, is_fixed=False) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert list_confirm_runs(["base"], seeds=2, is_fixed=True) == [("base", 0)]

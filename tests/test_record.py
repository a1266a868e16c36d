"""Records are whole or absent, hold JSON only, and what can't be read is one sentence."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzzing import FUZZ, NESTED, damage, damage_bytes, damage_json, refusal_allowed

from lorasweep.errors import RecordError
from lorasweep.record import (
    RUN_FILE,
    STEPS_FILE,
    SWEEP_FILE,
    ArmRow,
    ConfirmRow,
    LookRow,
    Question,
    RunRecord,
    SettingRow,
    SweepRecord,
    TrialRow,
    compute_sha256,
    get_run_folder,
    measure_stage_occupancy,
    name_subject,
    read_run,
    read_steps,
    read_sweep,
    utc_now,
    write_record,
)
from lorasweep.results import SweepResult, load_run, load_sweep


def make_run(**values):
    return RunRecord(
        **({"status": "complete", "config": {"seed": 0}, "metric": "loss", "direction": "minimize"} | values)
    )


def make_sweep(**values):
    arm = ArmRow(
        name="lora",
        method="lora",
        trials=2,
        settings={},
        space={"method.rank": [1, 2]},
        sampler="tpe",
        pruner="none",
    )
    trial = TrialRow(arm="lora", number=0, state="failed", params={"method.rank": 1}, value=None, run="r", reason="x")
    confirmed = ConfirmRow(
        arm="lora",
        subject="lora",
        setting=0,
        seed=7,
        state="complete",
        run="runs/lora-confirm-0000",
        value=1.5,
    )
    question = Question(name="as_good_as_full", arm="lora", key=None, subjects=["lora"], reference="full")
    setting = SettingRow(
        subject="lora", arm="lora", setting=0, value=None, params={"method.rank": 1}, trial=0, score=1.5
    )
    return SweepRecord(
        **(
            {
                "status": "running",
                "name": "s",
                "metric": "loss",
                "direction": "minimize",
                "margin": "5%",
                "definition": {"file": {}},
                "arms": [arm],
                "trials": [trial],
                "questions": [question],
                "looks": [3, 6],
                "settings": [setting],
                "looks_done": [LookRow(seeds=3, open=["lora"], next=[])],
                "confirm": [confirmed],
            }
            | values
        )
    )


def test_a_run_comes_back_as_it_was_written(tmp_path):
    record = make_run(best={"loss": 1.5, "step": 2}, reason="because", packages={"torch": "2"}, wall_s=0.5)
    write_record(record, tmp_path)
    assert read_run(tmp_path) == record


def test_a_sweep_comes_back_as_it_was_written(tmp_path):
    write_record(make_sweep(), tmp_path)
    assert read_sweep(tmp_path) == make_sweep()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_becomes_null_at_any_depth(tmp_path, value):
    write_record(make_run(best={"loss": value}, config={"a": [{"b": value}, (value,)]}, wall_s=value), tmp_path)
    raw = json.loads((tmp_path / RUN_FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (raw["best"]["loss"], raw["config"], raw["wall_s"]) == (None, {"a": [{"b": None}, [None]]}, None)


def test_the_score_is_the_best_value_of_the_runs_metric():
    assert make_run(best={"loss": 1.5, "perplexity": 4.5}).score == 1.5
    assert make_run().score is None


def test_keys_that_this_version_does_not_know_are_ignored(tmp_path):
    write_record(make_run(), tmp_path)
    write_record(make_sweep(), tmp_path)
    for name in (RUN_FILE, SWEEP_FILE):
        raw = json.loads((tmp_path / name).read_text())
        raw["from_later"] = 1
        for rows in raw.values():
            for row in rows if isinstance(rows, list) else []:
                if isinstance(row, dict):
                    row["from_later"] = 1
        (tmp_path / name).write_text(json.dumps(raw))
    assert read_run(tmp_path) == make_run()
    assert read_sweep(tmp_path) == make_sweep()


@pytest.mark.parametrize(("read", "kind", "name"), [(read_run, "run", RUN_FILE), (read_sweep, "sweep", SWEEP_FILE)])
def test_a_folder_without_a_record_is_refused(tmp_path, read, kind, name):
    with pytest.raises(RecordError, match=f"a {kind}'s folder must contain {name}, but '{tmp_path}' does not."):
        read(tmp_path)


@pytest.mark.parametrize("read", [read_run, read_sweep])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a JSON file, but is damaged"),
        (b'{"format": "lorasw', "must be a JSON file, but is damaged"),
        (b"\xff\xfe\x00", "must be a JSON file, but is damaged"),
        (b"[]", "must have .*'lorasweep.(run|sweep)'"),
        (b'{"format": "other", "version": 1}', "must have .*'lorasweep.(run|sweep)'"),
        (b'{"version": 1}', "must have .*'lorasweep.(run|sweep)'"),
        (b'{"format": "KIND", "version": 2}', "must have .*'version': 1.*'version': 2"),
        (b'{"format": "KIND", "version": 0}', "must have .*'version': 0"),
        (b'{"format": "KIND", "version": "1"}', "must have .*'version': '1'"),
        (b'{"format": "KIND"}', "must have .*'version': None"),
        (b'{"format": "KIND", "version": 1}', "missing .* required"),
    ],
)
def test_a_damaged_or_foreign_record_or_one_of_another_version_is_refused(tmp_path, read, content, message):
    kind, name = ("run", RUN_FILE) if read is read_run else ("sweep", SWEEP_FILE)
    (tmp_path / name).write_bytes(content.replace(b"KIND", f"lorasweep.{kind}".encode()))
    with pytest.raises(RecordError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("rows", [[[]], [{}], 3, {"lora": {}}])
@pytest.mark.parametrize("key", ["arms", "trials", "questions", "settings", "looks_done", "confirm"])
def test_a_sweep_with_broken_rows_is_refused(tmp_path, key, rows):
    raw = asdict(make_sweep()) | {key: rows}
    (tmp_path / SWEEP_FILE).write_text(json.dumps(raw))
    with pytest.raises(RecordError, match="damaged"):
        read_sweep(tmp_path)


def test_steps_come_back_in_order(tmp_path):
    (tmp_path / STEPS_FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "validation": {"loss": 3.0}}\n')
    assert list(read_steps(tmp_path)) == [{"step": 1, "loss": 2.0}, {"step": 1, "validation": {"loss": 3.0}}]


def test_steps_can_be_read_in_part(tmp_path):
    (tmp_path / STEPS_FILE).write_text('{"step": 1, "loss": 2.0}\nnot json\n{"step": 1, "validation": {"loss": 3.0}}\n')
    assert list(read_steps(tmp_path, having='"validation"')) == [{"step": 1, "validation": {"loss": 3.0}}]


def test_a_line_cut_off_by_a_killed_process_is_left_out(tmp_path):
    (tmp_path / STEPS_FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert list(read_steps(tmp_path)) == [{"step": 1, "loss": 2.0}]


def test_a_run_without_steps_has_none(tmp_path):
    assert list(read_steps(tmp_path)) == []


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert compute_sha256(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_times_are_utc():
    assert utc_now().endswith("+00:00")


def test_a_paused_trial_comes_back_as_it_was_written(tmp_path):
    paused = TrialRow(arm="lora", number=0, state="paused", params={}, value=1.5, run="runs/lora-0000")
    write_record(make_sweep(trials=[paused]), tmp_path)
    assert read_sweep(tmp_path).trials == [paused]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", []),
        ("status", "fine"),
        ("status", []),
        ("metric", None),
        ("reason", 3),
        ("steps_done", True),
        ("wall_s", "long"),
        ("notes", {}),
    ],
)
def test_a_field_of_another_type_is_refused(tmp_path, key, value):
    (tmp_path / RUN_FILE).write_text(json.dumps(asdict(make_run()) | {key: value}))
    with pytest.raises(RecordError, match=f"`{key}` is .*Restore the file"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"version": ' + "9" * 5000 + "}"])
def test_a_record_that_python_can_not_parse_is_refused(tmp_path, content):
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(RecordError, match="must be a JSON file, but is damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize("run", ["../elsewhere", "/etc", "runs/../../elsewhere", "a\0b", "\ud800"])
def test_a_run_outside_of_its_sweep_is_refused(tmp_path, run):
    with pytest.raises(RecordError, match="a trial's run must be inside the sweep's folder, but "):
        get_run_folder(tmp_path, run)


def test_a_secret_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "open-sesame-42")
    record = make_run(config={"path": "https://me:pw-of-mine@host"}, reason="401 for open-sesame-42")
    write_record(record, tmp_path)
    assert (read_run(tmp_path).config, read_run(tmp_path).reason) == ({"path": "https://***@host"}, "401 for ***")
    assert record.reason == "401 for open-sesame-42"  # in memory it is as it was


def test_a_sweep_has_a_line_for_each_trial(tmp_path):
    rows = [TrialRow(arm="lora", number=n, state="complete", params={"a": n}, value=1.0, run="r") for n in range(3)]
    write_record(make_sweep(trials=rows), tmp_path)
    lines = (tmp_path / SWEEP_FILE).read_text().splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines if '"number"' in line] == [asdict(r) for r in rows]


def test_occupancy_is_the_share_of_the_packs_slots_that_trained():
    """A pack of four slots: three runs train 2 steps, then one of them 6 more. 12 of 4 * 8 slot-steps are used."""
    given = {"arm": "lora", "state": "complete", "params": {}, "value": 1.0, "run": "r"}
    shares = [(2, 2 * 4 / 3), (2, 2 * 4 / 3), (8, 2 * 4 / 3 + 6 * 4)]
    packed = [TrialRow(number=n, step=step, slot_steps=slots, **given) for n, (step, slots) in enumerate(shares)]
    alone = TrialRow(number=3, step=100, **given)
    assert measure_stage_occupancy(make_sweep(trials=[*packed, alone], confirm=[])) == {
        "search": pytest.approx(12 / 32)
    }
    assert measure_stage_occupancy(make_sweep(trials=[alone], confirm=[])) == {}


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1" + "0" * 400, "1e400"])
@pytest.mark.parametrize("key", ["wall_s", "steps_done", "best"])
def test_a_number_that_no_computer_holds_is_refused(tmp_path, key, text):
    content = json.dumps(asdict(make_run()) | {key: {"loss": "HERE"} if key == "best" else "HERE"})
    (tmp_path / RUN_FILE).write_text(content.replace('"HERE"', text))
    with pytest.raises(RecordError, match="damaged"):
        read_run(tmp_path)


def test_settings_that_are_nested_too_deeply_are_refused(tmp_path):
    (tmp_path / RUN_FILE).write_text(
        json.dumps(asdict(make_run())).replace('"seed": 0', f'"a": {"[" * 200}{"]" * 200}')
    )
    with pytest.raises(RecordError, match="`config` is"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "line", ['{"step": "2"}', '{"step": 1e999}', "[2]", '{"step": 2, "validation": {"loss": "x"}}']
)
def test_steps_end_before_a_row_that_no_run_writes(tmp_path, line):
    (tmp_path / STEPS_FILE).write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 3, "loss": 2.0}}\n')
    assert list(read_steps(tmp_path)) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("name", [RUN_FILE, SWEEP_FILE, STEPS_FILE])
def test_a_pipe_in_the_place_of_a_record_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with refusal_allowed(unchanged=tmp_path):
        assert list(read_steps(tmp_path)) == []
        (read_sweep if name == SWEEP_FILE else read_run)(tmp_path)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_damaged_record_is_read_or_refused(tmp_path, data):
    record = make_run(best={"loss": 1.5}, files={"best/a": {"bytes": 1, "sha256": "0"}}, notes=["a"])
    write_record(record, tmp_path)
    write_record(make_sweep(), tmp_path)
    name = data.draw(st.sampled_from([RUN_FILE, SWEEP_FILE]))
    (tmp_path / name).write_bytes(data.draw(damage((tmp_path / name).read_bytes())))
    with refusal_allowed(unchanged=tmp_path):
        result = load_run(tmp_path) if name == RUN_FILE else load_sweep(tmp_path)
        assert result.status
        if isinstance(result, SweepResult):
            result.trials_dataframe()
            result.confirm_dataframe()
            result.best("lora")


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_damaged_steps_are_read_as_far_as_they_are_whole(tmp_path, data):
    write_record(make_run(), tmp_path)
    rows = [{"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 1, "validation": {"loss": 3.0}}, {"step": 2, "loss": None}]
    lines = [data.draw(st.one_of(st.just(json.dumps(row)), damage_json(row), st.just(NESTED))) for row in rows]
    (tmp_path / STEPS_FILE).write_bytes(data.draw(damage_bytes("\n".join(lines).encode())))
    with refusal_allowed(unchanged=tmp_path):
        load_run(tmp_path).steps_dataframe()


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        (None, None, "lora"),
        ("method.rank", 16, "lora-rank-16"),
        ("method.targets", "attention", "lora-targets-attention"),
    ],
)
def test_a_subject_is_named_by_its_arm_and_value(key, value, name):
    assert name_subject("lora", key, value) == name


@pytest.mark.parametrize("value", ["a/b", "../x", ["q_proj", "v_proj"], {"rank": 1}, "ü ö", None, True])
def test_the_name_of_a_subject_is_one_plain_word(value):
    assert re.fullmatch(r"[\w.-]+", name_subject("lora", "method.targets", value))

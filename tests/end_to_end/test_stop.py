"""Stopped by a signal, and things that go wrong around a sweep: one sentence, nothing lost, and it goes on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from lorasweep.record import read_run, read_steps, read_sweep

from .conftest import SETTINGS

LORA = {
    "settings": {"method": "lora"},
    "space": {"method.rank": [1, 2, 4], "optim.lr": {"low": 1e-3, "high": 1e-2, "log": True}},
    "trials": 4,
}
SWEEP = {
    "name": "stopped",
    "settings": SETTINGS
    | {"trainer.max_steps": 60, "trainer.eval_every_steps": 4, "confirm.seeds": 0, "pruner": "none"},
    "arms": {"lora": LORA},
}
SOON_S = 20.0  # a step and a checkpoint take 0.1 s; this machine may do much else
pytestmark = pytest.mark.slow


@pytest.fixture
def words(tmp_path):
    """A sweep of four trials in `sweep`, each alone."""
    (tmp_path / "stopped.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return ["sweep", "stopped.yaml", "sweep.output=sweep", "worker.pack_size=1"]


def has_ended(folder: Path, number: int):
    """Whether so many trials have ended, and another has a checkpoint."""

    def condition() -> bool:
        if not (folder / "sweep.json").exists():
            return False
        ended = sum(row.state != "running" for row in read_sweep(folder).trials)
        return ended >= number and any(folder.rglob("*.ckpt"))

    return condition


def list_ended_rows(folder: Path):
    return [row for row in read_sweep(folder).trials if row.state != "running"]


def check_complete(folder: Path, before, *, trials: int = 4, num_steps: int = 60) -> None:
    """The sweep has its trials, those that had ended as they were."""
    record = read_sweep(folder)
    assert (record.status, len(record.trials)) == ("complete", trials)
    assert [row for row in record.trials if row.number in {row.number for row in before}] == before
    for row in record.trials:
        steps = [step["step"] for step in read_steps(folder / row.run) if "loss" in step]
        assert steps == list(range(1, num_steps + 1))


@pytest.mark.parametrize(
    ("number", "pack_size"),
    [(signal.SIGINT, "1"), (signal.SIGTERM, "2"), (signal.SIGUSR1, "1")],
)
def test_a_signal_stops_a_sweep_within_seconds_with_a_checkpoint_and_the_words_to_resume_it(
    tmp_path, begin, finish, words, number, pack_size
):
    folder = tmp_path / "sweep"
    session = begin(*words[:-1], f"worker.pack_size={pack_size}")
    session.wait_for(has_ended(folder, 0))
    asked = time.monotonic()
    session.send(number)
    assert session.wait() == 130, session.output
    assert time.monotonic() - asked < SOON_S
    assert session.output.splitlines()[-1].strip() == "lorasweep sweep --resume sweep"
    assert "Traceback" not in session.output
    record = read_sweep(folder)
    assert record.status == "interrupted"
    running = [row for row in record.trials if row.state == "running"]
    assert len(running) == int(pack_size)
    for row in running:
        kept = read_run(folder / row.run)
        assert (kept.status, kept.reason.startswith("stopped ")) == ("interrupted", True)
        assert list((folder / row.run).glob("*.ckpt"))
    if number == signal.SIGINT:
        before = list_ended_rows(folder)
        finish("sweep", "--resume", "sweep")
        check_complete(folder, before)


def test_a_second_ctrl_c_ends_a_sweep_at_once_with_the_words_to_resume_it(tmp_path, begin, words):
    session = begin(*words, "trainer.eval_every_steps=60")
    session.wait_for(lambda: any((tmp_path / "sweep").glob("runs/*/run.json")))
    for _ in range(20):  # until one arrives between the first and the end of the step
        session.send(signal.SIGINT)
        time.sleep(0.005)
    assert session.wait() == 130, session.output
    assert "lorasweep sweep --resume sweep" in session.output
    assert "Traceback" not in session.output


def test_a_full_disk_ends_a_sweep_with_a_sentence_and_it_goes_on_when_there_is_room(tmp_path, begin, finish, words):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        session = begin(*words, "sweep.output=disk/sweep", "sweep.trials=24", "trainer.max_steps=8")
        assert session.wait() == 1, session.output
        last = session.output.splitlines()[-1]
        assert "No space left on device" in last
        assert "`lorasweep sweep --resume disk/sweep`" in last
        assert "Traceback" not in session.output
        before = list_ended_rows(disk / "sweep")
        assert before
        assert all(row.state == "complete" for row in before)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finish("sweep", "--resume", "disk/sweep")
        check_complete(disk / "sweep", before, trials=24, num_steps=8)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_turns_read_only_ends_a_sweep_with_a_sentence(tmp_path, begin, finish, words):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused = finish(*words, "sweep.output=disk/sweep", code=2)
        assert "`sweep.output`" in refused
        assert "Read-only file system" in refused
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        shutil.copytree(_interrupted(begin, words, tmp_path / "sweep"), disk / "sweep")
        before = list_ended_rows(disk / "sweep")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused = finish("sweep", "--resume", "disk/sweep", code=2)
        assert "Read-only file system" in refused
        assert list_ended_rows(disk / "sweep") == before
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _interrupted(begin, words, folder: Path) -> Path:
    """A sweep that was stopped after a trial."""
    session = begin(*words)
    session.wait_for(has_ended(folder, 1))
    session.send(signal.SIGTERM)
    assert session.wait() == 130, session.output
    return folder


@pytest.mark.parametrize("pack_size", ["1", "2"])
def test_a_folder_that_is_moved_away_ends_the_sweep_with_a_sentence_and_goes_on_where_it_is(
    tmp_path, begin, finish, words, pack_size
):
    folder, moved = tmp_path / "sweep", tmp_path / "moved"
    session = begin(*words[:-1], f"worker.pack_size={pack_size}")
    session.wait_for(has_ended(folder, 0))
    folder.rename(moved)
    assert session.wait() == 1, session.output
    last = session.output.splitlines()[-1]
    assert "'sweep' can't be written to" in last
    assert "Traceback" not in session.output
    assert not folder.exists()
    if pack_size == "2":
        before = list_ended_rows(moved)
        finish("sweep", "--resume", "moved")
        check_complete(moved, before)


def test_a_sweep_that_is_running_is_refused_to_a_second_process_and_a_new_sweep_its_folder(
    tmp_path, begin, finish, words
):
    folder = tmp_path / "sweep"
    session = begin(*words)
    session.wait_for(has_ended(folder, 0))
    second = finish("sweep", "--resume", "sweep", code=2)
    assert "another one has 'sweep' open" in second
    assert "`lorasweep status sweep`" in second
    other = finish(*words, code=2)
    assert "`sweep.output`" in other
    session.send(signal.SIGTERM)
    assert session.wait() == 130, session.output  # it was not disturbed


def test_of_two_that_begin_in_one_empty_folder_one_is_refused(tmp_path, begin, words):
    (tmp_path / "sweep").mkdir()
    sessions = [begin(*words, "trainer.max_steps=12") for _ in range(2)]
    codes = sorted(session.wait() for session in sessions)
    assert codes == [0, 2], [session.output for session in sessions]
    assert not any("Traceback" in session.output for session in sessions)
    check_complete(tmp_path / "sweep", [], num_steps=12)


def test_a_trial_that_diverges_ends_with_its_reason_and_the_sweep_goes_on(tmp_path, finish):
    arm = {"settings": {"method": "full"}, "space": {"optim.lr": [1e-3, 1e20]}, "trials": 2}
    content = SWEEP | {"settings": SWEEP["settings"] | {"sampler": "grid"}, "arms": {"full": arm}}
    (tmp_path / "wild.yaml").write_text(yaml.safe_dump(content))
    finish("sweep", "wild.yaml", "sweep.output=sweep", "trainer.max_steps=8")
    rows = {row.params["optim.lr"]: row for row in read_sweep(tmp_path / "sweep").trials}
    assert (rows[1e-3].state, rows[1e20].state) == ("complete", "failed")
    assert "NaN or infinite" in rows[1e20].reason
    assert rows[1e20].reason in (tmp_path / "sweep" / "report" / "trials.csv").read_text()
    assert read_run(tmp_path / "sweep" / rows[1e20].run).reason == rows[1e20].reason


BREAK = """
import itertools
import lorasweep.training.module as file
calls, true = itertools.count(1), file.prepare_model
def prepare_model(config, base):
    if next(calls) in ({calls}):
        raise RuntimeError("shapes differ")
    return true(config, base)
file.prepare_model = prepare_model
"""


def test_a_trial_that_breaks_is_recorded_with_its_traceback_and_the_sweep_goes_on(tmp_path, finish, words):
    finish(*words, "trainer.max_steps=8", before=BREAK.format(calls="2,"))
    rows = read_sweep(tmp_path / "sweep").trials
    assert [row.state for row in rows] == ["complete", "failed", "complete", "complete"]
    assert rows[1].reason == "RuntimeError: shapes differ"
    reason = read_run(tmp_path / "sweep" / rows[1].run).reason
    assert reason.startswith("Traceback")
    assert "in prepare_model" in reason


def test_a_sweep_ends_when_so_many_trials_in_a_row_broke_and_says_why(tmp_path, finish, words):
    said = finish(*words, "sweep.max_failures=2", code=1, before=BREAK.format(calls="2, 3"))
    assert "`sweep.max_failures`" in said
    assert "RuntimeError: shapes differ" in said
    assert "'sweep/runs'" in said
    assert "Traceback" not in said
    assert [row.state for row in read_sweep(tmp_path / "sweep").trials] == ["complete", "failed", "failed"]


LIMIT = """
import resource
import lorasweep.training.run as file
true = file.lightning.Trainer.fit
def fit(*arguments, **others):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 160 * 2**20, resource.RLIM_INFINITY))
    try:
        return true(*arguments, **others)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.lightning.Trainer.fit = fit
"""


def test_a_run_that_the_system_gives_too_little_memory_halves_its_micro_batches(tmp_path, finish):
    """A real limit on the address space: a step's 32 rows of 256 tokens do not fit in 160 MiB."""
    sizes = ["data.block_length=256", "trainer.batch_size=32", "trainer.eval_batch_size=2", "trainer.max_steps=2"]
    common = ["data.max_validation_blocks=2", "trainer.precision=fp32", "trainer.device=cpu", "trainer.progress=false"]
    finish("train", *sizes, *common, "output=large")
    finish("train", *sizes, *common, "output=small", before=LIMIT)
    large, small = (read_run(tmp_path / name) for name in ("large", "small"))
    assert (large.status, small.status) == ("complete", "complete")
    assert large.batching["micro_batches"] == 1
    assert small.batching["micro_batches"] == 2 * small.batching["too_large"][-1] > 1
    losses = [[row["loss"] for row in read_steps(tmp_path / name) if "loss" in row] for name in ("large", "small")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # fp32 sums in another order

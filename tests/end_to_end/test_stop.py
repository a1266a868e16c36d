"""Stopped by a signal, and things that go wrong around a sweep: one sentence, nothing lost, and it goes on."""

import signal
import subprocess

import pytest
import yaml
from tests.small_runs import rates

from lorasweep.record import read_run, read_steps, read_sweep

from .conftest import SETTINGS

SWEEP = {
    "name": "stopped",
    "settings": SETTINGS | {"trainer.max_steps": 24, "trainer.eval_every_steps": 4, "confirm.seeds": 0},
    "arms": {
        "lora": {
            "settings": {"method": "lora"},
            "space": {"method.rank": [1, 2, 4], "optim.lr": rates(1e-3, 1e-2)},
            "trials": 3,
        }
    },
}
pytestmark = pytest.mark.slow


@pytest.fixture
def words(tmp_path):
    """A sweep of three trials in `sweep`, each alone."""
    (tmp_path / "stopped.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return ["sweep", "stopped.yaml", "sweep.output=sweep", "worker.pack_size=1"]


def has_ended(folder, number):
    """Whether so many trials have ended, and another has a checkpoint."""

    def condition():
        if not (folder / "sweep.json").exists():
            return False
        return len(list_ended_rows(folder)) >= number and any(folder.rglob("*.ckpt"))

    return condition


def list_ended_rows(folder):
    return [row for row in read_sweep(folder).trials if row.state != "running"]


def check_complete(folder, before, *, trials=3, num_steps=24):
    """The sweep has its trials, those that had ended as they were."""
    record = read_sweep(folder)
    assert (record.status, len(record.trials)) == ("complete", trials)
    assert [row for row in record.trials if row.number in {row.number for row in before}] == before
    for row in record.trials:
        steps = [step["step"] for step in read_steps(folder / row.run) if "loss" in step]
        assert steps == list(range(1, num_steps + 1))


@pytest.mark.parametrize(
    ("number", "pack_size"), [(signal.SIGINT, 1), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.release)]
)
def test_a_signal_stops_a_sweep_with_a_checkpoint_and_the_words_to_resume_it(
    tmp_path, begin, finish, words, number, pack_size
):
    folder = tmp_path / "sweep"
    session = begin(*words[:-1], f"worker.pack_size={pack_size}", "trainer.max_steps=120")
    session.wait_for(has_ended(folder, 0))
    assert "another one has 'sweep' open" in finish("sweep", "--resume", "sweep", code=2)  # that disturbs nothing
    session.send(number)
    assert session.wait() == 130, session.output
    assert "`lorasweep sweep --resume sweep`" in session.output.splitlines()[-1]
    assert "worker process" not in session.output  # a worker that stops in the middle of its pack is no fault
    assert "Traceback" not in session.output
    record = read_sweep(folder)
    assert record.status == "interrupted"
    running = [row for row in record.trials if row.state == "running"]
    assert len(running) == pack_size
    for row in running:
        kept = read_run(folder / row.run)
        assert (kept.status, kept.reason.startswith("stopped ")) == ("interrupted", True)
        assert kept.steps_done < 120
        assert (folder / "packs" / f"{running[0].pack}.ckpt").exists()


@pytest.fixture
def disk(tmp_path):
    """A file system of 1.5 MB in `disk`, and a function that mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.release
def test_a_full_disk_ends_a_sweep_with_a_sentence_and_it_goes_on_when_there_is_room(
    tmp_path, begin, finish, words, disk
):
    sweep = tmp_path / "disk" / "sweep"
    session = begin(*words, "sweep.output=disk/sweep", "sweep.trials=12", "trainer.max_steps=4")
    assert session.wait() == 1, session.output
    last = session.output.splitlines()[-1]
    assert "No space left on device" in last
    assert "`lorasweep sweep --resume disk/sweep`" in last
    assert "Traceback" not in session.output
    before = list_ended_rows(sweep)
    assert before
    assert all(row.state == "complete" for row in before)
    disk("size=64m")
    finish("sweep", "--resume", "disk/sweep")
    check_complete(sweep, before, trials=12, num_steps=4)


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


@pytest.mark.release
def test_a_run_that_the_system_gives_too_little_memory_halves_its_micro_batches(tmp_path, finish):
    """A real limit on the address space: a step's 32 rows of 256 tokens do not fit in 160 MiB."""
    sizes = ["data.block_length=256", "trainer.batch_size=32", "trainer.eval_batch_size=2", "trainer.max_steps=1"]
    common = ["data.max_validation_blocks=2", "trainer.precision=fp32", "trainer.device=cpu", "trainer.progress=false"]
    finish("train", *sizes, *common, "output=large")
    finish("train", *sizes, *common, "output=small", before=LIMIT)
    large, small = (read_run(tmp_path / name) for name in ("large", "small"))
    assert (large.status, small.status) == ("complete", "complete")
    assert large.batching["micro_batches"] == 1
    assert small.batching["micro_batches"] == 2 * small.batching["too_large"][-1] > 1
    losses = [[row["loss"] for row in read_steps(tmp_path / name) if "loss" in row] for name in ("large", "small")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # fp32 sums in another order

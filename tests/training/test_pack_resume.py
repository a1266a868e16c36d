"""A pack that is killed at any moment resumes where it was committed, and what comes of its runs has the same bits."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.training.gpt2 import save_gpt2
from tests.training.runs import assert_same_run, logged_rows, make_request

import lorasweep.training.run_writer as writer_file
from lorasweep.data import batching
from lorasweep.errors import Diverged
from lorasweep.record import read_run
from lorasweep.training.checkpoint import get_step, read_checkpoint, write_checkpoint
from lorasweep.training.inputs import load_inputs
from lorasweep.training.run import train_runs

STATE = "pack.ckpt"
SETTINGS = (
    {"method.rank": 2, "method.dropout": 0.2},
    {"method.rank": 8, "method.dropout": 0.1, "seed": 3},
    {"method.rank": 4, "method.targets": ["q_proj", "up_proj"], "optim.weight_decay": 0.1},
    {"method.rank": 16, "optim.lr": 1e38, "optim.clip_norm": None, "method.targets": ["o_proj", "q_proj"]},
)
"""Of the runs of the pack below. The fourth diverges."""
STOPPED = ("run-1", 2)


class Pack:
    """Trains four runs in a pack: one is stopped and one diverges at step 2, so that the others are a smaller pack."""

    def __init__(self, folder, make_config, *, num_runs=4):
        self.folder = folder
        self.make_config = make_config
        self.names = [f"run-{n}" for n in range(num_runs)]
        self.values: dict[str, float] = {}
        self.ended: dict[str, str] = {}
        self.moment: Callable[[str], None] = lambda name: None

    def request(self, name):
        settings = SETTINGS[int(name.split("-")[1])]
        shared = {"trainer.eval_fraction": 0.5, "trainer.max_steps": 6}
        return make_request(self.folder / name, self.make_config({**shared, **settings}))

    def note_end(self, request, record):
        name = request.run_folder.path.name
        self.ended[name] = "failed" if isinstance(record, Diverged) else record.status
        self.moment(f"{name} is {self.ended[name]}")

    def report(self, evaluated):
        self.moment("before the report")
        found = {f"{one.run.run_folder.path.name} at {one.step}": one.metrics["bits_per_byte"] for one in evaluated}
        self.values |= found
        self.moment("after the report")
        return ["poor" if (one.run.run_folder.path.name, one.step) == STOPPED else None for one in evaluated]

    def train(self, *, inputs, without=(), **hooks):
        """Trains or resumes all runs but those that a controller knows to have ended."""
        return train_runs(
            [self.request(name) for name in self.names if name not in without],
            inputs=inputs,
            on_evaluation=self.report,
            on_end=self.note_end,
            checkpoint_file=self.folder / STATE,
            **hooks,
        )


class Killed(NamedTuple):
    """The folder of a pack as a kill at some moment leaves it, and the runs whose end was told before."""

    folder: Path
    moment: str
    ended: tuple[str, ...]


class Recorder:
    """Copies the folder of a pack at every moment of which it hears."""

    def __init__(self, pack, into, monkeypatch):
        self.pack = pack
        self.into = into
        self.killed: list[Killed] = []
        pack.moment = self.take
        true_replace, true_unlink = os.replace, Path.unlink

        def around(write):
            def wrapped(*args, **given):
                self.take("before the commit")
                write(*args, **given)
                self.take("after the commit")

            return wrapped

        def replace(source, target, **given):
            # of what is written beside the moments above, a few are as good as all: weights, rows and records
            true_replace(source, target, **given)
            if Path(target).name == "run.json" and len(self.killed) % 3 == 0:
                self.take(f"after {Path(target).parent.name}/run.json")

        def unlink(path, **given):
            true_unlink(path, **given)
            if path.suffix == ".ckpt" and not path.name.startswith("."):
                self.take(f"after the removal of {path.name}")

        for name in ("write_atomically", "write_checkpoint"):
            monkeypatch.setattr(writer_file, name, around(getattr(writer_file, name)))
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(Path, "unlink", unlink)

    def take(self, moment):
        if (self.pack.folder / STATE).exists():
            copy = Path(shutil.copytree(self.pack.folder, self.into / str(len(self.killed))))
            self.killed.append(Killed(copy, moment, tuple(self.pack.ended)))


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Lets an evaluation use half of the four validation examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "MIN_PART_EXAMPLES", 1)
        yield


@pytest.fixture(scope="module")
def undisturbed(make_config, inputs, tmp_path_factory):
    """A pack that nothing disturbed, and its folder at every moment on the way."""
    folder = tmp_path_factory.mktemp("pack")
    (folder / "whole").mkdir()
    pack = Pack(folder / "whole", make_config)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(pack, folder / "killed", patch)
        assert pack.train(inputs=inputs)
    assert pack.ended == {"run-0": "complete", "run-1": "stopped", "run-2": "complete", "run-3": "failed"}
    return pack, recorder.killed


def assert_same_runs(folder, whole):
    names = sorted(path.name for path in whole.glob("run-*"))
    assert sorted(path.name for path in folder.glob("run-*")) == names
    for name in names:
        assert_same_run(folder / name, whole / name)


def resume_and_compare(killed, pack, tmp_path, *, inputs):
    resumed = Pack(Path(shutil.copytree(killed.folder, tmp_path / "resumed")), pack.make_config)
    resumed.names = pack.names
    assert resumed.train(inputs=inputs, without=killed.ended)
    assert_same_runs(resumed.folder, pack.folder)
    for name, value in resumed.values.items():
        assert value == pack.values[name]
    assert {*resumed.ended, *killed.ended} == {*pack.names}
    assert not (resumed.folder / STATE).exists()


MOMENTS = ("after the report", "run-1 is stopped", "run-0 is complete", "before the commit", "after the commit")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pack_killed_at_this_moment_ends_the_same(undisturbed, inputs, tmp_path, moment):
    pack, killed = undisturbed
    found = [one for one in killed if one.moment == moment]
    resume_and_compare(found[len(found) // 2], pack, tmp_path, inputs=inputs)


@pytest.mark.soak
def test_a_pack_killed_at_any_moment_ends_the_same(undisturbed, inputs, tmp_path):
    pack, killed = undisturbed
    # at many moments nothing was written since the one before; where all runs have ended, nothing resumes
    different = {read_all(one): one for one in killed if len(one.ended) < len(pack.names)}
    assert len(different) > 10
    for number, one in enumerate(different.values()):
        resume_and_compare(one, pack, tmp_path / str(number), inputs=inputs)


def read_all(killed):
    files = sorted(path for path in killed.folder.rglob("*") if path.is_file())
    contents = [(str(path.relative_to(killed.folder)), hashlib.sha256(path.read_bytes()).digest()) for path in files]
    return (*killed.ended, *contents)


def test_a_pack_that_was_asked_to_stop_keeps_the_step_and_ends_the_same(undisturbed, inputs, tmp_path):
    pack, _ = undisturbed
    stopped, asked = Pack(tmp_path, pack.make_config), iter(range(100))
    assert not stopped.train(inputs=inputs, stop_requested=lambda: next(asked) == 3)
    assert stopped.ended == {"run-0": "interrupted", "run-1": "stopped", "run-2": "interrupted", "run-3": "failed"}
    state = read_checkpoint(tmp_path / STATE)
    assert (state["runs"], get_step(state)) == (["run-0", "run-2"], 3)
    record = read_run(tmp_path / "run-0")
    assert (record.status, record.reason) == ("interrupted", "stopped at step 3 of 6")
    assert stopped.train(inputs=inputs, without=("run-1", "run-3"))
    assert_same_runs(tmp_path, pack.folder)


def test_any_error_of_a_pack_leaves_its_checkpoint(undisturbed, inputs, tmp_path):
    pack, _ = undisturbed
    for number, error in enumerate([RuntimeError("shapes differ"), OSError(28, "full")]):
        broken = Pack(tmp_path / str(number), pack.make_config)
        broken.folder.mkdir()

        def fail(moment, error=error):
            if moment == "run-1 is stopped":
                raise error

        broken.moment = fail
        with pytest.raises(type(error)):
            broken.train(inputs=inputs)
        assert (broken.folder / STATE).exists()
        assert read_run(broken.folder / "run-1").status == "stopped"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_stream_that_slots_share_continues_after_a_kill(make_config, tmp_path, checkpointing):
    """A model that drops attention probabilities in its fused kernel draws for all slots from torch's own stream."""
    model = save_gpt2(tmp_path / "model", attention=0.3, others=0.0)

    def config(own):
        settings = {"method.rank": own["method.rank"], "method.dropout": 0.2, "model.attention": "sdpa"}
        shared = {"trainer.activation_checkpointing": checkpointing, "trainer.max_steps": 6}
        return make_config({**model, **settings, **shared})

    inputs = load_inputs(config(SETTINGS[0]))
    (tmp_path / "whole").mkdir()
    pack = Pack(tmp_path / "whole", config, num_runs=3)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(pack, tmp_path / "killed", patch)
        pack.train(inputs=inputs)
    assert read_run(pack.folder / "run-0").pack["shared_draws"] is True
    killed = next(one for one in recorder.killed if one.moment == "run-1 is stopped")
    torch.manual_seed(9)  # whatever was drawn before
    resume_and_compare(killed, pack, tmp_path / "first", inputs=inputs)
    # the same without the stream: it is what makes the difference
    state = read_checkpoint(killed.folder / STATE)
    write_checkpoint(state | {"torch_streams": []}, killed.folder / STATE)
    other = Pack(killed.folder, config, num_runs=3)
    assert other.train(inputs=inputs, without=killed.ended)
    assert logged_rows(killed.folder / "run-0") != logged_rows(pack.folder / "run-0")

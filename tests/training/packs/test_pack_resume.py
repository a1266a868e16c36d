"""A pack that is killed at any moment resumes where it was committed, and what comes of its runs has the same bits."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.training.packs.conftest import save_gpt2
from tests.training.runs import assert_same_run, logged_rows

import lorasweep.training.packs.pack as pack_file
from lorasweep.data import batching
from lorasweep.errors import Diverged
from lorasweep.record import read_run
from lorasweep.training.checkpoint import get_step, read_pack, split_pack
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.packs.pack import train_pack

STATE = "pack.ckpt"
SETTINGS = (
    {"method.rank": 2, "method.dropout": 0.2},
    {"method.rank": 8, "method.dropout": 0.1, "seed": 3},
    {"method.rank": 4, "method.targets": ["q_proj", "up_proj"], "optim.weight_decay": 0.1},
    {"method.rank": 16, "optim.lr": 1e38, "optim.clip_norm": None, "method.targets": ["o_proj", "q_proj"]},
    {"method.rank": 3, "schedule": "cosine", "seed": 5},
    {"method.rank": 1, "method.dropout": 0.3, "seed": 6},
)
"""Of the runs of the search below. The fourth diverges: the capacity of the pack shrinks when it is gone."""
NUM_RUNS = len(SETTINGS)
STOPPED = {("run-1", 2), ("run-5", 2)}


class Search:
    """Stands in for the controller: gives runs to a pack of three slots, and stops two of them.

    In slot order: 0, 1 begin; 1 is stopped, 2 takes its slot, 3 gets a new slot; 0 ends, 3 diverges; 4 and 5 take their
    slots; 5 is stopped; the pack shrinks while 2 and 4 end.
    """

    def __init__(self, folder, make_config, *, num_runs=NUM_RUNS):
        self.folder = folder
        self.make_config = make_config
        self.waiting = [f"run-{n}" for n in range(num_runs)]
        self.values: dict[str, float] = {}
        self.moment: Callable[[str], None] = lambda name: None

    def job(self, name):
        settings = SETTINGS[int(name.split("-")[1])]
        return RunRequest(
            config=self.make_config({"trainer.eval_fraction": 0.5, **settings}),
            run_folder=RunFolder(path=self.folder / name),
        )

    def ended(self, request, record):
        name = request.run_folder.path.name
        if isinstance(record, Diverged):
            self.moment(f"{name} failed")
            return
        self.moment(f"{name} is about to be {record.status}")
        self.moment(f"{name} is {record.status}")

    def supply(self):
        self.moment("supply")
        return self.job(self.waiting.pop(0)) if self.waiting else None

    def report(self, evaluated):
        self.moment("before the report")
        found = {f"{one.run.run_folder.path.name} at {one.step}": one.metrics["bits_per_byte"] for one in evaluated}
        self.values |= found
        self.moment("after the report")
        return ["poor" if (one.run.run_folder.path.name, one.step) in STOPPED else None for one in evaluated]

    def begin(self, *, inputs, slots=2):
        return self.train([self.job(self.waiting.pop(0)) for _ in range(slots)], inputs=inputs)

    def resume(self, waiting, *, inputs):
        resumed = read_pack(self.folder / STATE)
        assert resumed is not None
        self.waiting = list(waiting)
        return self.train([self.job(name) for name in resumed.runs], inputs=inputs, resumed=resumed)

    def train(self, jobs, *, inputs, **hooks):
        return train_pack(
            jobs,
            inputs=inputs,
            slots=3,
            next_run=self.supply,
            on_evaluation=self.report,
            on_end=self.ended,
            checkpoint_file=self.folder / STATE,
            **hooks,
        )


class Killed(NamedTuple):
    """A search's folder as a kill at some moment leaves it, and what the search had left to give at its commit."""

    folder: Path
    moment: str
    waiting: list[str]


class Recorder:
    """Copies the folder of a search at every moment of which it hears."""

    def __init__(self, search, into, monkeypatch):
        self.search = search
        self.into = into
        self.killed: list[Killed] = []
        self.committed: list[str] | None = None
        search.moment = self.take
        true_write, true_replace, true_unlink = pack_file.write_pack, os.replace, Path.unlink

        def write(path, state):
            self.take("before the commit")
            waiting = list(search.waiting)
            true_write(path, state)
            self.committed = waiting
            self.take("after the commit")

        def replace(source, target, **given):
            # of what is written beside the moments above, a few are as good as all: weights, rows and records
            true_replace(source, target, **given)
            if Path(target).name == "run.json" and len(self.killed) % 3 == 0:
                self.take(f"after {Path(target).parent.name}/run.json")

        def unlink(path, **given):
            true_unlink(path, **given)
            if path.suffix == ".ckpt" and not path.name.startswith("."):
                self.take(f"after the removal of {path.parent.name}/{path.name[:13]}")

        monkeypatch.setattr(pack_file, "write_pack", write)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(Path, "unlink", unlink)

    def take(self, moment):
        if self.committed is not None and (self.search.folder / STATE).exists():
            number = len(self.killed)
            copy = Path(shutil.copytree(self.search.folder, self.into / str(number)))
            self.killed.append(Killed(copy, moment, list(self.committed)))


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Lets an evaluation use half of the four validation examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "MIN_PART_EXAMPLES", 1)
        yield


@pytest.fixture(scope="module")
def undisturbed(make_config, inputs, tmp_path_factory):
    """A search that nothing disturbed, and its folder at every moment on the way."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "whole").mkdir()
    search = Search(folder / "whole", make_config)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(search, folder / "killed", patch)
        assert search.begin(inputs=inputs)
    return search, recorder.killed


def assert_same_runs(folder, whole):
    names = sorted(path.name for path in whole.glob("run-*"))
    assert sorted(path.name for path in folder.glob("run-*")) == names
    for name in names:
        assert_same_run(folder / name, whole / name)


def resume_and_compare(killed, search, tmp_path, *, inputs):
    resumed = Search(Path(shutil.copytree(killed.folder, tmp_path / "resumed")), search.make_config)
    assert resumed.resume(killed.waiting, inputs=inputs)
    assert_same_runs(resumed.folder, search.folder)
    for name, value in resumed.values.items():
        assert value == search.values[name]
    assert not (resumed.folder / STATE).exists()


MOMENTS = (
    *("after the report", "run-1 is stopped", "run-2 is about to be complete"),
    *("before the commit", "after the commit"),
)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pack_killed_at_this_moment_ends_the_same(undisturbed, inputs, tmp_path, moment):
    search, killed = undisturbed
    found = [one for one in killed if one.moment == moment]
    resume_and_compare(found[len(found) // 2], search, tmp_path, inputs=inputs)


@pytest.mark.soak
def test_a_pack_killed_at_any_moment_ends_the_same(undisturbed, inputs, tmp_path):
    search, killed = undisturbed
    assert len(killed) > 30
    different = {read_all(one): one for one in killed}  # at many moments nothing was written since the one before
    assert len(different) > 15
    for number, one in enumerate(different.values()):
        resume_and_compare(one, search, tmp_path / str(number), inputs=inputs)


def read_all(killed):
    files = sorted(path for path in killed.folder.rglob("*") if path.is_file())
    contents = [(str(path.relative_to(killed.folder)), hashlib.sha256(path.read_bytes()).digest()) for path in files]
    return (*killed.waiting, *contents)


def test_a_pack_that_was_asked_to_stop_goes_back_to_its_last_boundary_and_ends_the_same(undisturbed, inputs, tmp_path):
    search, _ = undisturbed
    stopped = Search(tmp_path, search.make_config)
    asked = iter(range(100))
    jobs = [stopped.job(stopped.waiting.pop(0)) for _ in range(2)]
    assert not stopped.train(jobs, inputs=inputs, stop_requested=lambda: next(asked) == 3)
    states = read_pack(tmp_path / STATE).runs
    assert [(name, get_step(state)) for name, state in states.items()] == [("run-0", 2), ("run-2", 0), ("run-3", 0)]
    record = read_run(tmp_path / "run-0")
    assert (record.status, record.reason) == ("interrupted", "stopped after step 3 of 4")
    assert stopped.resume(stopped.waiting, inputs=inputs)
    assert_same_runs(tmp_path, search.folder)


def test_an_error_that_would_come_again_leaves_no_state_and_one_of_the_disk_does(undisturbed, inputs, tmp_path):
    search, _ = undisturbed
    for number, (error, stays) in enumerate([(RuntimeError("shapes differ"), False), (OSError(28, "full"), True)]):
        broken = Search(tmp_path / str(number), search.make_config)
        broken.folder.mkdir()

        def fail(moment, error=error):
            if moment == "run-1 is stopped":
                raise error

        broken.moment = fail
        with pytest.raises(type(error)):
            broken.begin(inputs=inputs)
        assert (broken.folder / STATE).exists() == stays
        assert read_run(broken.folder / "run-1").status == "stopped"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_stream_that_slots_share_continues_after_a_kill(make_config, tmp_path, checkpointing):
    """A model that drops attention probabilities in its fused kernel draws for all slots from torch's own stream."""
    model = save_gpt2(tmp_path / "model", attention=0.3, others=0.0)

    def config(own):
        settings = {"method.rank": own["method.rank"], "method.dropout": 0.2, "model.attention": "sdpa"}
        return make_config({**model, **settings, "trainer.activation_checkpointing": checkpointing})

    inputs = load_inputs(config(SETTINGS[0]))
    (tmp_path / "whole").mkdir()
    search = Search(tmp_path / "whole", config)
    search.waiting = search.waiting[:3]
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(search, tmp_path / "killed", patch)
        search.begin(inputs=inputs)
    assert read_run(search.folder / "run-0").pack["shared_draws"] is True
    (killed,) = [one for one in recorder.killed if one.moment == "run-1 is stopped"]
    torch.manual_seed(9)  # whatever was drawn before
    resume_and_compare(killed, search, tmp_path / "first", inputs=inputs)
    later = [one for one in recorder.killed if one.moment == "after the commit"][1]
    resume_and_compare(later, search, tmp_path / "second", inputs=inputs)
    # the same without the stream: it is what makes the difference
    names = list(read_pack(later.folder / STATE).runs)
    split_pack(later.folder / STATE, runs=later.folder)
    other = Search(later.folder, config)
    other.waiting = later.waiting
    assert other.train([other.job(name) for name in names], inputs=inputs)
    assert logged_rows(later.folder / "run-0") != logged_rows(search.folder / "run-0")

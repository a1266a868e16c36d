"""Sweeps with made-up runs, whose scores are computed from their settings instead of trained."""

import copy
import itertools
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import yaml
from tests.small_runs import rates
from torch import nn

import lorasweep.sweep.cost
import lorasweep.sweep.workers.worker as worker_file
from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import RunConfig
from lorasweep.errors import Diverged, WorkerError
from lorasweep.record import RunRecord, read_run, write_record
from lorasweep.sweep.controller import stopping
from lorasweep.sweep.controller.lifecycle import create_sweep, reopen_sweep
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.workers.train import train_sweep
from lorasweep.training.checkpoint import PackCheckpoint, write_pack
from lorasweep.training.open_run import RunEvaluation

CONTENT = {
    "name": "made_up",
    "description": "three arms",
    "settings": {
        "data.block_length": 32,
        "trainer.max_steps": 8,
        "trainer.eval_every_steps": 2,
        "worker.pack_size": 1,
        "confirm.seeds": 0,
    },
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {"settings": {"method": "full"}, "space": {"optim.lr": rates(1e-4, 1e-2)}, "trials": 3},
        "lora": {
            "settings": {"method": "lora"},
            "space": {"method.rank": [1, 2, 4], "optim.lr": rates(1e-3, 1e-1)},
            "trials": 6,
        },
    },
}
UNTRAINED = {"bits_per_byte": 0.21}
"""A score without training, to which a made-up run comes by half only if its learning rate is near 0.01."""


@pytest.fixture(autouse=True)
def stop_short_runs(monkeypatch):
    """Lets the sweep stop runs of a few steps, unless a test of the rule itself asks otherwise."""
    assert lorasweep.sweep.cost.MIN_STEPS == 60  # imported before the change
    monkeypatch.setattr(stopping, "MIN_STEPS", 2)


@pytest.fixture
def three_arms():
    """A sweep file's content, to change."""
    return copy.deepcopy(CONTENT)


@pytest.fixture
def content(three_arms):
    """A sweep file's content, to change."""
    return three_arms


@pytest.fixture
def write_file(tmp_path):
    def write(content):
        path = tmp_path / "made_up.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write


class Killed(BaseException):
    """Stands for `kill -9`: no handler of Exception catches it."""


@dataclass
class MadeUpRuns:
    """Replaces `train_alone` and `score_run`.

    A run is evaluated every `trainer.eval_every_steps` steps, the frozen base at step 0. A run is resumed from the step
    at which it was interrupted.
    """

    score: Callable[[RunConfig, int], float] = lambda config, step: abs(config.optim.lr - 0.01) + 1 / (1 + step)
    """Returns the score of a run at a step; may raise an error of training."""
    loss: Callable[[float, int], float] = lambda value, step: value
    """Returns the validation loss of a run with a score at a step."""
    score_on_test: Callable[[RunRecord], float] = lambda record: record.best["bits_per_byte"] + 1
    """Returns the score of a run on test data; may raise."""
    begun: list[tuple[str, int | None]] = field(default_factory=list)
    """Arm and trial of each session of a solo run, in order; a confirm run of an untried setting has no trial."""
    steps_done: dict[Path, int] = field(default_factory=dict)
    """Step of the newest checkpoint of each solo run."""
    steps_trained: int = 0
    """Steps of all sessions together, including repeated ones."""
    values: dict[Path, dict[int, float]] = field(default_factory=dict)
    """Evaluations of each run, by step."""
    configs: dict[Path, RunConfig] = field(default_factory=dict)
    scored: list[str] = field(default_factory=list)
    """Names of the folders that were scored on test data, in order."""
    base_is_in_use: bool = False
    raised: list[Exception] = field(default_factory=list)
    """Errors that a test asked for, as they were raised."""

    def score_run(self, folder, *, inputs, retained=None):
        assert not self.base_is_in_use
        record = read_run(folder)
        assert record.status == "complete"
        if not record.test:
            inputs.splits.test()
            self.scored.append(folder.name)
            record.test = {record.metric: self.score_on_test(record)}
            write_record(record, folder)
        return record

    def __call__(self, config, run_folder, *, inputs, on_evaluation, stop_requested, on_phase, resume):
        assert resume
        assert run_folder.arm is not None
        self.begun.append((run_folder.arm, run_folder.trial))
        every, last = config.trainer.eval_every_steps, config.num_steps
        for step in range(self.steps_done.get(run_folder.path, 0) + every, last + 1, every) if last else [0]:
            value = self.evaluate(config, run_folder.path, step)
            reason = on_evaluation(step, {"loss": self.loss(value, step), config.data.metric: value})
            if step < last and reason is not None:
                return self.close(config, run_folder.path, step, "stopped", reason=reason)
            self.steps_done[run_folder.path] = step
            if step < last and stop_requested():
                return self.close(config, run_folder.path, step, "interrupted")
        return self.close(config, run_folder.path, last, "complete")

    def evaluate(self, config, folder, step):
        """Trains a run up to its next evaluation and returns its score there."""
        self.configs[folder] = config
        self.steps_trained += config.trainer.eval_every_steps
        try:
            value = self.score(config, step)
        except Exception as error:
            self.raised.append(error)
            raise
        self.values.setdefault(folder, {})[step] = value
        return value

    def close(self, config, folder, step, status, *, reason=None):
        """Writes a run's record and returns it."""
        value, best = min((value, at) for at, value in self.values[folder].items() if at <= step)
        record = RunRecord(
            status=status,
            reason=reason,
            config=asdict(config),
            metric=config.data.metric,
            direction="minimize",
            best={config.data.metric: value, "step": best},
            last={
                config.data.metric: self.values[folder][step],
                "loss": self.loss(self.values[folder][step], step),
                "step": step,
            },
            steps_planned=config.num_steps,
            steps_done=step,
            trainable_params=1000 * getattr(config.method, "rank", 0),
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_record(record, folder)
        return record


@dataclass
class MadeUpPacks:
    """Replaces `train_pack`: does the same calls in the same order at each evaluation."""

    runs: MadeUpRuns
    errors: list[Exception] = field(default_factory=list)
    """Errors that the first packs raise when they start, one each."""
    sizes: list[int] = field(default_factory=list)
    """Number of slots of each pack at its start."""
    checkpoints: dict[Path, set[int]] = field(default_factory=dict)
    """Steps at which each run has a checkpoint for packs."""
    trained: list[tuple[str, int]] = field(default_factory=list)
    """Folder name and step of each evaluation, in order."""

    def __call__(
        self,
        jobs,
        *,
        inputs,
        slots,
        next_run,
        on_evaluation,
        on_end,
        checkpoint_file,
        resumed,
        stop_requested,
        on_phase,
    ):
        assert len(jobs) <= slots
        self.on_end = on_end
        self.sizes.append(len(jobs))
        self.runs.base_is_in_use = True
        try:
            if self.errors:
                self.runs.raised.append(self.errors.pop(0))
                raise self.runs.raised[-1]
            states = [None] * len(jobs) if resumed is None else resumed.runs.values()
            steps = {job: self._first_step(job, state) for job, state in zip(jobs, states, strict=True)}
            return self._train(steps, slots, next_run, on_evaluation, checkpoint_file, stop_requested)
        except Exception as error:
            if error not in self.runs.raised and not isinstance(error, WorkerError):
                pytest.fail(f"a pack broke by an error that no test asked for: {traceback.format_exc()}")
            checkpoint_file.unlink(missing_ok=True)
            raise
        finally:
            self.runs.base_is_in_use = False

    def _train(self, steps, most, supply, on_evaluation, checkpoint_file, stop_requested):
        jobs = list(steps)
        trainer = jobs[0].config.trainer
        self._commit(jobs, steps, checkpoint_file)
        while jobs:
            if stop_requested():
                for job in jobs:
                    self._interrupt(job, steps[job])
                return False
            living = [job for job in jobs if self._advance(job, steps, every=trainer.eval_every_steps)]
            values = [self.runs.values[job.run_folder.path][steps[job]] for job in living]
            evaluated = [
                RunEvaluation(job, steps[job], {"loss": value, job.config.data.metric: value})
                for job, value in zip(living, values, strict=True)
            ]
            reasons = dict(zip(living, on_evaluation(evaluated) if living else [], strict=True))
            slots = [job if job in reasons and not self._ends(job, steps[job], reasons[job]) else None for job in jobs]
            for slot, job in enumerate(slots):
                if job is None and (refill := supply()) is not None:
                    slots[slot] = refill
            is_full = None not in slots
            jobs = [job for job in slots if job is not None]  # a slot that stays empty is dropped
            while is_full and len(jobs) < most and (further := supply()) is not None:
                jobs.append(further)
            steps |= {job: self._first_step(job) for job in jobs if job not in steps}
            self._commit(jobs, steps, checkpoint_file)
        return True

    def _advance(self, job, steps, *, every):
        """Trains a slot up to its next evaluation and returns whether its run goes on."""
        steps[job] += every
        self.trained.append((job.run_folder.path.name, steps[job]))
        try:
            self.runs.evaluate(job.config, job.run_folder.path, steps[job])
        except Diverged as error:
            self.on_end(job, error)
            return False
        return True

    def _ends(self, job, step, reason):
        if step == job.config.trainer.max_steps:
            self.on_end(job, self.runs.close(job.config, job.run_folder.path, step, "complete"))
        elif reason is not None:
            self.on_end(job, self.runs.close(job.config, job.run_folder.path, step, "stopped", reason=reason))
        else:
            return False
        return True

    def _first_step(self, job, state=None):
        kept = self.checkpoints.get(job.run_folder.path, set())
        return max(kept, default=0) if state is None else state["global_step"]

    def _interrupt(self, job, step):
        if step:
            self.runs.close(job.config, job.run_folder.path, step, "interrupted")

    def _commit(self, jobs, steps, checkpoint_file):
        if not jobs:
            checkpoint_file.unlink(missing_ok=True)
            return
        for job in jobs:
            self.checkpoints.setdefault(job.run_folder.path, set()).add(steps[job])
        states = {job.run_folder.path.name: {"global_step": steps[job]} for job in jobs}
        write_pack(checkpoint_file, PackCheckpoint(runs=states, rng_state=""))


@pytest.fixture
def runs(monkeypatch):
    made_up = MadeUpRuns()
    monkeypatch.setattr(worker_file, "train_alone", made_up)
    monkeypatch.setattr(worker_file, "score_run", made_up.score_run)
    return made_up


@pytest.fixture
def packs(runs, monkeypatch):
    made_up = MadeUpPacks(runs)
    monkeypatch.setattr(worker_file, "train_pack", made_up)
    return made_up


class NoInputs:
    """Made-up runs need neither model nor data, but for a test split that notes when it is read."""

    def __init__(self):
        self.test_reads = 0
        self.splits = self
        self.base = SimpleNamespace(  # so that the seed makes a difference to every run
            new_head_names=("head",), labels=None, model=nn.ModuleDict({"head": nn.Identity()})
        )

    def load(self, config):
        return self

    def test(self):
        self.test_reads += 1
        return SimpleNamespace(notes=())


@pytest.fixture
def begin(write_file, tmp_path):
    """Makes a sweep's folder from a file's content and overrides."""

    def make(content, *overrides, folder="sweep", constant_answer=MappingProxyType({})):
        definition = read_definition(write_file(content), overrides)
        metric = ScoreMetric(name="bits_per_byte", direction="minimize")
        return create_sweep(definition, tmp_path / folder, metric=metric, constant_answer=constant_answer)

    return make


@pytest.fixture
def work():
    """Runs the rest of an open sweep and closes it.

    `stop_at` stops it when the worker asks for the n-th time whether to stop, `stop_when` as soon as it returns True.
    """

    def run(folder, *, stop_at=None, stop_when=lambda: False, inputs_cache=None):
        asked = itertools.count(1)

        def stop_requested():
            return stop_when() or (stop_at is not None and next(asked) >= stop_at)

        return train_sweep(folder, inputs_cache or NoInputs(), stop_requested=stop_requested)

    return run


@pytest.fixture
def finish(work):
    """Resumes a sweep until it is complete, and returns the number of sessions; `stop_at` ends each of them early."""

    def run(path, *, stop_at=None):
        sessions = 1
        while not work(reopen_sweep(path), stop_at=stop_at):
            sessions += 1
            assert sessions < 100
        return sessions

    return run

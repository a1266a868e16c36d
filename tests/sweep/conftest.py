"""Sweeps with made-up runs, whose scores are computed from their settings instead of trained."""

import copy
import itertools
import json
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
    """Replaces `train_runs`, `split_checkpoint` and `score_run`.

    Runs of a pack are evaluated every `trainer.eval_every_steps` steps, the frozen base at step 0. A pack resumes from
    its last evaluation.
    """

    score: Callable[[RunConfig, int], float] = lambda config, step: abs(config.optim.lr - 0.01) + 1 / (1 + step)
    """Returns the score of a run at a step; may raise an error of training."""
    loss: Callable[[float, int], float] = lambda value, step: value
    """Returns the validation loss of a run with a score at a step."""
    score_on_test: Callable[[RunRecord], float] = lambda record: record.best["bits_per_byte"] + 1
    """Returns the score of a run on test data; may raise."""
    errors: list[Exception] = field(default_factory=list)
    """Errors that the first packs of several runs raise when they start, one each."""
    begun: list[list[str]] = field(default_factory=list)
    """Names of the runs of each pack that began or resumed, in order."""
    trained: list[tuple[str, int]] = field(default_factory=list)
    """Folder name and step of each evaluation, in order."""
    values: dict[Path, dict[int, float]] = field(default_factory=dict)
    """Evaluations of each run, by step."""
    configs: dict[Path, RunConfig] = field(default_factory=dict)
    scored: list[str] = field(default_factory=list)
    """Names of the folders that were scored on test data, in order."""
    base_is_in_use: bool = False
    raised: list[Exception] = field(default_factory=list)
    """Errors that a test asked for, as they were raised."""

    @property
    def sizes(self):
        """The number of runs of each pack of an arm that packs."""
        return [len(names) for names in self.begun if names[0].startswith("lora")]

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

    def split_checkpoint(self, file, parts):
        if file.exists():
            steps = json.loads(file.read_text())
            for path, names in parts.items():
                path.write_text(json.dumps({name: steps[name] for name in names}))
            if file not in parts:
                file.unlink()

    def __call__(self, requests, *, inputs, checkpoint_file, on_evaluation, on_end, stop_requested, on_phase):
        self.begun.append([request.run_folder.path.name for request in requests])
        self.base_is_in_use = True
        try:
            if self.errors and len(requests) > 1:
                raise self.note(self.errors.pop(0))
            return self.train(list(requests), checkpoint_file, on_evaluation, on_end, stop_requested)
        except Exception as error:
            if error not in self.raised and not isinstance(error, WorkerError | OSError):
                pytest.fail(f"a pack broke by an error that no test asked for: {traceback.format_exc()}")
            raise
        finally:
            self.base_is_in_use = False

    def train(self, running, checkpoint_file, on_evaluation, on_end, stop_requested):
        kept = json.loads(checkpoint_file.read_text()) if checkpoint_file.exists() else None
        steps = {kept[request.run_folder.path.name] if kept else 0 for request in running}
        (step,) = steps  # all runs of a pack are at the same step
        every, last = running[0].config.trainer.eval_every_steps, running[0].config.num_steps
        while running:
            if step and stop_requested():
                for request in running:
                    on_end(request, self.close(request, step, "interrupted"))
                return False
            step = min(step + every, last)
            scores = {}
            for request in list(running):
                try:
                    scores[request] = self.evaluate(request, step)
                except Diverged as error:
                    running.remove(request)
                    on_end(request, error)
            metrics = {one: {"loss": self.loss(v, step), one.config.data.metric: v} for one, v in scores.items()}
            reasons = on_evaluation([RunEvaluation(one, step, values) for one, values in metrics.items()])
            for request, reason in zip(scores, reasons, strict=True):
                if step == last or reason is not None:
                    running.remove(request)
                    on_end(request, self.close(request, step, "complete" if step == last else "stopped", reason=reason))
            if running:
                states = {request.run_folder.path.name: step for request in running}
                checkpoint_file.write_text(json.dumps(states))
        checkpoint_file.unlink(missing_ok=True)
        return True

    def evaluate(self, request, step):
        folder, config = request.run_folder.path, request.config
        self.configs[folder] = config
        self.trained.append((folder.name, step))
        try:
            value = self.score(config, step)
        except Exception as error:
            self.note(error)
            raise
        self.values.setdefault(folder, {})[step] = value
        return value

    def note(self, error):
        self.raised.append(error)
        return error

    def close(self, request, step, status, *, reason=None):
        """Writes a run's record and returns it."""
        config, folder = request.config, request.run_folder.path
        values = {at: value for at, value in self.values[folder].items() if at <= step}
        value, best = min((value, at) for at, value in values.items())
        record = RunRecord(
            status=status,
            reason=reason,
            config=asdict(config),
            metric=config.data.metric,
            direction="minimize",
            best={config.data.metric: value, "step": best},
            last={config.data.metric: values[step], "loss": self.loss(values[step], step), "step": step},
            steps_planned=config.num_steps,
            steps_done=step,
            trainable_params=1000 * getattr(config.method, "rank", 0),
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_record(record, folder)
        return record


@pytest.fixture
def runs(monkeypatch):
    made_up = MadeUpRuns()
    monkeypatch.setattr(worker_file, "train_runs", made_up)
    monkeypatch.setattr(worker_file, "split_checkpoint", made_up.split_checkpoint)
    monkeypatch.setattr(worker_file, "score_run", made_up.score_run)
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

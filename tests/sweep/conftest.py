"""Sweeps whose runs are made up: a score worked out from the settings, in no time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import lorasweep.sweep.worker as worker_file
from lorasweep.config.run import RunConfig
from lorasweep.record import RunRecord, TrialRow, write_record
from lorasweep.sweep import SweepFolder, Worker, create_sweep, read_definition, reopen_sweep
from lorasweep.training import RunPlace, Telemetry

CONTENT: dict[str, Any] = {
    "name": "made_up",
    "description": "three arms",
    "settings": {
        "data.block_length": 32,
        "trainer.max_steps": 8,
        "trainer.eval_every_steps": 2,
        "worker.pack_size": 1,
        "pruner": "none",
        "confirm.seeds": 0,
    },
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {
            "settings": {"method": "full"},
            "space": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
            "trials": 3,
        },
        "lora": {
            "settings": {"method": "lora"},
            "space": {"method.rank": [1, 2, 4], "optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
            "trials": 6,
        },
    },
}


@pytest.fixture
def content() -> dict[str, Any]:
    """A sweep file's content, to change."""
    copied: dict[str, Any] = yaml.safe_load(yaml.safe_dump(CONTENT))
    return copied


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a sweep file and returns where it is."""

    def write(content: Any) -> Path:
        path = tmp_path / "made_up.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@dataclass
class MadeUpRuns:
    """Stands in for `train_run` and `score_run`.

    A training evaluates every `trainer.eval_every_steps`, and goes on where it was stopped.
    """

    score: Callable[[RunConfig, int], float] = lambda config, step: abs(config.optim.lr - 0.01) + 1 / (1 + step)
    """Score of a run at a step; may raise what a training raises."""
    begun: list[tuple[str, int]] = field(default_factory=list)
    """Arm and trial of each session of a run, in order."""
    steps_done: dict[Path, int] = field(default_factory=dict)
    steps_trained: int = 0
    """Steps of all sessions together, repeated ones included."""
    ended: dict[Path, RunRecord] = field(default_factory=dict)
    """Records of complete runs, by folder."""
    configs: dict[Path, RunConfig] = field(default_factory=dict)
    scored: list[str] = field(default_factory=list)
    """Names of the folders that were scored on test data, in order."""
    score_on_test: Callable[[RunRecord], float] = lambda record: record.best["bits_per_byte"] + 1
    """Score of a run on test data; may raise."""

    def score_run(self, folder: Path, *, bench: Any) -> RunRecord:
        record = self.ended[folder]
        bench.parts.test()
        self.scored.append(folder.name)
        record.test = {record.metric: self.score_on_test(record)}
        return record

    def __call__(
        self,
        config: RunConfig,
        place: RunPlace,
        *,
        bench: Any,
        on_evaluation: Callable[[int, float], bool],
        stop_requested: Callable[[], bool],
        resume: bool,
    ) -> RunRecord:
        assert resume
        assert place.arm is not None
        assert place.trial is not None
        self.begun.append((place.arm, place.trial))
        self.configs[place.folder] = config
        every, last = config.trainer.eval_every_steps, config.trainer.max_steps
        record = RunRecord(
            status="running",
            config=asdict(config),
            metric=config.data.metric,
            direction="minimize",
            steps_planned=last,
        )
        place.folder.mkdir(parents=True, exist_ok=True)
        for step in range(self.steps_done.get(place.folder, 0) + every, last + 1, every):
            value = self.score(config, step)
            self.steps_trained += every
            record.best, record.steps_done = {record.metric: value, "step": step}, step
            goes_on = on_evaluation(step, value)
            self.steps_done[place.folder] = step
            if step < last and not goes_on:
                return self._close(record, place.folder, "paused")
            if step < last and stop_requested():
                return self._close(record, place.folder, "interrupted")
        self.ended[place.folder] = record
        return self._close(record, place.folder, "complete")

    def _close(self, record: RunRecord, folder: Path, status: Any) -> RunRecord:
        record.status = status
        write_record(record, folder)
        return record


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> MadeUpRuns:
    """The made-up runs of this test's sweeps."""
    made_up = MadeUpRuns()
    monkeypatch.setattr(worker_file, "train_run", made_up)
    monkeypatch.setattr(worker_file, "score_run", made_up.score_run)
    return made_up


class NoBenches:
    """Made-up runs need neither model nor data, but for a test part that notes when it is read."""

    def __init__(self) -> None:
        self.test_reads = 0
        self.telemetry = Telemetry()
        self.parts = self

    def of(self, config: RunConfig) -> NoBenches:
        return self

    def test(self) -> SimpleNamespace:
        self.test_reads += 1
        return SimpleNamespace(notes=())


class Silent:
    """An observer that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, int]] = []
        self.stages: list[tuple[str, dict[str, int]]] = []

    def stage_started(self, stage: str, asked: Mapping[str, int]) -> None:
        self.stages.append((stage, dict(asked)))

    def trial_started(self, arm: Any, number: int, params: Mapping[str, Any], *, steps: int) -> None:
        self.heard.append(("started", arm.name, number))

    def evaluated(self, arm: Any, number: int, step: int, value: float) -> None:
        self.heard.append((f"evaluated {step}", arm.name, number))

    def trial_paused(self, arm: Any, number: int) -> None:
        self.heard.append(("paused", arm.name, number))

    def trial_ended(self, arm: Any, number: int, state: str, value: float | None, *, wall_s: float) -> None:
        self.heard.append((state, arm.name, number))


@pytest.fixture
def begin(write_file: Callable[[Any], Path], tmp_path: Path) -> Callable[..., SweepFolder]:
    """Makes a sweep's folder from a file's content and overrides."""

    def make(content: Any, *overrides: str, folder: str = "sweep") -> SweepFolder:
        definition = read_definition(write_file(content), overrides)
        configs = {arm.name: next(arm.corners()) for arm in definition.arms}
        return create_sweep(definition, tmp_path / folder, configs=configs, metric="bits_per_byte")

    return make


@pytest.fixture
def work() -> Callable[..., bool]:
    """Runs what is left of an open sweep; `stop_at` stops it at the worker's so-manieth question. Closes the folder."""

    def run(folder: SweepFolder, *, stop_at: int | None = None, observer: Any = None, benches: Any = None) -> bool:
        asked = itertools.count(1)

        def stop_requested() -> bool:
            return stop_at is not None and next(asked) >= stop_at

        try:
            return Worker(
                folder,
                benches or NoBenches(),
                observer=observer or Silent(),
                stop_requested=stop_requested,
                run_ended=lambda record, path, params: None,
            ).run()
        finally:
            folder.close()

    return run


@pytest.fixture
def take_up(work: Callable[..., bool]) -> Callable[..., int]:
    """Takes a sweep up again and again until it is complete, each session stopped at its `stop_at`-th question."""

    def run(path: Path, *, stop_at: int | None = None) -> int:
        sessions = 1
        while not work(reopen_sweep(path), stop_at=stop_at):
            sessions += 1
            assert sessions < 100
        return sessions

    return run


@pytest.fixture
def benches() -> NoBenches:
    """Stands in for base models and data; notes reads of the test part."""
    return NoBenches()


def of_arm(rows: list[TrialRow], arm: str) -> list[TrialRow]:
    """Returns the trials of one arm."""
    return [row for row in rows if row.arm == arm]


@pytest.fixture
def silent() -> Silent:
    """An observer that notes what it hears."""
    return Silent()

"""The record of a run, `run.json`, and the log of its steps, `steps.jsonl`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lorasweep.config.build import build, dotted_items
from lorasweep.config.data import Direction, ScoreMetric
from lorasweep.config.run import RunConfig
from lorasweep.disk import open_inside
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record.json_file import VERSION, Count, Number, is_number, read_json

RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
LAST_ROW_BYTES = 2000
"""Bytes at the end of `steps.jsonl` in which its last row is."""
TEST_SCORES_FILE = "test_scores.csv"
ANSWERS_FILE = "{}_answers.csv"
"""Generated answers with their scores. `{}` is the name of the split, or `base` in a sweep's folder."""
RETAINED_SCORES_FILE = "retained-{}.csv"
"""As `TEST_SCORES_FILE`, for the retained data set whose name replaces `{}`."""

RunStatus = Literal["running", "complete", "stopped", "failed", "infeasible", "interrupted"]
"""`stopped`: the sweep ended the run at an evaluation. `infeasible`: the run does not fit in memory."""


@dataclass(kw_only=True)
class RunRecord:
    """Settings, environment and results of one run: enough to repeat and check it."""

    format: Literal["lorasweep.run"] = "lorasweep.run"
    version: Literal[1] = VERSION
    status: RunStatus
    reason: str | None = None
    """Why the run failed or stopped before its last step."""
    config: dict[str, Any]
    """The resolved `RunConfig`, nested."""
    arm: str | None = None
    trial: Count | None = None
    """Number of the trial in its arm; a run that trains the trial again has the same. Null for a single run."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the settings of a single run come from (`lorasweep train --from`): `sweep` (its folder), `name`, `arm` and
    `trial`. Empty if they were typed. `command` has what was typed."""
    pack: dict[str, Any] | None = None
    """`slot`, the number of `slots` when the run joined the pack, and `shared_draws`: whether a fused kernel drew the
    attention's dropout for all slots at once, so that a run alone would differ. Null for a run alone."""
    metric: str
    """The score's name, such as `bits_per_byte`."""
    direction: Direction
    command: dict[str, Any] = field(default_factory=dict)
    """`arguments` of the command line, and the current `folder`, where relative paths start."""
    code: dict[str, Any] = field(default_factory=dict)
    """`version` of lorasweep. A git checkout also has `commit` and `modified`."""
    packages: dict[str, str] = field(default_factory=dict)
    platform: dict[str, Any] = field(default_factory=dict)
    """`python`, `os`, `processor`, `instructions`, `cores`, `threads`, `device`, `gpu`, `cuda`, `cudnn`, `precision`,
    `matmul_precision`. A run of several processes also has `processes` and `strategy`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that can change results (`training.environment.NUMERIC_VARIABLES`)."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By split (`train`, `validation`, `test`, `retained-NAME`): `fingerprint`, `bytes`, and `documents` and
    `blocks`, or `examples`. Scored splits with labels have `constant_answer`: every metric of the answer that needs no
    training (`DataSplits.score_constant_answer`)."""
    notes: list[str] = field(default_factory=list)
    """Sentences on the data (splits, duplicates), the attention and the adapted layers."""
    batching: dict[str, Any] = field(default_factory=dict)
    """`micro_batches` per optimizer step, those that ran out of memory (`too_large`), `bucket_lengths`,
    and the automatic choice of `attention`."""
    base: dict[str, Any] = field(default_factory=dict)
    """`path`, `fingerprint`, `parameters`, `kind`, `head`, `labels`."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Digests of what the run read, by setting (`RunInputs.fingerprints`). They must be the same when it resumes."""
    started_at: str = ""
    """UTC, ISO 8601."""
    ended_at: str | None = None
    wall_s: Number = 0.0
    """Seconds of training, also before a resume. In a pack: the pack's seconds divided by the number of used slots."""
    steps_planned: Count = 0
    steps_done: Count = 0
    tokens_trained: Count = 0
    tokens_per_s: Number = 0.0
    """Training tokens per second, without the time of evaluations."""
    trainable_params: Count = 0
    total_params: Count = 0
    trainable_fraction: Number = 0.0
    """Number of trained parameters divided by the number of parameters of the base model."""
    adapter_bytes: Count = 0
    """Size of the weights in `best/`: the adapter, the head, or the whole model for `method=full`."""
    peak_memory_bytes: Count = 0
    """Maximum resident memory of the process during the run, or on a GPU the maximum allocated memory. In a pack:
    memory of the whole pack."""
    best: dict[str, Number] = field(default_factory=dict)
    """Validation metrics at the best step, and `step`."""
    last: dict[str, Number] = field(default_factory=dict)
    test: dict[str, Number] = field(default_factory=dict)
    """Every metric of the best weights on the test split; empty unless the confirm stage scored the run."""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Generated answers by split (`test`, `validation`): the number of `examples`, how many answers were `cut_off`, how
    many examples were `left_out`, and the `problem` if they have no score. Their mean is in `test` and `best`."""
    retained: dict[str, dict[str, Number]] = field(default_factory=dict)
    """Every metric on the test split of each data set of `retain.data`, by its name."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`bytes` and `sha256` of each kept file, by its path in the run's folder."""

    @property
    def score_metric(self) -> ScoreMetric:
        return ScoreMetric(name=self.metric, direction=self.direction)

    @property
    def score(self) -> float | None:
        """The best validation value of the run's metric, or None before its first evaluation."""
        return self.best.get(self.metric)

    @property
    def num_train(self) -> int | None:
        """The number of training examples, or of blocks of text; None if that is not known."""
        train = self.data.get("train", {})
        num = train.get("examples", train.get("blocks"))
        return int(num) if is_number(num) and num > 0 else None

    @property
    def epochs(self) -> float | None:
        """How often the run was planned to see each training example; None if that is not known."""
        trainer = self.config.get("trainer")
        batch_size = trainer.get("batch_size") if isinstance(trainer, dict) else None
        return self.steps_planned * batch_size / self.num_train if is_number(batch_size) and self.num_train else None


def read_run(folder: Path) -> RunRecord:
    """Reads a run's record. Raises RecordError if it is missing, damaged or of another version."""
    return read_json(RunRecord, folder / RUN_FILE)


def restore_config(record: RunRecord) -> RunConfig:
    """Returns the settings of a recorded run. Raises `RecordError` if they are not settings of this version."""
    try:
        if any(isinstance(value, str) and "\0" in value for _, value in dotted_items(record.config)):
            raise ConfigError("a text has a NUL character.")
        return build(RunConfig, record.config)
    except (ConfigError, TypeError, AttributeError) as error:
        raise RecordError(
            f"`config` in a run's record must have the settings of this version of lorasweep, but: {error} "
            "Use the version that `code` in the record names."
        ) from error


def read_steps(folder: Path, *, having: str = "") -> Iterator[dict[str, Any]]:
    """Yields the rows of `steps.jsonl`: `{"step", "loss", "lr", "tokens_per_s"}` and `{"step", "validation": {..}}`.

    It stops at the first damaged line, because a killed process may leave an incomplete last line. Lines without the
    text `having` are skipped without parsing, which is much faster. Numbers that were not finite are None.
    """
    path = folder / STEPS_FILE
    if not path.is_file():
        return
    with io.TextIOWrapper(open_inside(folder, path), errors="replace") as file:
        for line in file:
            if having not in line:
                continue
            try:
                row = json.loads(line)
                numbers = [*row.values(), *row.get("validation", {}).values()]
            except (ValueError, AttributeError):  # no JSON, or not of mappings
                return
            known = (value is None or is_number(value) or value is row.get("validation") for value in numbers)
            if type(row.get("step")) is not int or not all(known):
                return
            yield row


def read_last_step(folder: Path) -> int:
    """Returns the step of the last row of `steps.jsonl`, or 0. A run appends rows about 200 times."""
    steps = [0]
    with suppress(OSError, ValueError), open_inside(folder, folder / STEPS_FILE) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_ROW_BYTES))
        steps += [int(found) for found in re.findall(rb'"step": (\d{1,15})\b.*\n', file.read())]
    return steps[-1]


def compute_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utc_now() -> str:
    """Returns the present time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

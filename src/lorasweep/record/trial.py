"""The class `Trial`: a run of a sweep, as controller, status, report and Python API all use it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lorasweep.config.run import follows_rate_law
from lorasweep.record.json_file import FOLDER_NAME, Count, FolderName, Number, is_number
from lorasweep.record.run import RunRecord
from lorasweep.wording import format_setting, short_key

if TYPE_CHECKING:
    import pandas

Stage = Literal["search", "confirm"]
TrialState = Literal["running", "complete", "stopped", "failed", "infeasible"]
STATES: tuple[TrialState, ...] = ("complete", "stopped", "failed", "infeasible", "running")
"""The states of a trial, in the order of the report."""
COST_FIELDS = (
    *("steps_planned", "steps_done", "tokens_trained", "tokens_per_s", "wall_s"),
    *("trainable_params", "trainable_fraction", "adapter_bytes", "peak_memory_bytes"),
)
"""Costs of a run: fields of its record that are columns of the table of runs."""
RunPath = Annotated[str, Field(pattern=f"^runs/{FOLDER_NAME}$")]
Curve = tuple[tuple[int, float], ...]
"""Validation scores of one run: pairs of step and value, by step."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the confirm stage compares: an arm, or one value of its `confirm_each` key."""

    arm: FolderName
    key: str | None = None
    """The arm's `confirm_each` key."""
    value: Any = None

    @property
    def name(self) -> str:
        """The arm's name; with a value such as `lora-rank-16`."""
        if self.key is None:
            return self.arm
        # a record of somebody else may have any text as key, and the name becomes part of a path
        return f"{self.arm}-" + re.sub(r"[^\w.-]+", "_", f"{short_key(self.key)}-{format_setting(self.value)}")

    @property
    def label(self) -> str:
        """The name in a sentence or a figure about one arm, such as `rank 16`."""
        return self.name if self.key is None else f"{short_key(self.key)} {format_setting(self.value)}"

    @property
    def params(self) -> dict[str, Any]:
        """The `confirm_each` key with its value; empty for an arm."""
        return {} if self.key is None else {self.key: self.value}


@dataclass(kw_only=True)
class Trial:
    """A run of a sweep: a trial of the search, or a run of the confirm stage, which trains a setting on a fresh seed.

    The controller changes its trials, and keeps them in Optuna's studies. `sweep.json` has a copy for everyone else.
    """

    stage: Stage = "search"
    arm: FolderName
    subject: FolderName = ""
    """The name of the run's `Subject`."""
    number: Count
    """Number of the trial in its arm and stage."""
    state: TrialState = "running"
    params: dict[str, Any]
    """Swept keys (dotted) and their values; in the confirm stage without swept seeds."""
    setting_number: Count | None = None
    """Number of the confirmed setting in its arm (`SettingRow.setting`); None in the search."""
    seed: Count | None = None
    """Seed of initial values, data order and dropout of a confirm run. All subjects have the same seeds."""
    search_score: float | None = None
    """The best value on validation data of the metric by which the search chooses."""
    test_scores: dict[str, Number] = field(default_factory=dict, repr=False)
    """Every metric of a confirm run on test data; empty in the search, which reads no test data."""
    run: RunPath
    """The run's folder, relative to the sweep's (`name_run`)."""
    reason: str | None = None
    """Why the trial failed, was stopped or does not fit in memory."""
    values: dict[Count, Number] = field(default_factory=dict, repr=False)
    """The search's metric on validation data at each evaluation, by step."""
    order: Count = field(default=0, repr=False)
    """Position in the order in which a stage hands out new trials, from 0.

    If the trial's worker is gone and the trial is handed out again, the position stays the same."""
    pack: Annotated[str, Field(pattern=f"^({FOLDER_NAME})?$")] = ""
    """The pack in which the trial trains, named by the folder of its first run. A trial alone is a pack too."""
    sampler_state: dict[str, Any] = field(default_factory=dict, repr=False)
    """Values that a sampler set by `_target_` stores with a trial, such as the generation of a genetic algorithm."""
    record: RunRecord | None = field(default=None, init=False, repr=False, compare=False)
    """The run's record, once the report has read it; not part of `sweep.json`."""

    def __post_init__(self) -> None:
        self.subject = self.subject or self.arm

    @property
    def step(self) -> int:
        """Optimizer steps at the last evaluation."""
        return max(self.values, default=0)

    @property
    def last_value(self) -> float | None:
        """The search's metric on validation data at the last evaluation."""
        return self.values.get(self.step)

    @property
    def curve(self) -> Curve:
        """The finite validation scores by step."""
        return tuple(sorted((step, value) for step, value in self.values.items() if math.isfinite(value)))

    @property
    def shown_params(self) -> dict[str, Any]:
        """The settings that distinguish the run from others of its arm, as a person reads them."""
        return self.params if self.seed is None else {**self.params, "seed": self.seed}

    @property
    def name(self) -> str:
        return f"{self.arm} {self.number}" if self.seed is None else f"{self.subject}, seed {self.seed}"

    @property
    def is_complete(self) -> bool:
        """Whether the run finished and has the score of its stage, so that it may be its arm's best."""
        scores = [self.search_score] if self.stage == "search" else self.test_scores.values()
        return self.state == "complete" and any(map(is_number, scores))

    @property
    def follows_rate_law(self) -> bool:
        """Whether learning rate and α are one coordinate, by the rate law; False without a record."""
        optimizer = self.setting("optim.name") or self.setting("optim._target_")
        return follows_rate_law(str(self.setting("method.name")), str(optimizer))

    def setting(self, key: str) -> Any:
        """Returns the value of a dotted key: the swept value, else the one in the run's configuration, else None."""
        if key in self.params:
            return self.params[key]
        value: Any = self.record.config if self.record else {}
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def numeric_setting(self, key: str) -> float | None:
        """Returns the value of a dotted key if it is a finite number, else None."""
        value = self.setting(key)
        return value if is_number(value) else None


def name_run(stage: Stage, arm: str, number: int) -> str:
    """Returns the folder of a run, relative to the sweep's. No arm's name ends in `-confirm`."""
    return f"runs/{arm}{'' if stage == 'search' else '-confirm'}-{number:04d}"


def build_frame(runs: Iterable[Trial], *, metric: str, keys: Sequence[str] = ()) -> pandas.DataFrame:
    """Returns a table with a row per run of one stage and its settings as columns with dotted keys.

    A trial of the search has its number as `trial` and the best score on validation data as `METRIC`. A confirm run has
    its `seed`, and its scores on test data as `test/NAME`. Runs with a record also have its costs (`COST_FIELDS`),
    `best_step`, and the values of `keys`, swept or not.
    """
    import pandas  # noqa: PLC0415 (slow to import)

    rows = []
    for run in runs:
        is_search, tested = run.stage == "search", {metric: None, **run.test_scores}
        row = {
            "arm": run.arm,
            "subject": run.subject,
            **({"trial": run.number} if is_search else {"seed": run.seed}),
            "state": run.state,
            **({metric: run.search_score} if is_search else {f"test/{name}": tested[name] for name in tested}),
            **run.params,
            **{key: run.setting(key) for key in keys},
        }
        if (record := run.record) is not None:
            row |= {name: getattr(record, name) for name in COST_FIELDS}
            row["best_step"] = int(record.best["step"]) if is_number(record.best.get("step")) else None
        rows.append(row | {"step": run.step, "run": run.run, "reason": run.reason})
    frame = pandas.DataFrame.from_records(rows)
    # a nullable type, because a missing value would turn whole numbers into floats
    whole = [name for name in frame if {type(row.get(name)) for row in rows} == {int, type(None)}]
    return frame.astype(dict.fromkeys(whole, "Int64"))

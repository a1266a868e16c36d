"""Results of the Python API: a sweep or a run, read from its folder.

Results hold no models and no open files, so they can be kept for any time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.config.data import Direction
from lorasweep.config.run import refuse_code
from lorasweep.disk import is_running
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import (
    SWEEP_FILE,
    RunRecord,
    SweepRecord,
    Trial,
    build_frame,
    find_winner,
    get_run_folder,
    read_run,
    read_steps,
    read_sweep,
    restore_config,
)
from lorasweep.wording import suggest_nearest

if TYPE_CHECKING:
    import optuna
    import pandas
    from plotly.graph_objects import Figure
    from torch import nn

    from lorasweep.report.facts import Findings
    from lorasweep.report.sweep_data import Setting


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run: its record and the weights that it kept in its folder."""

    folder: Path
    record: RunRecord = field(repr=False)

    def __str__(self) -> str:
        record, best = self.record, f"at step {self.record.best.get('step', 0):.0f}"
        score = "no score" if self.score is None else f"{self.metric} {self.score:.4f} {best}"
        return (
            f"{self.status}: {score}, {record.steps_done:,} of {record.steps_planned:,} steps, "
            f"{record.trainable_params:,} trained parameters, {record.wall_s:.0f} s: {self.folder}"
        )

    @property
    def status(self) -> str:
        """`complete`, `interrupted`, `failed`, ..."""
        return self.record.status

    @property
    def score(self) -> float | None:
        """The best validation value of `metric`, or None before the first evaluation."""
        return self.record.score

    @property
    def metric(self) -> str:
        """Name of the score, such as `bits_per_byte`."""
        return self.record.metric

    @property
    def config(self) -> dict[str, Any]:
        """The resolved settings, nested."""
        return self.record.config

    def steps_dataframe(self) -> pandas.DataFrame:
        """Returns one row per step: `loss`, `lr`, `tokens_per_s`, and `validation/METRIC` at evaluations."""
        import pandas  # noqa: PLC0415 (slow to import)

        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for entry in read_steps(self.folder):
            row = rows[entry["step"]]
            if "validation" in entry:
                row |= {f"validation/{name}": value for name, value in entry["validation"].items()}
            else:
                row |= {key: value for key, value in entry.items() if key != "step"}
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("step").sort_index()

    def load_model(self, *, trust: bool = False) -> nn.Module:
        """Returns the base model with the weights of the best evaluation, in evaluation mode on the CPU.

        Args:
            trust: Whether to run code that the run's settings name.

        Raises:
            ConfigError: The settings name code, and `trust` is False.
            RecordError: The weights are missing or changed, or the base model is not the run's.
        """
        from lorasweep.training.finished_run import check_kept_files, restore_base, restore_model  # noqa: PLC0415 (needs torch)

        config = restore_config(self.record)
        if not trust:
            refuse_code(config)
        check_kept_files(self.record, self.folder)
        return restore_model(config, restore_base(self.record, config), folder=self.folder / "best")


@dataclass(frozen=True, repr=False)
class SweepResult:
    """One sweep, with its record as it was when this result was read."""

    folder: Path
    record: SweepRecord

    def __repr__(self) -> str:
        from lorasweep.report.terminal import list_lines  # noqa: PLC0415 (rich is slow to import)

        answers = [f"{question} {headline}" for question, headline, _ in list_lines(self.findings)]
        return "\n".join([f"{self.folder} ({self.status}, {self.metric})", *answers[:3]])

    @property
    def status(self) -> str:
        """`complete`, `interrupted` or `running`."""
        return self.record.find_state(is_running=is_running(self.folder))

    @property
    def metric(self) -> str:
        """Name of the score, such as `bits_per_byte`."""
        return self.record.search_metric.name

    @property
    def direction(self) -> Direction:
        """Whether a lower score is better (`minimize`) or a higher one."""
        return self.record.search_metric.direction

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the order of the sweep file."""
        return [arm.name for arm in self.record.arms]

    @property
    def report(self) -> Path:
        """The HTML page of the report. It exists when the sweep is complete."""
        return self.folder / "report" / "index.html"

    @property
    def unconfirmed(self) -> dict[str, str]:
        """Why an arm has no confirm score, by arm. Empty before the sweep is complete, or without that stage."""
        if self.status != "complete" or not self.record.confirm_seeds:
            return {}
        scored = {row.arm for row in self.record.confirm if row.state == "complete"}
        reasons = {row.arm: row.reason for row in reversed(self.record.confirm)}  # the reason of the first run
        return {arm: reasons.get(arm) or "no trial of its search is complete" for arm in self.arms if arm not in scored}

    @cached_property
    def findings(self) -> Findings:
        """What the sweep found: answers, evidence and warnings, read from the runs' records at the first use."""
        from lorasweep.report.facts import read_findings  # noqa: PLC0415 (slow to import)

        return read_findings(self.folder, self.record)

    def as_json(self) -> dict[str, Any]:
        """Returns what `lorasweep sweep --json` prints: `report/summary.json`, and where the files are."""
        from lorasweep.report.write import build_summary  # noqa: PLC0415 (slow to import)

        return {"folder": self.folder, "report": self.report, **build_summary(self.findings)}

    @property
    def trials(self) -> list[Trial]:
        """Every trial of the search, by arm and number."""
        return self.record.trials

    def best(self, arm: str | None = None) -> Trial:
        """Returns the complete trial with the best validation score of an arm or of all, the earlier of equal ones.

        Raises:
            ConfigError: The sweep has no such arm.
            RecordError: No trial is complete.
        """
        if arm is not None:
            self._check_arm(arm)
        winner = find_winner((trial for trial in self.trials if arm in (None, trial.arm)), record=self.record)
        if winner is None:
            whose = "the sweep" if arm is None else f"arm `{arm}`"
            raise RecordError(f"{whose} must have a complete trial, but has none yet.")
        return winner

    @property
    def best_params(self) -> dict[str, Any]:
        """The swept settings of the best trial of all arms."""
        return self.best().params

    def recommended(self, subject: str | None = None) -> Setting:
        """Returns the recommended setting. Its `params` are the settings of `lorasweep train --from`.

        Its `run` is the one that is exported, and `load_run` opens it.

        Args:
            subject: An arm, or one value of its `confirm_each` key (`lora-rank-8`). None is the whole sweep.

        Raises:
            ConfigError: The sweep has no such subject.
            RecordError: The sweep is not complete, or has no such setting.
        """
        from lorasweep.report.recommend import find_recommended  # noqa: PLC0415 (slow to import)

        return find_recommended(self.findings.data, subject, key="subject")[-1]

    def load_run(self, run: Trial | Setting | str | Path) -> RunResult:
        """Returns the run of a trial or in a folder. Of a setting, it is the run that is exported."""
        if isinstance(run, str | Path):
            return load_run(run)
        trial = run if isinstance(run, Trial) else run.run
        if trial is None:
            raise RecordError("a setting must have a complete run, but this one was only predicted. Resume the sweep.")
        return load_run(get_run_folder(self.folder, trial.run))

    def load_model(self, subject: str | None = None, *, merged: bool = False, trust: bool = False) -> nn.Module:
        """Returns the model of the recommended run, in evaluation mode on the CPU.

        Args:
            subject: As in `recommended`.
            merged: Whether to add the adapter to the weights of the base, so that its layers are plain ones.
            trust: As in `RunResult.load_model`, whose errors and those of `recommended` it raises.
        """
        from lorasweep.report.recommend import find_recommended_run  # noqa: PLC0415 (slow to import)

        folder, _ = find_recommended_run(self.folder if subject is None else self.folder / subject)
        model = load_run(folder).load_model(trust=trust)
        if merged:
            from lorasweep.lora import merge_lora  # noqa: PLC0415 (needs torch)

            merge_lora(model)
        return model

    def split(self, name: str = "test") -> pandas.DataFrame:
        """Returns the examples of `train`, `validation` or `test` as the sweep split them: a row for each.

        Raises:
            ConfigError: There is no such split, or the data is the user's own module.
            RecordError: The data has changed since the sweep began.
        """
        from lorasweep.sweep.split_frame import build_split_frame  # noqa: PLC0415 (slow to import)

        return build_split_frame(self.folder, name)

    def trials_dataframe(self) -> pandas.DataFrame:
        """Returns a row per trial of the search: `arm`, `trial`, `state`, the metric, swept keys, `step` and `run`."""
        return build_frame(self.trials, metric=self.metric)

    def confirm_dataframe(self) -> pandas.DataFrame:
        """Returns a row per confirm run: `arm`, `subject`, `seed`, `state`, the test score, swept keys, and `run`.

        A subject is an arm, or one value of its `confirm_each` key. `record.confirm` also has the runs of former
        settings, if the sweep grew.
        """
        return build_frame(self.record.confirm_runs, metric=self.record.verdict_metric.name)

    def study(self, arm: str) -> optuna.Study:
        """Returns the Optuna study of an arm's search, for Optuna's own plots. Don't add trials to it.

        Raises:
            ConfigError: The sweep has no such arm.
            RecordError: The sweep's storage can't be read.
        """
        from lorasweep.sweep.controller.lifecycle import load_study  # noqa: PLC0415 (needs Optuna and torch)

        self._check_arm(arm)
        return load_study(self.folder, arm)

    def figures(self) -> dict[str, Figure]:
        """Returns the first plotly figure of each panel of the report, by title. Panels without data are skipped."""
        from lorasweep.report.figures import draw_panels  # noqa: PLC0415 (plotly is slow to import)

        panels = draw_panels(self.findings.data)
        return {panel.title: figure for panel in panels for figure in panel.figures[:1]}

    def table(self) -> str:
        """Returns the answers and the table of the report as text."""
        from lorasweep.console import EscapingConsole  # noqa: PLC0415 (rich is slow to import)
        from lorasweep.report.terminal import render_terminal  # noqa: PLC0415

        console = EscapingConsole(file=StringIO(), width=100)
        with console.capture() as shown:
            console.print(render_terminal(self.findings), crop=False)
        return shown.get()

    def _check_arm(self, arm: str) -> None:
        if arm not in self.arms:
            near = suggest_nearest(arm, self.arms)
            raise ConfigError(f"`arm` must be one of {', '.join(self.arms)}, but got {arm!r}.{near}")


def find_newest_sweep() -> Path:
    """Returns the folder in `outputs` whose sweep was written last. Raises RecordError if there is none."""
    records = [*Path("outputs").glob(f"*/{SWEEP_FILE}")]
    if not records:
        raise RecordError("`DIR` must name the folder of a sweep, because the folder `outputs` has none.")
    return max(records, key=lambda path: path.stat().st_mtime).parent


def load_sweep(folder: str | Path) -> SweepResult:
    """Reads a sweep, finished or still running, and changes nothing.

    >>> result = lorasweep.load_sweep("outputs/tiny")
    >>> sorted(result.best("lora").params), result.load_run(result.best("lora")).status
    (['method.rank', 'optim.lr'], 'complete')

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    return SweepResult(Path(folder), read_sweep(Path(folder)))


def load_run(folder: str | Path) -> RunResult:
    """Reads a run, finished or still training, and changes nothing.

    >>> lorasweep.load_run("outputs/tiny/runs/lora-0000").config["method"]["name"]
    'lora'

    Raises:
        RecordError: The folder is not a run, or its record is damaged.
    """
    if not isinstance(folder, str | Path):
        raise ConfigError(
            f"`folder` must be the folder of a run, but got a {type(folder).__name__}. Call `result.load_run(...)`."
        )
    return RunResult(folder=Path(folder), record=read_run(Path(folder)))

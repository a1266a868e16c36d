"""A sweep in this process, from the request to its end: new and resumed sweeps, drafts and plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lorasweep.console import EscapingConsole, add_clock
from lorasweep.data.reading.hub import find_hub_settings
from lorasweep.disk import claim_folder, numbered_folders, write_atomically
from lorasweep.errors import ConfigError
from lorasweep.recipes.read import Recipe
from lorasweep.record import write_record
from lorasweep.sweep.assess import Assessment, assess
from lorasweep.sweep.checks import check_definition, list_retained, list_test_metrics, score_constant_answer
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.lifecycle import create_sweep, grow_definition, read_saved_definition, reopen_sweep
from lorasweep.sweep.cost import FittedSweep, Rates, count_workers, fit_minutes
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.draft import complete_definition, draft_sweep
from lorasweep.sweep.fingerprints import compute_fingerprints
from lorasweep.sweep.measure import MeasuredTooLong, limit_rates, measure_sweep, plan_looks
from lorasweep.sweep.plan import SweepPlan
from lorasweep.sweep.status import SweepStatus, report_status, show_progress
from lorasweep.sweep.workers.local_workers import limit_threads, number_workers
from lorasweep.sweep.workers.train import train_sweep
from lorasweep.training.inputs import InputsCache
from lorasweep.training.stop_signal import StopSignal
from lorasweep.wording import format_seconds

MIN_MEASURING_S = 60.0
"""Seconds that a measurement may take even for fewer `minutes`, so that an error can say how many are needed."""
END_S = 3.0
"""Seconds of `minutes` that are kept for the report at the end of a sweep."""
OnNote: TypeAlias = Callable[[str], None]
"""Called with a sentence on what is done now, or on what was found."""
Progress: TypeAlias = Callable[[SweepStatus], None] | Literal["auto", "verbose"] | None
"""Called with the state of a sweep about once a second, from a thread. `auto` shows a live table in a terminal, and
plain lines in a notebook or a pipe; `verbose` also prints the sweep's notes first."""


@dataclass(frozen=True, kw_only=True)
class NewSweep:
    """A sweep file that was written for a model and data."""

    path: Path
    definition: Definition
    notes: tuple[str, ...]
    """Sentences on the other tool's keys and on the columns of the data."""
    assessment: Assessment


class Session:
    """A sweep that this process defines, measures and trains, with the models and data that it has loaded."""

    def __init__(self, *, began_s: float, on_note: OnNote) -> None:
        """`began_s` is the monotonic time at which the command began, from which `minutes` count."""
        self.inputs_cache = InputsCache()
        self._began_s, self._on_note = began_s, on_note

    def plan(
        self, definition: Definition, *, minutes: float | None, typed: Mapping[str, Any], anew: bool = False
    ) -> SweepPlan:
        """Checks a sweep, measures a few steps of its trainings, and cuts it to `minutes`; `typed` keys stay.

        Rates that were measured within a day are used again, but not if it measures `anew`.

        Raises ConfigError if the sweep can't run as asked or in this time, and RunError if a training fails.
        """
        definition, rates = self._measure(definition, minutes=minutes, anew=anew)
        given_up = ""
        if minutes is not None:
            fitted, rates = self._fit(definition, rates, minutes, typed=typed)
            definition, given_up = fitted.definition, f"To end {fitted.given_up}"
        assessment = assess(definition, self.inputs_cache)
        return SweepPlan(definition=definition, rates=tuple(rates), assessment=assessment, given_up=given_up)

    def write_draft(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        recipe: Recipe | None,
        from_hub: str | None,
        minutes: float | None,
    ) -> NewSweep:
        """Writes a commented sweep file for the model and data of the settings. Errors as in `plan`."""
        if from_hub is not None:
            given = {name: settings.get(f"data.{name}") for name in ("subset", "revision")}
            settings = {**find_hub_settings(from_hub, **given), **settings}
        draft = draft_sweep(path, settings, self.inputs_cache, recipe=recipe)
        if minutes is not None:
            self._on_note("measures a few steps of the drafted sweep")
            definition, rates = self._measure(draft.definition, minutes=minutes)
            fitted, _ = self._fit(definition, rates, minutes, typed=settings)
            settings = {**settings, **fitted.overrides}
            draft = draft_sweep(path, settings, self.inputs_cache, recipe=recipe, given_up=fitted.given_up)
        write_atomically(path, draft.text)
        return NewSweep(
            path=path,
            definition=draft.definition,
            notes=(*(recipe.describe() if recipe else ()), *draft.notes),
            assessment=assess(draft.definition, self.inputs_cache),
        )

    def open_new(self, definition: Definition, *, output: str | Path | None, given_up: str = "") -> SweepFolder:
        """Checks a sweep and creates its folder. Its record notes what was `given_up`.

        The folder is `output`, else the setting `sweep.output`, else `outputs/NAME` with the next free number.
        Raises ConfigError if the sweep can't run as asked; then nothing was written.
        """
        cache, wanted = self.inputs_cache, definition.sweep_config.sweep.output if output is None else str(output)
        definition = number_workers(complete_definition(definition, cache), cache)
        metric = check_definition(definition, cache, new_folder=wanted)
        assessment, constant_answer = assess(definition, cache), score_constant_answer(definition, cache)
        retained, fingerprints = list_retained(definition, cache), compute_fingerprints(definition, cache)
        folders = numbered_folders(Path("outputs") / definition.name)
        with claim_folder(None if wanted is None else Path(wanted), otherwise=folders, key="sweep.output") as path:
            return create_sweep(
                definition,
                path,
                metric=metric,
                test_metrics=list_test_metrics(definition, metric),
                retained=retained,
                constant_answer=constant_answer,
                fingerprints=fingerprints,
                notes=[*filter(None, [given_up]), *assessment.others],
                warnings=assessment.warnings,
            )

    def reopen(self, folder: Path, *, changes: Mapping[str, Any]) -> SweepFolder:
        """Opens a sweep that has begun, and checks it again. Errors as in `reopen_sweep`."""
        before = read_saved_definition(folder)
        grown = grow_definition(before, changes=changes)
        numbered = number_workers(grown, self.inputs_cache)
        if numbered is not grown:  # `worker.num=auto` was typed
            changes = {**changes, "worker.num": count_workers(numbered)}
        opened = reopen_sweep(folder, changes=changes)
        cache, definition, record = self.inputs_cache, opened.definition, opened.record
        try:
            metric, recorded = check_definition(definition, cache).name, record.search_metric.name
            if metric != recorded:
                raise ConfigError(f"`data.metric` must stay {recorded!r} for all arms, but got {metric!r}.")
            record.fingerprints = compute_fingerprints(definition, cache, recorded=record.fingerprints)
            assessment = assess(definition, cache)
            outdated = {*assess(before, cache).warnings, *assessment.warnings}
            others = [warning for warning in record.warnings if warning not in outdated]
            record.warnings = [*assessment.warnings, *others]
            if record.changes:
                opened.note(assessment.others)
            write_record(record, folder)  # now, because a controller in another process reads the changes from it
        except BaseException:
            opened.close()
            raise
        return opened

    def train(self, opened: SweepFolder, *, progress: Progress) -> bool:
        """Trains the remaining trials of an open sweep and closes it. Returns whether the sweep is complete."""
        folder, record = opened.path, opened.record
        with limit_threads(opened.definition):
            record.planned_s = plan_looks(opened.definition, self.inputs_cache)
        write_record(record, folder)  # a controller in another process reads it
        shown: AbstractContextManager[Any] = nullcontext()
        if isinstance(progress, str):
            shown = show_progress(folder, EscapingConsole(), verbose=progress == "verbose")
        elif progress is not None:
            shown = report_status(folder, progress)
        remedy = f"To resume type `lorasweep sweep --resume {folder}`"
        try:
            with StopSignal(remedy) as stop, shown:
                return train_sweep(opened, self.inputs_cache, stop_requested=stop)
        except KeyboardInterrupt:  # also after the stop signal's context has ended
            raise KeyboardInterrupt(remedy) from None

    def _measure(
        self, definition: Definition, *, minutes: float | None, anew: bool = False
    ) -> tuple[Definition, list[Rates]]:
        """Returns a checked sweep with its number of steps, and what its trainings take.

        Raises ConfigError if the measurement takes all `minutes`.
        """
        definition = number_workers(complete_definition(definition, self.inputs_cache), self.inputs_cache)
        check_definition(definition, self.inputs_cache, new_folder=definition.sweep_config.sweep.output)

        def measure_time() -> float:
            return time.monotonic() - self._began_s

        try:
            with limit_threads(definition):
                return definition, measure_sweep(
                    definition,
                    self.inputs_cache,
                    on_progress=lambda phrase: self._on_note(add_clock(phrase)),
                    is_late=lambda: minutes is not None and measure_time() > max(60 * minutes, MIN_MEASURING_S),
                    anew=anew,
                )
        except MeasuredTooLong:
            raise ConfigError(
                f"`--minutes` must leave time to train, but got {minutes:g}, and measuring a few steps alone took "
                f"{format_seconds(measure_time())}. Use a GPU, a smaller model or shorter examples (`data.max_length`)."
            ) from None

    def _fit(
        self, definition: Definition, rates: list[Rates], minutes: float, *, typed: Mapping[str, Any]
    ) -> tuple[FittedSweep, list[Rates]]:
        """Returns the sweep that fits the minutes, and its rates."""
        spent_s = time.monotonic() - self._began_s + END_S
        fitted = fit_minutes(definition, rates, minutes, typed=typed, spent_s=spent_s)
        self._on_note(fitted.given_up)
        with limit_threads(fitted.definition):
            return fitted, limit_rates(fitted.definition, rates, self.inputs_cache)

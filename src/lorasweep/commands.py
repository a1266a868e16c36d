"""The commands of the command line. Each calls the Python API, prints, and returns its result."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasweep.console import EscapingConsole, say, say_error, show
from lorasweep.errors import ConfigError, LoraSweepError
from lorasweep.outcome import DONE, FAILED, Outcome, end_with_error, get_rank
from lorasweep.training.stop_signal import INTERRUPTED_EXIT_CODE
from lorasweep.training.torch_variables import quick_imports

if TYPE_CHECKING:
    from lorasweep.api import Overrides
    from lorasweep.results import RunResult, SweepResult
    from lorasweep.sweep.definition.arms import Definition
    from lorasweep.sweep.plan import GroupPlan
    from lorasweep.training.inputs import InputsCache

MAX_SILENT_TRIALS, MAX_SILENT_BYTES = 1000, 10_000_000
"""A report of more trials, or a larger file of scores, takes seconds, so a line says what happens."""

Command = Callable[[argparse.Namespace], Outcome]


def sweep(arguments: argparse.Namespace) -> Outcome:
    name, overrides = _split_name(arguments.overrides)
    progress: Literal["auto", "verbose"] = "verbose" if arguments.verbose else "auto"
    if arguments.resume and (arguments.minutes or name):
        given = "`--minutes`" if arguments.minutes else repr(name)
        raise ConfigError(f"{given} must be left out with `--resume`, because the sweep already has these.")
    named = _read_named(name, overrides)
    if named is not None and not arguments.cfg and arguments.minutes is None and sys.stderr.isatty():
        say(f"{named.name}: loads torch, the model and the data", file=sys.stderr)
    with quick_imports():
        from lorasweep import api
        from lorasweep.sweep.controller.lifecycle import read_saved_definition
        from lorasweep.sweep.definition.arms import describe_definition

    if arguments.resume and not arguments.cfg:
        result = api.resume_sweep(arguments.resume, overrides=overrides, progress=progress)
    else:
        if arguments.resume:
            definition = read_saved_definition(arguments.resume)
        elif arguments.minutes is not None:
            definition = _measure_definition(named, overrides, minutes=arguments.minutes)[0]
        else:
            definition = named or api.read_sweep_definition(None, overrides)
        if arguments.cfg:
            say(describe_definition(definition).removesuffix("\n"))
            return Outcome(None)
        result = api.run_sweep(definition, progress=progress)
    if result.status != "complete":
        return _say_how_to_resume(result)
    return _show_sweep(result, verbose=arguments.verbose)


def status(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.sweep.status import read_status, render_status, watch_status

    if arguments.watch:
        return Outcome(watch_status(arguments.folder, EscapingConsole()))
    found = read_status(arguments.folder)
    show(render_status(found))
    return Outcome(found)


def new(arguments: argparse.Namespace) -> Outcome:
    """Reads the model and the data, and writes a sweep file for them."""
    path = arguments.file
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"`FILE.yaml` must have the suffix .yaml, but got {str(path)!r}.")
    if path.exists():
        raise ConfigError(f"`FILE.yaml` must be a new file, but {str(path)!r} exists already. Name another one.")
    say("reads the model and the data; first loads torch, which takes seconds", file=sys.stderr)
    with quick_imports():
        from lorasweep.config.command_line import parse_overrides
        from lorasweep.data.reading.hub import find_hub_settings
        from lorasweep.disk import write_atomically
        from lorasweep.sweep.draft import draft_sweep

    settings = parse_overrides(arguments.overrides)
    if arguments.source is not None:
        given = {name: settings.get(f"data.{name}") for name in ("subset", "revision")}
        settings = find_hub_settings(arguments.source, **given) | settings
    text, power = draft_sweep(path, settings)
    if arguments.minutes is not None:
        definition, *_ = _measure_definition(None, settings, minutes=arguments.minutes)
        fitted = [
            key for key in ("trainer.max_steps", "sweep.trials", "confirm.looks") if key in definition.raw["overrides"]
        ]
        text, power = draft_sweep(path, settings | {key: definition.raw["overrides"][key] for key in fitted})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    say(f"wrote {path}. Read it, then type:\n    lorasweep plan {path}\n    lorasweep sweep {path}")
    for sentence in power:
        say(f"• {sentence}")
    return Outcome({"file": path, "notes": power})


def plan(arguments: argparse.Namespace) -> Outcome:
    """Checks a sweep, measures a few steps of its trainings, and shows the cost of the sweep. Keeps no file."""
    began = time.monotonic()
    name, overrides = _split_name(arguments.overrides)
    named = _read_named(name, overrides)
    definition, groups, inputs_cache = _measure_definition(named, overrides, minutes=arguments.minutes)
    with quick_imports():
        from lorasweep.sweep.checks import describe_coverages
        from lorasweep.sweep.plan import render_plan
        from lorasweep.sweep.power import describe_power
        from lorasweep.wording import format_seconds

    show(render_plan(definition, groups))
    splits = inputs_cache.load(definition.arms[0].base).splits
    notes = [*describe_coverages(definition, inputs_cache), *describe_power(definition, splits)]
    for sentence in notes:
        say(f"• {sentence}")
    say(f"this plan took {format_seconds(time.monotonic() - began)}", file=sys.stderr)
    return Outcome({"name": definition.name, "groups": list(map(_describe_group, groups)), "notes": notes})


def _describe_group(group: GroupPlan) -> dict[str, Any]:
    low, high = group.estimate_search()
    numbers = {key: value for key, value in vars(group).items() if key not in ("arms", "record")}
    return {"arms": [arm.name for arm in group.arms], **numbers, "run_s": group.run_s, "search_s": [low, high]}


def _read_named(name: str | None, overrides: Overrides) -> Definition | None:
    """Returns the sweep of a file, without torch, whose import takes seconds, so that what is wrong is said at once."""
    from lorasweep.sweep.definition.arms import read_definition
    from lorasweep.sweep.definition.overrides import SweepOverrides
    from lorasweep.sweep.definition.sweep_file import find_sweep_file

    return None if name is None else read_definition(find_sweep_file(name), SweepOverrides.parse(overrides))


def _measure_definition(
    definition: Definition | None, overrides: Overrides, *, minutes: float | None
) -> tuple[Definition, list[GroupPlan], InputsCache]:
    """Returns a checked sweep, fitted to `minutes` if given, the plans of its groups of arms, and what they loaded.

    Without a `definition`, the sweep is drafted for the data of the overrides.
    """
    began, arms = time.monotonic(), "the drafted sweep"
    if definition is not None:
        arms = f"{definition.name} ({', '.join(arm.name for arm in definition.arms)})"
    say(f"measures a few steps of {arms}; first loads torch, the model and the data", file=sys.stderr)
    with quick_imports():
        from lorasweep import api
        from lorasweep.sweep.checks import set_steps
        from lorasweep.sweep.plan import fit_minutes, plan_sweep
        from lorasweep.training.inputs import InputsCache

    def note(what: str) -> None:
        say(f"{time.monotonic() - began:3.0f} s: {what}", file=sys.stderr)

    inputs_cache = InputsCache()
    definition = set_steps(definition or api.read_sweep_definition(None, overrides), inputs_cache)
    api.check_sweep(definition, inputs_cache)
    if minutes is None:
        return definition, plan_sweep(definition, inputs_cache, on_progress=note), inputs_cache
    definition, groups, given_up = fit_minutes(definition, minutes, inputs_cache, on_progress=note)
    if given_up:
        say(given_up, file=sys.stderr)
    return definition, groups, inputs_cache


def compare(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.report.write import write_report
    from lorasweep.results import load_sweep

    result = load_sweep(arguments.folder)
    if (count := len(result.record.trials)) > MAX_SILENT_TRIALS:
        say(f"writes the report of {count:,} trials", file=sys.stderr)
    write_report(result.findings)
    _show_report(result, verbose=arguments.verbose)
    return Outcome(result)


def judge(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.report.judge import judge, read_scores

    columns = dict(given.split("=", 1) for given in arguments.columns if "=" in given)
    if len(columns) < len(arguments.columns):
        raise ConfigError("`--columns` must be pairs such as `arm=Name`: our name, then the file's.")
    if arguments.scores.is_file() and (size := arguments.scores.stat().st_size) > MAX_SILENT_BYTES:
        say(f"reads {size / 1e6:.0f} MB of scores", file=sys.stderr)
    scores = read_scores(arguments.scores, columns=columns)
    names = ("margin", "maximize", "metric", "reference", "base", "key", "looks")
    found = judge(scores, **{name: getattr(arguments, name) for name in names})
    show(found.render())
    return Outcome(found)


def export(arguments: argparse.Namespace) -> Outcome:
    run = _choose_run(arguments.run, verb="exporting")
    with quick_imports():
        from lorasweep.runs.export import export_run
        from lorasweep.wording import format_bytes

    written = export_run(run, format=arguments.format, out=arguments.out, trust=arguments.trust)
    say(f"{arguments.format}, {written.dtype}, {format_bytes(written.num_bytes)}: {arguments.out}")
    for sentence in written.serving:
        say(f"• {sentence}")
    return Outcome(written)


def inspect(arguments: argparse.Namespace) -> Outcome:
    """Analyses the weights of a run, writes the tables into its folder `inspect/` and shows them."""
    run = _choose_run(arguments.run, verb="inspecting")
    with quick_imports():
        from lorasweep.runs.inspect import inspect_run, render_inspection

    inspection = inspect_run(run, trust=arguments.trust)
    show(render_inspection(inspection))
    return Outcome(inspection)


def _choose_run(folder: Path, *, verb: str) -> Path:
    """Returns the folder if it is a run, or the recommended run of SWEEP or SWEEP/ARM.

    Reads the record without torch, whose import takes seconds, so that a wrong folder is refused at once.
    """
    from lorasweep.record import RUN_FILE, SWEEP_FILE, read_run
    from lorasweep.report.recommend import find_recommended_run

    if (folder / RUN_FILE).is_file() or not any((one / SWEEP_FILE).is_file() for one in (folder, folder.parent)):
        read_run(folder)
        return folder
    run, described = find_recommended_run(folder)
    say(f"{verb} {described}: {run}")
    return run


def reproduce(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.record import SWEEP_FILE, read_run, read_sweep

    folder = arguments.folder  # a damaged record is refused at once, before torch is loaded
    (read_sweep if (folder / SWEEP_FILE).is_file() else read_run)(folder)
    with quick_imports():
        from lorasweep import api

    found = api.reproduce(folder, output=arguments.output, tolerance=arguments.tolerance, steps=arguments.steps)
    say(found.description)
    code = INTERRUPTED_EXIT_CODE if found.verdict == "interrupted" else DONE if found.holds else FAILED
    return Outcome(found, code)


def train(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.train_app import run_train_app

    results: list[RunResult] = []
    errors: list[LoraSweepError | OSError] = []

    def show_result(result: RunResult, job: str) -> int:
        results.append(result)
        return _say_run(result, job)

    def show_error(error: LoraSweepError | OSError, job: str) -> int:
        if job:  # of a grid, perhaps in another process
            return end_with_error(error, job).code
        errors.append(error)
        return FAILED

    code = run_train_app(arguments, show_result=show_result, show_error=show_error)
    if errors:
        raise errors[0]
    return Outcome(results[0] if results else None, code)


def _split_name(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the sweep's name or file, or None if there is none, and the overrides after it."""
    is_named = bool(arguments) and "=" not in arguments[0]
    return (arguments[0], list(arguments[1:])) if is_named else (None, list(arguments))


def _say_run(result: RunResult, job: str) -> int:
    if get_rank() > 0:  # only the first process prints
        return DONE
    if result.status == "interrupted":
        say_error(f"{result.record.reason}; to resume add `output={result.folder} resume=true` to the command")
        return INTERRUPTED_EXIT_CODE
    say(f"{job}: {result}" if job else str(result))
    return DONE


def _show_sweep(result: SweepResult, *, verbose: bool) -> Outcome:
    """Prints the table of a complete sweep. Fails if an arm lacks the test score that was asked for."""
    _show_report(result, verbose=verbose)
    for arm, reason in result.unconfirmed.items():
        say_error(
            f"the confirm stage must score every arm on test data, but has no score of arm `{arm}`: "
            f"{reason.rstrip('.')}. The records in {str(result.folder / 'runs')!r} have the reasons."
        )
    return Outcome(result, FAILED if result.unconfirmed else DONE)


def _show_report(result: SweepResult, *, verbose: bool) -> None:
    """Prints the answers and the table of a sweep, the page, and what to type next."""
    from lorasweep.report.terminal import render_terminal

    show(render_terminal(result.findings, verbose=verbose))
    say(f"report: {result.report}")
    if not verbose:
        say(f"All findings: lorasweep compare {result.folder} --verbose")
        for recommendation in result.findings.recommended:
            for purpose, command in recommendation.commands.items():
                say(f"{purpose}: {command}")


def _say_how_to_resume(result: SweepResult) -> Outcome:
    record = result.record
    done = sum(row.state != "running" for row in record.trials)
    asked = sum(arm.trials for arm in record.arms)
    remedy = f"lorasweep sweep --resume {result.folder}"
    try:
        say_error(f"stopped with {done} of {asked} trials done. To resume type:")
        say(f"    {remedy}", file=sys.stderr)
    except KeyboardInterrupt:  # a further Ctrl-C
        raise KeyboardInterrupt(f"To resume type `{remedy}`") from None
    return Outcome(result, INTERRUPTED_EXIT_CODE)

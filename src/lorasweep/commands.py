"""The commands of the command line. Each calls a function of the Python API, prints, and returns an `Outcome`."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasweep.console import EscapingConsole, say, say_error, say_note, show
from lorasweep.errors import INTERRUPTED_EXIT_CODE, ConfigError, SweepInterrupted
from lorasweep.outcome import DONE, FAILED, Outcome, get_rank
from lorasweep.training.torch_variables import quick_imports

if TYPE_CHECKING:
    from lorasweep.hydra_app import Job
    from lorasweep.results import RunResult, SweepResult
    from lorasweep.sweep.definition.arms import Definition
    from lorasweep.tasks.examples import Examples
    from lorasweep.wording import Note

RECIPE_FORMATS = ("axolotl", "trl", "llamafactory")
"""Formats of `export` that write settings into a training file of another tool."""
Command = Callable[[argparse.Namespace], Outcome]


def sweep(arguments: argparse.Namespace) -> Outcome:
    from lorasweep import api

    progress: Literal["auto", "verbose"] = "verbose" if arguments.verbose else "auto"
    name, words = _split_name(arguments)
    if arguments.resume is not None and (arguments.minutes or arguments.new or name):
        given = "`--minutes`" if arguments.minutes else "`--new`" if arguments.new else repr(name)
        raise ConfigError(f"{given} must be left out with `--resume`, because the folder's sweep is already defined.")
    folder = None if arguments.resume is None else _choose_sweep(arguments.resume)
    if arguments.cfg and folder:
        from lorasweep.sweep.controller.lifecycle import read_saved_definition

        return _show_settings(read_saved_definition(folder))
    if arguments.cfg:
        return _show_settings(api.define_sweep(name, overrides=words, minutes=arguments.minutes, on_note=say_note))
    try:
        if folder:
            result = api.resume_sweep(folder, overrides=words, progress=progress)
        else:
            result = api.run_sweep(
                name, overrides=words, minutes=arguments.minutes, new=arguments.new, progress=progress
            )
    except SweepInterrupted as interrupt:
        from lorasweep.results import load_sweep

        say_error(f"stopped. To resume type `lorasweep sweep --resume {interrupt.folder}`")
        return Outcome(load_sweep(interrupt.folder), INTERRUPTED_EXIT_CODE)
    _show_report(result, verbose=arguments.verbose)
    return Outcome(result, _say_unconfirmed(result))


def _choose_sweep(folder: str | Path | None) -> Path:
    """Returns the folder of a sweep, or the newest one in `outputs`, which is named in a line."""
    from lorasweep.results import find_newest_sweep

    if folder:
        return Path(folder)
    newest = find_newest_sweep()
    say_note(f"{newest}: the newest sweep in outputs")
    return newest


def _split_name(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Returns the name or the file of a sweep, if the words begin with one, and the overrides."""
    words = arguments.overrides
    return (words[0], words[1:]) if words and "=" not in words[0] else (None, words)


def _say_unconfirmed(result: SweepResult) -> int:
    for arm, reason in result.unconfirmed.items():
        say_error(
            f"the confirm stage must score every arm on test data, but has no score of arm `{arm}`: "
            f"{reason.rstrip('.')}. The records in {str(result.folder / 'runs')!r} have the reasons."
        )
    return FAILED if result.unconfirmed else DONE


def _show_settings(definition: Definition) -> Outcome:
    from lorasweep.sweep.definition.arms import describe_definition

    say(describe_definition(definition).removesuffix("\n"))
    return Outcome()


def status(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.sweep.status import read_status, render_status

    now = read_status(_choose_sweep(arguments.folder))
    show(render_status(now))
    if now.state == "complete":
        from lorasweep.results import load_sweep

        say(repr(load_sweep(now.folder)))
    return Outcome(now)


def new(arguments: argparse.Namespace) -> Outcome:
    """Reads the model and the data, and writes a sweep file for them."""
    from lorasweep import api

    path = arguments.file
    written = api.new_sweep(
        path,
        arguments.overrides,
        like=arguments.like,
        from_hub=arguments.source,
        minutes=arguments.minutes,
        on_note=say_note,
    )
    say(f"wrote {path}. Read it, then type:\n    lorasweep plan {path}\n    lorasweep sweep {path}")
    for sentence in written.notes:
        say(f"• {sentence}")
    _say_notes(written.assessment.shown)
    return Outcome()


def plan(arguments: argparse.Namespace) -> Outcome:
    """Checks a sweep, measures a few steps of its trainings, and shows the cost of the sweep. Keeps no file."""
    from lorasweep import api
    from lorasweep.wording import format_seconds

    began, (name, words) = time.monotonic(), _split_name(arguments)
    given = {"minutes": arguments.minutes, "measure": arguments.measure}
    found = api.plan_sweep(name, overrides=words, on_note=say_note, **given)
    from lorasweep.sweep.plan import render_plan

    if found.definition.description:
        say(found.definition.description)
    show(render_plan(found.definition, found.rates))
    _say_notes(found.assessment.shown)
    say_note(f"this plan took {format_seconds(time.monotonic() - began)}")
    return Outcome(found)


def _say_notes(notes: list[Note]) -> None:
    for note in notes:
        say(f"{'warning:' if note.kind == 'warning' else '•'} {note.text}")


def compare(arguments: argparse.Namespace) -> Outcome:
    """Writes and shows the report of a sweep again; compares several sweeps."""
    from lorasweep.report.comparison import compare_sweeps, format_comparison
    from lorasweep.report.write import write_report
    from lorasweep.results import load_sweep

    if len(arguments.folders) > 1:
        table = compare_sweeps(arguments.folders)
        for line in format_comparison(table).splitlines():
            say(line)
        return Outcome({"subjects": table.to_dict("records")})
    result = load_sweep(_choose_sweep(next(iter(arguments.folders), None)))
    write_report(result.findings)
    _show_report(result, verbose=arguments.verbose)
    return Outcome(result)


def export(arguments: argparse.Namespace) -> Outcome:
    from lorasweep import api
    from lorasweep.config.run import require_exportable
    from lorasweep.disk import require_new_folder
    from lorasweep.record import read_run, restore_config

    if (arguments.format in RECIPE_FORMATS) is not (arguments.into is not None):
        fitting = RECIPE_FORMATS if arguments.into else ("peft", "merged")
        place = "--into" if arguments.into else "--out"
        raise ConfigError(f"`{place}` must come with `--format` {' or '.join(fitting)}, but got {arguments.format!r}.")
    if arguments.into:
        done = api.export_recipe(arguments.run, arguments.into, tool=arguments.format)
        for change in done.changes:
            say(f"{change.line} (was {change.old or 'missing'})")
        num = "1 line" if len(done.changes) == 1 else f"{len(done.changes) or 'no'} lines"
        say(f"{arguments.into}: {num} changed; {done.evidence}")
        return Outcome()
    require_new_folder(arguments.out, key="--out", remedy="Name another folder.")  # before what takes seconds
    run, name = api.find_run(arguments.run)
    if run != arguments.run:
        say(f"exporting {name}: {run}")
    require_exportable(restore_config(read_run(run)))  # without torch, whose import takes seconds
    with quick_imports():
        from lorasweep.runs.export import export_run
        from lorasweep.wording import format_bytes

    written = export_run(run, format=arguments.format, out=arguments.out, trust=arguments.trust)
    say(f"{arguments.format}, {written.dtype}, {format_bytes(written.num_bytes)}: {arguments.out}")
    return Outcome()


def reproduce(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.record import read_run

    read_run(arguments.run)  # a damaged record is refused at once, before torch is loaded
    with quick_imports():
        from lorasweep.runs.reproduce import reproduce_run

    given = {name: getattr(arguments, name) for name in ("output", "tolerance", "steps")}
    repeated = reproduce_run(arguments.run, **given)
    say(repeated.description)
    code = INTERRUPTED_EXIT_CODE if repeated.verdict == "interrupted" else DONE if repeated.holds else FAILED
    return Outcome(code=code)


def train(arguments: argparse.Namespace) -> Outcome:
    """Trains the run, or each job of a grid, or only shows settings or examples."""
    from lorasweep.hydra_app import run_hydra_app

    settings: dict[str, Any] = {}
    origin: dict[str, Any] = {}
    if arguments.source is not None:
        from lorasweep.report.recommend import read_recommended

        settings, origin = read_recommended(Path(arguments.source))

    def run_job(job: Job) -> Outcome:
        return _run_job(job, arguments, origin=origin)

    code = run_hydra_app(
        arguments.overrides, run_job, settings=settings, is_grid=arguments.multirun, require_all=not arguments.cfg
    )
    return Outcome(code=code)


def _run_job(job: Job, arguments: argparse.Namespace, *, origin: dict[str, Any]) -> Outcome:
    from omegaconf import OmegaConf

    from lorasweep import api
    from lorasweep.config.build import as_settings

    if arguments.cfg:
        say(OmegaConf.to_yaml(OmegaConf.create(as_settings(job.config))).removesuffix("\n"))
        return Outcome()
    from lorasweep.sweep.definition.typed import check_sources  # it loads Optuna

    check_sources(job.config, job.typed)
    if arguments.show_examples is not None:
        _show_examples(api.list_examples(job.config, number=arguments.show_examples))
        return Outcome()
    trainer = job.config.trainer
    if arguments.multirun and trainer.needs_process_group:
        raise ConfigError(
            "`trainer.devices` must be 1 and `trainer.strategy` auto with `-m`, but got "
            f"{trainer.devices!r} and {trainer.strategy_name}. Use `lorasweep sweep` instead of a grid."
        )
    result = api.train_run(job.config, output=job.values["output"], resume=bool(job.values["resume"]), origin=origin)
    return Outcome(result, _say_run(result, job.name))


def _show_examples(examples: Examples) -> None:
    """Prints training examples. The scored parts are green on a terminal, and between brackets elsewhere."""
    from rich.text import Text

    for note in examples.notes:
        say_note(f"• {note}")
    console = EscapingConsole(highlight=False, soft_wrap=True)
    before, after = ("", "") if console.is_terminal and not console.no_color else ("⟦", "⟧")
    for number, passages in enumerate(examples.passages, start=1):
        console.rule(f"example {number} of {examples.num_train}")
        parts = [(f"{before}{text}{after}", "bold green") if is_scored else (text, "") for text, is_scored in passages]
        console.print(Text.assemble(*parts))


def _say_run(result: RunResult, job: str) -> int:
    if get_rank() > 0:  # only the first process prints
        return DONE
    if result.status == "interrupted":
        say_error(f"{result.record.reason}; to resume add `output={result.folder} resume=true` to the command")
        return INTERRUPTED_EXIT_CODE
    say(f"{job}: {result}" if job else str(result))
    for split, answers in result.record.answers.items():
        if "problem" in answers:
            say_error(f"the answers to {split} have no score: {answers['problem']}")
    return DONE


def help(arguments: argparse.Namespace) -> Outcome:
    """Explains a key, an option of a group, or a command; lists the options of a group, or all groups and commands."""
    from lorasweep.config.command_line import describe_groups
    from lorasweep.config.other_names import list_other_names
    from lorasweep.config.reference import list_fields, list_settings
    from lorasweep.sweep.definition.sweep_file import ArmConfig, list_sweep_files
    from lorasweep.wording import shorten, suggest_nearest

    name, parser, files = arguments.name, arguments.commands.get(arguments.name), list_sweep_files()
    settings = [*list_settings("train"), *list_settings("sweep"), *list_fields(ArmConfig, "arms.ARM", {"": {}})]
    ours = list_other_names().get(name, name)
    shown = [one for one in settings if f"{one.key}.".startswith(f"{ours}.")]
    shown = shown or [one for one in settings if one.key.endswith(f".{ours}")]
    shown = shown or [one for one in settings if name in one.options]  # an option of a group, such as `dpo`
    group, _, option = (name or "").partition("=")
    if option:
        shown = [one for one in settings if one.key.startswith(f"{group}.") and option in one.options]
    groups = describe_groups()
    if name is None:
        say(f"commands: {', '.join(arguments.commands)}\nsweeps: {', '.join(sorted(files))}\n{groups}")
    elif parser is not None:
        say(parser.format_help().removesuffix("\n"))
    elif name in files:
        head = itertools.takewhile(lambda line: line.startswith("#"), files[name].read_text("utf-8").splitlines())
        say("\n".join(line.removeprefix("# ") for line in head))
    elif not shown:
        keys = [part for one in settings for part in (one.key, one.key.partition(".")[0], *one.options)]
        of_group = [f"{group}={kind}" for one in settings for kind in one.options] if option else []
        near = suggest_nearest(name, of_group or [*arguments.commands, *files, *keys])
        raise ConfigError(
            f"`lorasweep help` must get a setting, a group, a command or a sweep, but got {shorten(name)}.{near}"
        )
    of_kinds = [one for one in shown[::-1] if one.options and one.key.startswith(f"{ours}.")]
    kinds = {min(one.options, key=len): one.about for one in of_kinds}
    if len(kinds) > 1 and "." not in ours:
        say("\n".join(f"lorasweep help {name}={kind}  {about}" for kind, about in sorted(kinds.items())))
        shown = []
    if ours != name:
        say(f"`{name}` of other tools is `{ours}` here.")
    for line in groups.splitlines():
        if line.startswith(f"  {name}="):  # with the options that have no settings
            say(line.strip())
    for one in shown:
        of_options = f" ({one.key.partition('.')[0]}={', '.join(one.options)})" if one.options else ""
        say(f"{one.key}{of_options}\n    {one.meaning}\n    values: {one.values}\n    default: {one.default}")
    return Outcome()


def _show_report(result: SweepResult, *, verbose: bool) -> None:
    """Prints the answers and the table of a sweep, the page, and what to type next."""
    from lorasweep.report.terminal import render_terminal
    from lorasweep.report.text import PURPOSES

    show(render_terminal(result.findings, verbose=verbose))
    say(f"report: {result.report}")
    if not verbose:
        say(f"All findings: lorasweep compare {result.folder} --verbose")
        for one in result.findings.recommended:
            for purpose, command in one.commands.items():
                say(f"{PURPOSES[purpose].format(one.subject.name)}: {command}")

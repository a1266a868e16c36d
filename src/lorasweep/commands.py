"""The commands of the command line. Each calls functions of the packages, prints, and returns its result."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorasweep.console import add_clock, say, say_error, show
from lorasweep.errors import INTERRUPTED_EXIT_CODE, ConfigError, LoraSweepError
from lorasweep.outcome import DONE, FAILED, Outcome, end_with_error, get_rank
from lorasweep.training.torch_variables import quick_imports

if TYPE_CHECKING:
    from lorasweep.results import RunResult, SweepResult
    from lorasweep.sweep.cost import Rates
    from lorasweep.sweep.definition.arms import Definition
    from lorasweep.training.inputs import InputsCache

END_S = 3.0
"""Seconds of `--minutes` that are kept for the report at the end of a sweep."""
RECIPE_FORMATS = ("axolotl", "trl", "llamafactory")
"""Formats of `export` that write settings into a training file of another tool."""
Command = Callable[[argparse.Namespace], Outcome]


def sweep(arguments: argparse.Namespace) -> Outcome:
    progress: Literal["auto", "verbose"] = "verbose" if arguments.verbose else "auto"
    if arguments.resume and (arguments.minutes or _has_name(arguments.overrides)):
        given = "`--minutes`" if arguments.minutes else repr(arguments.overrides[0])
        raise ConfigError(f"{given} must be left out with `--resume`, because the sweep already has these.")
    if arguments.resume:
        from lorasweep.record import read_sweep

        read_sweep(arguments.resume)  # without torch, so that a wrong folder is refused at once
        with quick_imports():
            from lorasweep.api import resume_sweep
            from lorasweep.sweep.controller.lifecycle import read_saved_definition
        if arguments.cfg:
            return _show_settings(read_saved_definition(arguments.resume))
        result = resume_sweep(arguments.resume, overrides=arguments.overrides, progress=progress)
    else:
        definition, _, inputs_cache = _define(arguments, measures=arguments.minutes is not None)
        if arguments.cfg:
            return _show_settings(definition)
        from lorasweep.sessions import run_definition

        result = run_definition(definition, inputs_cache, progress=progress)
    if result.status != "complete":
        return _say_how_to_resume(result)
    _show_report(result, verbose=arguments.verbose)
    return Outcome(result, _say_unconfirmed(result))


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

    now = read_status(arguments.folder)
    show(render_status(now))
    return Outcome(now)


def new(arguments: argparse.Namespace) -> Outcome:
    """Reads the model and the data, and writes a sweep file for them."""
    path = arguments.file
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"`FILE.yaml` must have the suffix .yaml, but got {str(path)!r}.")
    if path.exists():
        raise ConfigError(f"`FILE.yaml` must be a new file, but {str(path)!r} exists already. Name another one.")
    from lorasweep.config.command_line import parse_overrides
    from lorasweep.config.run import RANK
    from lorasweep.recipes.read import read_recipe
    from lorasweep.sweep.definition.typed import check_typed

    settings, recipe = parse_overrides(arguments.overrides), None
    check_typed(settings)  # without torch, so that a typing error is named at once
    if arguments.like is not None:  # read without torch, so that a refused key is named at once
        has_data = arguments.source is not None or not settings.keys().isdisjoint(("data", "data.path", "data.train"))
        recipe = read_recipe(arguments.like, has_data=has_data)
    say("reads the model and the data; first loads torch, which takes seconds", file=sys.stderr)
    with quick_imports():
        from lorasweep.data.reading.hub import find_hub_settings
        from lorasweep.disk import write_atomically
        from lorasweep.sweep.cost import fit_minutes
        from lorasweep.sweep.draft import draft_sweep
        from lorasweep.training.inputs import InputsCache

    began = time.monotonic()
    inputs_cache = InputsCache()
    if arguments.source is not None:
        given = {name: settings.get(f"data.{name}") for name in ("subset", "revision")}
        settings = find_hub_settings(arguments.source, **given) | settings
    draft = draft_sweep(path, settings, inputs_cache, recipe=recipe)
    if arguments.minutes is not None:
        say("measures a few steps of the drafted sweep", file=sys.stderr)
        definition, rates = _measure(draft.definition, inputs_cache)
        spent_s = time.monotonic() - began + END_S
        budget, given_up = fit_minutes(definition, rates, arguments.minutes, typed=settings, spent_s=spent_s)
        say(given_up, file=sys.stderr)
        changes = budget.find_settings(definition)
        for ranks in budget.find_ranks(definition).values():  # a draft has one arm with several
            changes[RANK] = ranks
        draft = draft_sweep(path, {**settings, **changes}, inputs_cache, recipe=recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, draft.text)
    say(f"wrote {path}. Read it, then type:\n    lorasweep plan {path}\n    lorasweep sweep {path}")
    notes = [*(recipe.describe() if recipe else ()), *draft.notes]
    for sentence in notes:
        say(f"• {sentence}")
    _say_notes(draft.definition, inputs_cache)
    return Outcome()


def plan(arguments: argparse.Namespace) -> Outcome:
    """Checks a sweep, measures a few steps of its trainings, and shows the cost of the sweep. Keeps no file."""
    began = time.monotonic()
    definition, rates, inputs_cache = _define(arguments, measures=True)
    from lorasweep.sweep.plan import describe_group, render_plan
    from lorasweep.wording import format_seconds

    if definition.description:
        say(definition.description)
    show(render_plan(definition, rates))
    notes = _say_notes(definition, inputs_cache)
    say(f"this plan took {format_seconds(time.monotonic() - began)}", file=sys.stderr)
    groups = [describe_group(definition, group) for group in rates]
    return Outcome({"name": definition.name, "groups": groups, "notes": notes})


def _say_notes(definition: Definition, inputs_cache: InputsCache) -> list[str]:
    """Prints what to expect of a sweep, and returns the sentences."""
    from lorasweep.sweep.assess import assess

    notes = [note for note in assess(definition, inputs_cache).notes if note.kind != "data"]
    for note in notes:
        say(f"{'warning:' if note.kind == 'warning' else '•'} {note.text}")
    return [note.text for note in notes]


def _has_name(words: Sequence[str]) -> bool:
    """Returns whether the words begin with the name or the file of a sweep."""
    return bool(words) and "=" not in words[0]


def _define(arguments: argparse.Namespace, *, measures: bool) -> tuple[Definition, list[Rates], InputsCache]:
    """Returns the sweep that the arguments name, or one that is drafted for their data, and what was loaded for it.

    If it `measures`, the sweep is checked, its trainings are measured, and `--minutes` cuts it.
    """
    from lorasweep.config.command_line import parse_overrides
    from lorasweep.sweep.definition.arms import read_definition
    from lorasweep.sweep.definition.sweep_file import find_sweep_file
    from lorasweep.sweep.definition.typed import check_sources, check_typed

    began, words, named = time.monotonic(), arguments.overrides, None
    if _has_name(words):  # read without torch, whose import takes seconds, so that a wrong key is refused at once
        named = read_definition(find_sweep_file(words[0]), words[1:])
        check_sources(named.arms[0].base, named.arms[0].settings)
    else:
        check_typed(parse_overrides(words))
    if measures:
        arms = "the drafted sweep" if named is None else f"{named.name} ({', '.join(arm.name for arm in named.arms)})"
        say(f"measures a few steps of {arms}; first loads torch, the model and the data", file=sys.stderr)
    elif named is not None and not arguments.cfg and sys.stderr.isatty():
        say(f"{named.name}: loads torch, the model and the data", file=sys.stderr)
    with quick_imports():
        from lorasweep.sweep.cost import cut_sweep, fit_minutes
        from lorasweep.sweep.draft import draft_definition
        from lorasweep.training.inputs import InputsCache

    inputs_cache = InputsCache()
    definition = named or draft_definition(words, inputs_cache)
    if not measures:
        return definition, [], inputs_cache
    definition, rates = _measure(definition, inputs_cache)
    if arguments.minutes is not None:
        typed, spent_s = parse_overrides(words if named is None else words[1:]), time.monotonic() - began + END_S
        budget, given_up = fit_minutes(definition, rates, arguments.minutes, typed=typed, spent_s=spent_s)
        say(given_up, file=sys.stderr)
        rates = [group.limit(budget, definition.find_arm(group.arms[0]).base) for group in rates]
        rates = [group for group in rates if group.arms]
        definition = cut_sweep(definition, budget)
    return definition, rates, inputs_cache


def _measure(definition: Definition, inputs_cache: InputsCache) -> tuple[Definition, list[Rates]]:
    """Returns a checked sweep with its number of steps, and what its trainings take."""
    from lorasweep.sweep.checks import check_definition
    from lorasweep.sweep.draft import complete_definition
    from lorasweep.sweep.measure import measure_sweep

    def note(phrase: str) -> None:
        say(add_clock(phrase), file=sys.stderr)

    definition = complete_definition(definition, inputs_cache)
    check_definition(definition, inputs_cache, new_folder=definition.sweep_config.sweep.output)
    return definition, measure_sweep(definition, inputs_cache, on_progress=note)


def compare(arguments: argparse.Namespace) -> Outcome:
    """Writes and shows the report of a sweep again; compares several sweeps."""
    from lorasweep.report.comparison import compare_sweeps, render_comparison
    from lorasweep.report.write import write_report
    from lorasweep.results import load_sweep

    if len(arguments.folders) > 1:
        comparison = compare_sweeps(arguments.folders)
        show(render_comparison(comparison))
        return Outcome(comparison)
    result = load_sweep(arguments.folders[0])
    write_report(result.findings)
    _show_report(result, verbose=arguments.verbose)
    return Outcome(result)


def export(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.config.run import require_exportable
    from lorasweep.record import read_run, restore_config

    if (arguments.format in RECIPE_FORMATS) is not (arguments.into is not None):
        fitting = RECIPE_FORMATS if arguments.into else ("peft", "merged")
        place = "--into" if arguments.into else "--out"
        raise ConfigError(f"`{place}` must come with `--format` {' or '.join(fitting)}, but got {arguments.format!r}.")
    if arguments.into:
        return _export_into(arguments)
    run = _choose_run(arguments.run, verb="exporting")
    require_exportable(restore_config(read_run(run)))  # without torch, whose import takes seconds
    with quick_imports():
        from lorasweep.runs.export import export_run
        from lorasweep.wording import format_bytes

    written = export_run(run, format=arguments.format, out=arguments.out, trust=arguments.trust)
    say(f"{arguments.format}, {written.dtype}, {format_bytes(written.num_bytes)}: {arguments.out}")
    for sentence in written.notes:
        say(f"• {sentence}")
    return Outcome()


def _export_into(arguments: argparse.Namespace) -> Outcome:
    """Writes the settings that a sweep decided into a training file of another tool, and says each change."""
    from lorasweep.recipes.write import write_recipe
    from lorasweep.record import read_run
    from lorasweep.report.recommend import load_recommended
    from lorasweep.report.text import describe_evidence
    from lorasweep.wording import format_range

    evidence: dict[str, str] = {}
    if _is_run(arguments.run):
        run, otherwise = read_run(arguments.run), "one run, compared with no other"
        summary = otherwise
    else:
        data, one, setting = load_recommended(arguments.run, key="RUN", methods=("lora", "peft"))
        assert setting.record is not None  # `find_recommended` refuses others
        run, otherwise, summary = setting.record, "as in the run, not searched", describe_evidence(one, data)
        arm = next(row for row in data.record.arms if row.name == one.arm)
        for key in setting.params:
            searched = f"searched in {format_range(arm.space[key])}, {arm.trials} trials"
            evidence[key] = summary if key == arm.key else searched
    changes, notes = write_recipe(
        arguments.into,
        tool=arguments.format,
        run=run,
        evidence=evidence,
        otherwise=otherwise,
        anyway=arguments.anyway,
    )
    for change in changes:
        say(f"{change.line} (was {change.old or 'missing'})")
    for note in notes:
        say(f"• {note}")
    num = "1 line" if len(changes) == 1 else f"{len(changes) or 'no'} lines"
    say(f"{arguments.into}: {num} changed; {summary}")
    return Outcome()


def inspect(arguments: argparse.Namespace) -> Outcome:
    """Shows how the norm of a run's updates is shared among the kinds of layers, and how many directions they use."""
    run = _choose_run(arguments.run, verb="inspecting")
    with quick_imports():
        from lorasweep.runs.inspect import inspect_run

    found = inspect_run(run, trust=arguments.trust)
    kinds = found["layer"].str.rsplit(".", n=1).str[-1]  # the name of a layer in its block, such as `q_proj`
    rows = found.groupby(kinds.where(found["directions"].notna(), "norms, biases"))
    columns = {"rank": "max", "norm_share": "sum", "directions": "median"}
    table = rows.agg(weights=("layer", "size"), **{name: (name, how) for name, how in columns.items()})
    table = table.sort_values("norm_share", ascending=False).rename_axis(None)
    say(table.to_string(formatters={"norm_share": "{:.1%}".format}, na_rep="–"))
    say("directions: the median number of singular values that hold 90 % of an update's squared norm")
    return Outcome()


def _choose_run(folder: Path, *, verb: str) -> Path:
    """Returns the folder if it is a run, or the recommended run of SWEEP or SWEEP/ARM.

    Reads the record without torch, whose import takes seconds, so that a wrong folder is refused at once.
    """
    from lorasweep.record import read_run
    from lorasweep.report.recommend import find_recommended_run

    if _is_run(folder):
        read_run(folder)
        return folder
    run, described = find_recommended_run(folder)
    say(f"{verb} {described}: {run}")
    return run


def _is_run(folder: Path) -> bool:
    """Returns whether a folder must be a run, because it is neither SWEEP nor SWEEP/ARM."""
    from lorasweep.record import RUN_FILE, SWEEP_FILE

    return (folder / RUN_FILE).is_file() or not any((one / SWEEP_FILE).is_file() for one in (folder, folder.parent))


def reproduce(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.record import read_run

    run = arguments.run
    read_run(run)  # a damaged record is refused at once, before torch is loaded
    with quick_imports():
        from lorasweep.sessions import reproduce

    repeated = reproduce(run, output=arguments.output, tolerance=arguments.tolerance, steps=arguments.steps)
    say(repeated.description)
    code = INTERRUPTED_EXIT_CODE if repeated.verdict == "interrupted" else DONE if repeated.holds else FAILED
    return Outcome(code=code)


def train(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.train_app import run_train_app

    errors: list[LoraSweepError | OSError] = []

    def show_error(error: LoraSweepError | OSError, job: str) -> int:
        if job:  # of a grid, perhaps in another process
            return end_with_error(error, job).code
        errors.append(error)
        return FAILED

    code = run_train_app(arguments, show_result=_say_run, show_error=show_error)
    if errors:
        raise errors[0]
    return Outcome(code=code)


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
    """Explains the settings of a key or a group, or a command; without a name, lists the groups and the commands."""
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
    groups = describe_groups()
    if name is None:
        say(f"commands: {', '.join(arguments.commands)}\nsweeps: {', '.join(sorted(files))}\n{groups}")
    elif parser is not None:
        say(parser.format_help().removesuffix("\n"))
    elif name in files:
        lines = files[name].read_text(encoding="utf-8").splitlines()
        say(
            "\n".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
        )
    elif not shown:
        names = [
            *arguments.commands,
            *files,
            *(part for one in settings for part in (one.key, one.key.partition(".")[0])),
        ]
        raise ConfigError(
            f"`lorasweep help` must get a setting, a group, a command or a sweep, but got {shorten(name)}."
            f"{suggest_nearest(name, names)}"
        )
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
    from lorasweep.report.terminal import list_commands, render_terminal

    show(render_terminal(result.findings, verbose=verbose))
    say(f"report: {result.report}")
    if not verbose:
        say(f"All findings: lorasweep compare {result.folder} --verbose")
        for purpose, command in list_commands(result.findings):
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

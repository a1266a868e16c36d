"""The command line: parses what was typed, calls the Python API, prints, and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong request, 130 interrupted. Each command returns its result, which `--json` prints
alone on standard output. Each command imports its modules when it is called, so that `--help` and `compare` start in a
fraction of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from lorasweep.config.redaction import redact
from lorasweep.console import EscapingConsole, reserve_stdout, say, say_error, show
from lorasweep.errors import ConfigError, LoraSweepError, RanksLost, RecordError
from lorasweep.training.stop_signal import INTERRUPTED_EXIT_CODE
from lorasweep.training.torch_variables import quick_imports

if TYPE_CHECKING:
    from lorasweep.api import Overrides
    from lorasweep.config.compose import Primary
    from lorasweep.results import RunResult, SweepResult
    from lorasweep.sweep.definition.arms import Definition
    from lorasweep.sweep.plan import GroupPlan
    from lorasweep.training.inputs import InputsCache

DONE, FAILED, WRONG_REQUEST = 0, 1, 2


@dataclass(frozen=True)
class Outcome:
    """The end of a command: what `--json` prints, and the exit code."""

    content: Any
    """A dataclass, a mapping, or an object with `as_json`."""
    code: int = DONE

    def as_json(self) -> str:
        from pydantic_core import to_jsonable_python

        content = self.content.as_json() if hasattr(self.content, "as_json") else self.content
        # numbers of NumPy have `item`
        plain = to_jsonable_python(
            content, inf_nan_mode="null", fallback=lambda value: value.item() if hasattr(value, "item") else str(value)
        )
        return json.dumps(plain, indent=1)


Command = Callable[[argparse.Namespace], Outcome]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; prints errors of lorasweep as one line."""
    with reserve_stdout() if "--json" in arguments else nullcontext() as stdout:
        try:
            outcome = _run_command(arguments)
        except (LoraSweepError, OSError) as error:
            outcome = _end_with_error(error)
        except KeyboardInterrupt as interrupt:
            reason = f"interrupted. {interrupt}".rstrip(". ")
            say_error(reason)
            outcome = Outcome(_describe_error("KeyboardInterrupt", reason), INTERRUPTED_EXIT_CODE)
        if stdout and _rank() == 0:
            print(outcome.as_json(), file=stdout, flush=True)
        return outcome.code


def _run_command(arguments: Sequence[str]) -> Outcome:
    parser = build_parser()
    parsed, others = parser.parse_known_args(arguments)
    if hasattr(parsed, "overrides") and not any(other.startswith("-") for other in others):
        parsed.overrides = [*parsed.overrides, *others]  # also overrides after a flag
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if parsed.json and any(getattr(parsed, name, None) for name in ("cfg", "multirun", "show_examples")):
        raise ConfigError("`--json` must be missing with `--cfg`, `-m` and `--show-examples`, which have no result.")
    command: Command = parsed.command
    return command(parsed)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lorasweep", description="Finds the LoRA rank, alpha and learning rate for your model and data."
    )
    parser.add_argument("--version", action="version", version=f"lorasweep {version('lorasweep')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)

    def add(command: Command, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(command.__name__, help=help, formatter_class=argparse.RawDescriptionHelpFormatter)
        added.add_argument("--json", action="store_true", help="print the result as one JSON object, and nothing else")
        added.set_defaults(command=command)
        return added

    _add_sweep_commands(add)
    _add_training(add(train, "train one run, or a grid of runs with -m; a Hydra app"))
    _add_judge(add(judge, "give verdicts on scores of runs that were trained elsewhere"))
    _add_run_commands(add)
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


def _add_sweep_commands(add: Callable[[Command, str], argparse.ArgumentParser]) -> None:
    sweep_parser = add(sweep, "search every arm of a sweep and write the report")
    _add_overrides(sweep_parser, "NAME|FILE key=value", "default: a sweep for data.train=FILE model.path=...")
    sweep_parser.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="resume the sweep in this folder; may add arms.ARM.trials=N, confirm.seeds=N, worker=ray ...",
    )
    sweep_parser.add_argument(*("-c", "--cfg"), choices=["job"], help="print all settings of all arms, train nothing")
    status_parser = add(status, "show the arms of a sweep and the best trial so far")
    status_parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the sweep")
    status_parser.add_argument("--watch", action="store_true", help="show it every 2 s until the sweep ends or Ctrl-C")
    new_parser = add(new, "write a commented sweep file for your model and data")
    new_parser.add_argument("file", type=Path, metavar="FILE.yaml", help="the file to write")
    _add_overrides(new_parser, "key=value", "model.path=FOLDER-OR-HUB-ID data.train=FILE ...")
    new_parser.add_argument(
        "--from", dest="source", metavar="HUB-ID", help="a data set of the hub, with all its splits"
    )
    plan_parser = add(plan, "estimate the time, memory and disk of a sweep without training it")
    _add_overrides(plan_parser, "NAME|FILE key=value", "as in sweep")
    compare_parser = add(compare, "write and show the report of a sweep again, or the spread of several sweeps")
    compare_parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of sweeps")
    for shown in (sweep_parser, compare_parser):
        shown.add_argument("--verbose", action="store_true", help="print all notes and findings of the report")
    for timed in (sweep_parser, plan_parser, new_parser):
        timed.add_argument(
            "--minutes", type=float, metavar="N", help="choose seeds, trials and steps for this time, after measuring"
        )


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_overrides(parser, "key=value", "settings of the run")
    parser.add_argument(
        "--from", dest="source", metavar="SWEEP[/ARM]", help="begin with the settings that a sweep recommends"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        *("-m", "--multirun"), action="store_true", help="train each combination of values: method.rank=1,4"
    )
    modes.add_argument(*("-c", "--cfg"), choices=["job"], help="print all settings, train nothing")
    modes.add_argument(
        "--show-examples", type=int, metavar="N", help="print N training examples with what is scored, train nothing"
    )


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", type=Path, metavar="FILE.csv", help="scores with arm, seed and score")
    parser.add_argument("--metric", required=True, help="name of the score, such as accuracy")
    directions = parser.add_mutually_exclusive_group(required=True)
    directions.add_argument("--maximize", action="store_true", help="higher scores are better")
    directions.add_argument("--minimize", action="store_true", help="lower scores are better")
    parser.add_argument("--margin", required=True, help="smallest difference that matters: 0.01, or 5%% of the gain")
    parser.add_argument("--reference", default="full", metavar="ARM", help="arm with which others are compared")
    parser.add_argument("--base", default="frozen", metavar="ARM", help="the untrained model")
    parser.add_argument("--key", default="value", help="what the column value is, such as rank")
    parser.add_argument("--looks", nargs="+", type=int, default=(), metavar="N", help="all planned numbers of seeds")
    parser.add_argument("--columns", nargs="+", default=(), metavar="arm=Name", help="names of the file's columns")


def _add_run_commands(add: Callable[[Command, str], argparse.ArgumentParser]) -> None:
    export_parser = add(export, "write an adapter for PEFT, or the merged model for transformers")
    export_parser.add_argument("--format", required=True, choices=["peft", "merged"])
    export_parser.add_argument("--out", type=Path, metavar="D", required=True, help="a new or empty folder")
    inspect_parser = add(inspect, "show how much of its rank a run used, from its weights")
    for reader in (export_parser, inspect_parser):
        reader.add_argument(
            "run", type=Path, metavar="SWEEP[/ARM]|RUN", help="folder of a sweep: its recommended run; or of a run"
        )
        reader.add_argument("--trust", action="store_true", help="allow code that the model of the run needs")
    reproduce_parser = add(reproduce, "run a run or a sweep again from its record and compare the results")
    reproduce_parser.add_argument("folder", type=Path, metavar="RUN|SWEEP", help="folder of a run, or of a whole sweep")
    reproduce_parser.add_argument("--tolerance", type=float, metavar="T", help="maximum relative difference")
    reproduce_parser.add_argument("--steps", type=int, metavar="N", help="compare the first N steps only")
    reproduce_parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/reproduce/NAME")


def _add_overrides(parser: argparse.ArgumentParser, metavar: str, help: str) -> None:
    overrides = parser.add_argument("overrides", nargs="*", metavar=metavar, help=help)
    overrides.completer = complete_argument  # type: ignore[attr-defined]  # read by argcomplete


class CommandParser(argparse.ArgumentParser):
    """Parses one command. Its help lists the groups of settings that the command takes."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise ConfigError(message)

    def format_help(self) -> str:
        if (command := self.get_default("command")) in (train, sweep, plan):
            from lorasweep.config.command_line import describe_groups

            self.epilog = describe_groups(*_list_primaries(command))
        return super().format_help()


def complete_argument(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    """Returns the completions of an argument: names of sweeps, keys with `=`, or the options of a group."""
    from lorasweep.config.command_line import complete_override
    from lorasweep.sweep.definition.sweep_file import list_sweep_files

    typed, command = getattr(parsed_args, "overrides", None) or [], getattr(parsed_args, "command", None)
    is_name = not typed and command in (sweep, plan) and "=" not in prefix
    overrides = complete_override(prefix, [word for word in typed if "=" in word], primaries=_list_primaries(command))
    return [*(sorted(list_sweep_files()) if is_name else ()), *overrides]


def _list_primaries(command: Command | None) -> Sequence[Primary]:
    """Returns the primary configs whose settings a command takes."""
    return ("sweep", "train") if command in (sweep, plan) else ("train",)


def sweep(arguments: argparse.Namespace) -> Outcome:
    with quick_imports():
        from lorasweep import api
        from lorasweep.sweep.controller.lifecycle import read_saved_definition
        from lorasweep.sweep.definition.arms import describe_definition

    name, overrides = _split_name(arguments.overrides)
    progress: Literal["auto", "verbose"] = "verbose" if arguments.verbose else "auto"
    if arguments.resume and (arguments.minutes or name):
        given = "`--minutes`" if arguments.minutes else repr(name)
        raise ConfigError(f"{given} must be left out with `--resume`, because the sweep already has these.")
    if arguments.resume and not arguments.cfg:
        result = api.resume_sweep(arguments.resume, overrides=overrides, progress=progress)
    else:
        if arguments.resume:
            definition = read_saved_definition(arguments.resume)
        elif arguments.minutes is not None:
            definition = _measure_definition(name, overrides, minutes=arguments.minutes)[0]
        else:
            definition = api.read_sweep_definition(name, overrides)
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
    with quick_imports():
        from lorasweep.config.command_line import parse_overrides
        from lorasweep.data.reading.tables import find_hub_settings
        from lorasweep.disk import write_atomically
        from lorasweep.sweep.draft import draft_sweep

    path = arguments.file
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"`FILE.yaml` must have the suffix .yaml, but got {str(path)!r}.")
    if path.exists():
        raise ConfigError(f"`FILE.yaml` must be a new file, but {str(path)!r} exists already. Name another one.")
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
    for sentence in power:
        say(f"• {sentence}")
    say(f"wrote {path}. Read it, then type:\n    lorasweep plan {path}\n    lorasweep sweep {path}")
    return Outcome({"file": path, "notes": power})


def plan(arguments: argparse.Namespace) -> Outcome:
    """Checks a sweep, measures a few steps of its trainings, and shows the cost of the sweep. Keeps no file."""
    began = time.monotonic()
    name, overrides = _split_name(arguments.overrides)
    definition, groups, inputs_cache = _measure_definition(name, overrides, minutes=arguments.minutes)
    with quick_imports():
        from lorasweep.sweep.checks import describe_coverages
        from lorasweep.sweep.plan import render_plan
        from lorasweep.sweep.power import describe_power
        from lorasweep.wording import format_seconds

    show(render_plan(definition, groups))
    splits = inputs_cache.load(definition.arms[0].corner_configs[0]).splits
    notes = [*describe_coverages(definition, inputs_cache), *describe_power(definition, splits)]
    for sentence in notes:
        say(f"• {sentence}")
    say(f"this plan took {format_seconds(time.monotonic() - began)}", file=sys.stderr)
    return Outcome({"name": definition.name, "groups": list(map(_describe_group, groups)), "notes": notes})


def _describe_group(group: GroupPlan) -> dict[str, Any]:
    low, high = group.estimate_search()
    numbers = {key: value for key, value in vars(group).items() if key not in ("arms", "record")}
    return {"arms": [arm.name for arm in group.arms], **numbers, "run_s": group.run_s, "search_s": [low, high]}


def _measure_definition(
    name: str | None, overrides: Overrides, *, minutes: float | None
) -> tuple[Definition, list[GroupPlan], InputsCache]:
    """Returns a checked sweep, fitted to `minutes` if given, the plans of its groups of arms, and what they loaded."""
    from lorasweep.sweep.definition.arms import read_definition
    from lorasweep.sweep.definition.sweep_file import find_sweep_file

    # without torch, whose import takes several seconds, so that the first line comes at once
    definition = None if name is None else read_definition(find_sweep_file(name), overrides)
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
    from lorasweep.report.terminal import render_spread
    from lorasweep.report.write import write_report
    from lorasweep.results import load_sweep

    results = [load_sweep(folder) for folder in arguments.folders]
    for result in results:
        write_report(result.findings)
    if len(results) == 1:
        _show_report(results[0], verbose=arguments.verbose)
    else:
        show(render_spread([result.findings.data for result in results]))
    return Outcome({"sweeps": [result.as_json() for result in results]})


def judge(arguments: argparse.Namespace) -> Outcome:
    from lorasweep.report.judge import judge, read_scores

    columns = dict(given.split("=", 1) for given in arguments.columns if "=" in given)
    if len(columns) < len(arguments.columns):
        raise ConfigError("`--columns` must be pairs such as `arm=Name`: our name, then the file's.")
    scores = read_scores(arguments.scores, columns=columns)
    names = ("margin", "maximize", "metric", "reference", "base", "key", "looks")
    found = judge(scores, **{name: getattr(arguments, name) for name in names})
    show(found.render())
    return Outcome(found)


def export(arguments: argparse.Namespace) -> Outcome:
    with quick_imports():
        from lorasweep.runs.export import export_run
        from lorasweep.wording import format_bytes

    run = _choose_run(arguments.run, verb="exporting")
    written = export_run(run, format=arguments.format, out=arguments.out, trust=arguments.trust)
    say(f"{arguments.format}, {written.dtype}, {format_bytes(written.num_bytes)}: {arguments.out}")
    for sentence in written.serving:
        say(f"• {sentence}")
    return Outcome(written)


def inspect(arguments: argparse.Namespace) -> Outcome:
    """Analyses the weights of a run, writes the tables into its folder `inspect/` and shows them."""
    with quick_imports():
        from lorasweep.runs.inspect import inspect_run, render_inspection

    inspection = inspect_run(_choose_run(arguments.run, verb="inspecting"), trust=arguments.trust)
    show(render_inspection(inspection))
    return Outcome(inspection)


def _choose_run(folder: Path, *, verb: str) -> Path:
    """Returns the folder if it is a run, or the recommended run of SWEEP or SWEEP/ARM."""
    from lorasweep.record import RUN_FILE, SWEEP_FILE
    from lorasweep.report.recommend import find_recommended_run

    if (folder / RUN_FILE).is_file() or not any((one / SWEEP_FILE).is_file() for one in (folder, folder.parent)):
        return folder
    run, described = find_recommended_run(folder)
    say(f"{verb} {described}: {run}")
    return run


def reproduce(arguments: argparse.Namespace) -> Outcome:
    with quick_imports():
        from lorasweep import api

    found = api.reproduce(
        arguments.folder, output=arguments.output, tolerance=arguments.tolerance, steps=arguments.steps
    )
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
            return _end_with_error(error, job).code
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
    if _rank() > 0:  # only the first process prints
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


def _end_with_error(error: LoraSweepError | OSError, job: str = "") -> Outcome:
    """Prints an error in one sentence. If several processes train, the first one prints it."""
    if isinstance(error, LoraSweepError):
        code, message = WRONG_REQUEST if isinstance(error, ConfigError | RecordError) else FAILED, str(error)
    else:
        # the disk is full, or the folder is missing or read-only
        file_name = f" {str(error.filename)!r}" if error.filename else ""
        reason = f"{file_name}: {error.strerror or error}."
        code, message = FAILED, f"the files of a run must exist and be writable, but got{reason}"
    message = redact(f"{job}: {message}" if job else message)
    if _rank() > 0 and not isinstance(error, RanksLost):
        return Outcome(None, FAILED)
    say_error(message)
    return Outcome(_describe_error(type(error).__name__, message), code)


def _describe_error(name: str, message: str) -> dict[str, Any]:
    return {"error": {"class": name, "message": message}}


def _rank() -> int:
    """Returns the rank of this process among the processes that torchrun, srun or Lightning started."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return int(next((rank for rank in ranks if rank), 0))

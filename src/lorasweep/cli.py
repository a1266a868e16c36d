"""The command line: parses what was typed and calls the command. Exit codes are in `outcome.py`.

Each command imports its modules when it is called, so that `--help` and `compare` start in a fraction of a second.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from lorasweep import commands
from lorasweep.commands import Command
from lorasweep.console import say_note
from lorasweep.errors import ConfigError
from lorasweep.outcome import WRONG_REQUEST, Outcome, end
from lorasweep.wording import suggest_nearest

JSON_COMMANDS = ("sweep", "plan", "status", "compare")
"""Commands whose result `--json` prints."""
MAX_MINUTES = 1_000_000
"""Maximum of `--minutes`: about two years."""
FIRST_STEPS = """lorasweep sweep quickstart  a first sweep on texts that come with lorasweep, in 4 to 10 minutes
lorasweep new mine.yaml model.path=FOLDER-OR-HUB-ID data.train=FILE  a sweep file for your model and data
lorasweep help  all commands, sweeps and settings"""
"""What `lorasweep` alone prints."""
FORMS = (
    (r"argument (?:\S+/)?(\S+): (must .*)", r"`\1` \2."),
    (r"argument (?:\S+/)?(\S+): invalid choice: (.*) \(choose from (.*)\)", r"`\1` must be one of \3, but got \2."),
    (r"argument (?:\S+/)?(\S+): invalid (?:int|float) value: (.*)", r"`\1` must be a number, but got \2."),
    (r"argument (?:\S+/)?(\S+): expected .*", r"`\1` must have a value, but has none."),
    (r"argument (?:\S+/)?(\S+): not allowed with argument (?:\S+/)?(\S+)", r"`\1` must be left out with `\2`."),
    (r"the following arguments are required: (.*)", r"`\1` must be given, but is missing."),
    (r"one of the arguments (\S+) (\S+) is required", r"`\1` or `\2` must be given, but both are missing."),
)
"""For each kind of sentence of argparse, a regular expression and our sentence."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    code = run(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C while Python ends would print a traceback
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; prints errors of lorasweep as one line."""
    name = next(iter(arguments), "lorasweep")
    if not arguments:
        say_note(FIRST_STEPS)
        return WRONG_REQUEST
    return end(lambda: _run_command(arguments), name=name, is_json="--json" in arguments and name in JSON_COMMANDS)


def _run_command(arguments: Sequence[str]) -> Outcome:
    parser, name = build_parser(), next(iter(arguments), "-")
    known = parser.get_default("commands")
    if not name.startswith("-") and name not in known:
        raise ConfigError(
            f"`lorasweep` must get a command ({', '.join(known)}), but got {name!r}.{suggest_nearest(name, known)}"
        )
    parsed, others = parser.parse_known_args(arguments)
    if "=" in (getattr(parsed, "resume", None) or ""):  # `--resume arms.lora.trials=20`
        parsed.overrides, parsed.resume = [parsed.resume, *parsed.overrides], ""
    if hasattr(parsed, "overrides") and not any(other.startswith("-") for other in others):
        parsed.overrides = [*parsed.overrides, *others]  # argparse does not take overrides after a flag
    elif others:
        options = sorted({*re.findall(r"--[\w-]+", known.get(name, parser).format_help())} - {"--help"})
        raise ConfigError(
            f"`{others[0]}` must be an option of `lorasweep {name}` ({', '.join(options)}), but is none."
            f"{suggest_nearest(others[0], options)}"
        )
    if parsed.command is commands.sweep and parsed.json and parsed.cfg:
        raise ConfigError("`--json` must be left out with `--cfg`, which has no result.")
    command: Command = parsed.command
    return command(parsed)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lorasweep", description="Finds the LoRA rank, alpha and learning rate for your model and data."
    )
    parser.add_argument("--version", action="version", version=f"lorasweep {version('lorasweep')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)

    def add(command: Command, help: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(command.__name__, help=help, formatter_class=argparse.RawDescriptionHelpFormatter)
        if command.__name__ in JSON_COMMANDS:
            added.add_argument(
                "--json", action="store_true", help="print the result as one JSON object, and nothing else"
            )
        added.set_defaults(command=command)
        return added

    _add_sweep_commands(add)
    _add_training(add(commands.train, "train one run, or a grid of runs with -m; a Hydra app"))
    _add_run_commands(add)
    help_parser = add(commands.help, "explain a setting, a group of settings or a command")
    help_parser.add_argument(
        "name", nargs="?", metavar="KEY|GROUP|COMMAND", help="optim.lr, optim, sweep; none lists all"
    )
    parser.set_defaults(commands=subparsers.choices)
    return parser


def _add_sweep_commands(add: Callable[[Command, str], argparse.ArgumentParser]) -> None:
    sweep_parser = add(commands.sweep, "search every arm of a sweep and write the report")
    _add_overrides(sweep_parser, "NAME|FILE key=value", "default: a sweep for data.train=FILE model.path=...")
    sweep_parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="resume the sweep in this folder, or the newest one in outputs; may add arms.ARM.trials=N, "
        "confirm.seeds=N, worker=ray ...",
    )
    sweep_parser.add_argument(
        "--new", action="store_true", help="begin another sweep beside an unfinished one of the same name"
    )
    sweep_parser.add_argument(*("-c", "--cfg"), choices=["job"], help="print all settings of all arms, train nothing")
    status_parser = add(commands.status, "show the arms of a sweep and the best trial so far")
    newest = "default: the newest sweep in outputs"
    status_parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help=f"folder of the sweep; {newest}")
    new_parser = add(commands.new, "write a commented sweep file for your model and data")
    new_parser.add_argument("file", type=Path, metavar="FILE.yaml", help="the file to write")
    _add_overrides(new_parser, "key=value", "model.path=FOLDER-OR-HUB-ID data.train=FILE ...")
    new_parser.add_argument(
        "--from", dest="source", metavar="HUB-ID", help="a data set of the hub, with all its splits"
    )
    new_parser.add_argument(
        "--like", type=Path, metavar="THEIRS.yaml", help="follow a training file of axolotl, TRL or LLaMA-Factory"
    )
    plan_parser = add(commands.plan, "estimate the time, memory and disk of a sweep without training it")
    _add_overrides(plan_parser, "NAME|FILE key=value", "as in sweep")
    plan_parser.add_argument("--measure", action="store_true", help="measure anew what was measured within a day")
    compare_parser = add(commands.compare, "write and show the report of a sweep again, or compare several sweeps")
    compare_parser.add_argument("folders", type=Path, metavar="DIR", nargs="*", help=f"folder of a sweep; {newest}")
    for shown in (sweep_parser, compare_parser):
        shown.add_argument("--verbose", action="store_true", help="print all notes and findings of the report")
    for timed in (sweep_parser, plan_parser, new_parser):
        timed.add_argument(
            "--minutes",
            type=_read_minutes,
            metavar="N",
            help="fit the sweep to this time, after measuring",
        )


def _read_minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 < (minutes := float(text)) <= MAX_MINUTES:
            return minutes
    raise argparse.ArgumentTypeError(f"must be a number of minutes above 0 and up to {MAX_MINUTES:,}, but got {text!r}")


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


def _add_run_commands(add: Callable[[Command, str], argparse.ArgumentParser]) -> None:
    export_parser = add(commands.export, "write an adapter, a merged model, or settings into another tool's file")
    export_parser.add_argument("--format", required=True, choices=["peft", "merged", *commands.RECIPE_FORMATS])
    places = export_parser.add_mutually_exclusive_group(required=True)
    places.add_argument("--out", type=Path, metavar="D", help="for peft and merged: a new or empty folder")
    places.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="for the others: the tool's file, whose decided lines change",
    )
    export_parser.add_argument(
        "run", type=Path, metavar="SWEEP[/ARM]|RUN", help="folder of a run, or of a sweep for its recommended run"
    )
    export_parser.add_argument(
        "--trust", action="store_true", help="run code that the model's settings name, as commands that train do"
    )
    reproduce_parser = add(commands.reproduce, "train a run again from its record and compare the results")
    reproduce_parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as SWEEP/runs/lora-0003")
    reproduce_parser.add_argument("--tolerance", type=float, metavar="T", help="maximum relative difference")
    reproduce_parser.add_argument("--steps", type=int, metavar="N", help="compare the first N steps only")
    reproduce_parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/reproduce/NAME")


def _add_overrides(parser: argparse.ArgumentParser, metavar: str, help: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=help)
    parser.epilog = "`lorasweep help` lists the groups of settings, and `lorasweep help optim.lr` explains one setting."


class CommandParser(argparse.ArgumentParser):
    """Parses one command, and raises ConfigError for arguments that are wrong."""

    def error(self, message: str) -> NoReturn:
        for pattern, form in FORMS:
            if found := re.fullmatch(pattern, message):
                message = found.expand(form)
        if choices := re.search(r"must be one of (.*), but got '(.*)'", message):
            message += suggest_nearest(choices[2], re.findall(r"[\w-]+", choices[1]))
        raise ConfigError(f"{message} `{self.prog} --help` explains.")

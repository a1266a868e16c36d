"""The command line: parses what was typed, calls the Python API, prints, and turns errors into exit codes.

Exit code 0: done. 2: the request is wrong. 1: it was right but failed. 130: interrupted.
Imports happen on use, so that `--help` and `compare` start in a fraction of a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lorasweep.config.trust import EVERY_PACKAGE, require_trusted, set_trusted, trusted_packages
from lorasweep.console import PlainConsole, say, say_error, threads_leave_file_errors
from lorasweep.errors import ConfigError, LoraSweepError, RanksLost, RecordError
from lorasweep.redaction import redact

if TYPE_CHECKING:
    from lorasweep.results import RunResult, SweepResult

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command that was typed and ends the process with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; an error of ours is one line on standard error."""
    try:
        with threads_leave_file_errors():
            if arguments and arguments[0] == "train":  # a Hydra app, with Hydra's own flags
                return train(_take_trust(arguments[1:]))
            parsed = build_parser().parse_args(arguments)
            if hasattr(parsed, "words"):
                parsed.words = _take_trust(parsed.words)
            elif getattr(parsed, "trust", False):
                set_trusted([EVERY_PACKAGE])
            command: Callable[[argparse.Namespace], int] = parsed.command
            return command(parsed)
    except (LoraSweepError, OSError) as error:
        return _say_exception(error)
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of every command; the arguments of `train` are Hydra's."""
    parser = argparse.ArgumentParser(
        prog="lorasweep", description="Finds the LoRA rank, alpha and learning rate for your model and data."
    )
    parser.add_argument("--version", action="version", version=f"lorasweep {version('lorasweep')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], int], help: str, **more: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(command.__name__, help=help, **more)
        added.set_defaults(command=command)
        return added

    def add_words(to: argparse.ArgumentParser, metavar: str, help: str) -> None:
        words = to.add_argument("words", nargs="*", metavar=metavar, help=help)
        words.completer = complete_words  # type: ignore[attr-defined]  # read by argcomplete

    sweep_parser = add(sweep, "search every arm of a sweep and write the report")
    add_words(sweep_parser, "NAME|FILE key=value", "default: quickstart")
    sweep_parser.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="resume the sweep in this folder; may add confirm.seeds=N, worker=ray, trust=[PACKAGE] ...",
    )
    status_parser = add(status, "a sweep's arms and the best so far")
    status_parser.add_argument("folder", type=Path, metavar="DIR", help="a sweep's folder")
    status_parser.add_argument("--follow", action="store_true", help="show it until the sweep ends, or Ctrl-C")
    train_parser = commands.add_parser("train", help="one run; a Hydra app: --help, --cfg job, -m", add_help=False)
    add_words(train_parser, "key=value", "settings of the run")
    plan_parser = add(plan, "what a sweep would train, and its time, memory and disk")
    add_words(plan_parser, "NAME|FILE key=value", "as in sweep")
    compare_parser = add(compare, "write and show the report again from what is on disk")
    compare_parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of sweeps")
    export_parser = add(export, "a run's adapter for PEFT, or the merged model for transformers")
    export_parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    export_parser.add_argument("--format", required=True, choices=["peft", "merged"])
    export_parser.add_argument("--out", required=True, type=Path, metavar="D", help="a new or empty folder")
    inspect_parser = add(inspect, "what a run's weights say: how much of its rank it used")
    inspect_parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run, or of a sweep: its winners")
    inspect_parser.add_argument("other", type=Path, nargs="?", metavar="OTHER_RUN", help="a run to compare with")
    inspect_parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="what to print")
    inspect_parser.add_argument("--no-scores", action="store_true", help="don't score smaller ranks")
    reproduce_parser = add(reproduce, "run a run or a sweep again from its record and check that it is the same")
    reproduce_parser.add_argument(
        "folder", type=Path, nargs="?", metavar="RUN|SWEEP", help="folder of a run, or of a whole sweep"
    )
    reproduce_parser.add_argument("--trial", metavar="SWEEP/ARM/NUMBER", help="a trial of a sweep instead of RUN")
    reproduce_parser.add_argument("--tolerance", type=float, metavar="T", help="relative difference that still counts")
    reproduce_parser.add_argument("--steps", type=int, metavar="N", help="compare the first N steps only")
    reproduce_parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/reproduce/NAME")
    for reader in (compare_parser, export_parser, inspect_parser, reproduce_parser):
        reader.add_argument("--trust", action="store_true", help="run code and read pickles that the record names")
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


def complete_words(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    """Returns the completions of a word: names of sweeps, keys with `=`, or the options of a group."""
    from lorasweep.config.command_line import complete_override
    from lorasweep.sweep.definition.sweep_file import sweep_files

    is_first = not getattr(parsed_args, "words", None) and getattr(parsed_args, "command", None) in (sweep, plan)
    return [*(sorted(sweep_files()) if is_first and "=" not in prefix else ()), *complete_override(prefix)]


def sweep(arguments: argparse.Namespace) -> int:
    """Starts a sweep, or resumes one, and ends with its report."""
    from lorasweep import api
    from lorasweep.sweep.controller.lifecycle import saved_definition
    from lorasweep.sweep.workers.train import add_jobs

    name, overrides = _split_name(arguments.words)
    changes = api.read_changes(arguments.words) if arguments.resume else {}
    asked = saved_definition(arguments.resume) if arguments.resume else api.read_sweep_definition(name, overrides)
    if (worker := asked.sweep_config.worker).name == "slurm" and worker.dry_run:
        from lorasweep.sweep.workers.slurm import batch_text

        say(batch_text(worker, Path(asked.sweep_config.sweep.output or f"outputs/{asked.name}")).removesuffix("\n"))
        return DONE
    if changes and (added := add_jobs(arguments.resume, changes)) is not None:
        say(f"the sweep runs; more Slurm jobs for it: {' '.join(added) or 'none, it has as many already'}")
        return DONE
    if arguments.resume:
        result = api.resume_sweep(arguments.resume, overrides=changes)
    else:
        result = api.run_sweep(name, overrides=overrides)
    if result.job is not None:
        say(f"led by Slurm job {result.job}, whose output is in {result.folder}/slurm/head. To see the sweep type:")
        say(f"    lorasweep status {result.folder} --follow")
        return DONE
    return _show_reports([result]) if result.status == "complete" else _say_how_to_resume(result)


def status(arguments: argparse.Namespace) -> int:
    """Shows how a sweep stands; never changes it."""
    from lorasweep.sweep.progress import show_until_over
    from lorasweep.sweep.status import read_status, render_status
    from lorasweep.sweep.workers.train import describe_jobs

    console = PlainConsole()
    if arguments.follow:
        with suppress(KeyboardInterrupt):  # looking ends, the sweep goes on
            show_until_over(arguments.folder, console)
    console.print(render_status(read_status(arguments.folder)))
    if jobs := describe_jobs(arguments.folder):
        say(f"Slurm jobs: {jobs}")
    return DONE


def plan(arguments: argparse.Namespace) -> int:
    """Measures a few steps of each arm and shows what the sweep would take; trains nothing and writes nothing."""
    from lorasweep import api
    from lorasweep.sweep.checks import check_definition
    from lorasweep.sweep.definition.plan import plan_sweep, render_plan
    from lorasweep.training.inputs import InputsCache

    api.prepare_environment()
    inputs_cache, definition = InputsCache(), api.read_sweep_definition(*_split_name(arguments.words))
    check_definition(definition, inputs_cache)
    PlainConsole().print(render_plan(definition, plan_sweep(definition, inputs_cache)))
    return DONE


def compare(arguments: argparse.Namespace) -> int:
    """Writes the report of each sweep again and shows it."""
    from lorasweep.report import write_report
    from lorasweep.results import load_sweep

    results = [load_sweep(folder) for folder in arguments.folders]
    for result in results:  # before anything is written
        require_trusted(result.record.definition)
    for result in results:
        write_report(result.folder)
    return _show_reports(results)


def export(arguments: argparse.Namespace) -> int:
    """Writes a run's best weights for another tool, and says how close they are to the run."""
    from lorasweep.runs.export import export_run
    from lorasweep.wording import format_bytes

    written = export_run(arguments.run, format=arguments.format, out=arguments.out)
    say(
        f"{arguments.format}, {format_bytes(written.num_bytes)}: {written.folder}\n"
        f"its logits differ from the run's by at most {written.difference:.2g} (the largest is "
        f"{written.largest_logit:.3g}), both computed in fp32"
    )
    return DONE


def inspect(arguments: argparse.Namespace) -> int:
    """Writes what the weights of a run, or of a sweep's winners, say into `inspect/` and shows it."""
    from lorasweep.record import SWEEP_FILE
    from lorasweep.runs.inspect.formats import as_csv, as_json, render_inspection
    from lorasweep.runs.inspect.inspect_run import inspect_run
    from lorasweep.runs.inspect.inspect_sweep import inspect_sweep

    folder, other, scores = arguments.folder, arguments.other, not arguments.no_scores
    is_sweep = (folder / SWEEP_FILE).is_file()
    if is_sweep and other is not None:
        raise ConfigError(
            f"`OTHER_RUN` must be left out with a sweep, whose winners are compared, but got {str(other)!r}."
        )
    found = inspect_sweep(folder, scores=scores) if is_sweep else inspect_run(folder, other=other, scores=scores)
    if arguments.format == "table":
        PlainConsole().print(render_inspection(found))
    else:
        say((as_json(found) if arguments.format == "json" else as_csv(found)).removesuffix("\n"))
    return DONE


def reproduce(arguments: argparse.Namespace) -> int:
    """Runs a run, a trial or a whole sweep again and says whether it is the same."""
    from lorasweep import api
    from lorasweep.record import SWEEP_FILE
    from lorasweep.results import find_trial
    from lorasweep.runs.reproduce import reproduce_run
    from lorasweep.stop_signal import StopSignal

    if (arguments.folder is None) == (arguments.trial is None):
        raise ConfigError("`lorasweep reproduce` must have a folder or `--trial SWEEP/ARM/NUMBER`, one of them.")
    folder = find_trial(arguments.trial) if arguments.folder is None else arguments.folder
    if (folder / SWEEP_FILE).is_file():
        return _reproduce_sweep(arguments)
    with StopSignal() as stop:
        found = reproduce_run(
            folder,
            output=api.reproduction_folder(folder, arguments.output),
            tolerance=arguments.tolerance,
            steps=arguments.steps,
            trust=arguments.trust,
            stop_requested=stop,
        )
    say(found.describe())
    if found.verdict == "interrupted":
        return INTERRUPTED
    return DONE if found.holds else FAILED


def _reproduce_sweep(arguments: argparse.Namespace) -> int:
    from lorasweep import api

    for name in ("tolerance", "steps"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"`--{name}` must be left out with a sweep, which is compared as a whole.")
    result, compared = api.reproduce_sweep(arguments.folder, output=arguments.output)
    if compared is None:
        return _say_how_to_resume(result)
    say(compared.describe())
    return DONE if compared.holds else FAILED


def train(arguments: Sequence[str]) -> int:
    """Runs one training as a plain Hydra app; `-m` runs a grid."""
    from lorasweep.train_app import run_train_app

    return max(run_train_app(arguments, show=_say_run, refuse=_say_exception), default=DONE)


def _split_name(words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the sweep's name or file, and the overrides behind it."""
    is_named = bool(words) and "=" not in words[0]
    return (words[0], list(words[1:])) if is_named else ("quickstart", list(words))


def _take_trust(words: Sequence[str]) -> list[str]:
    """Trusts packages that the command line names, in this process, and returns the other words."""
    from lorasweep.config.trust import split_trust

    packages, others = split_trust(words)
    set_trusted(packages)
    return others


def _say_run(result: RunResult) -> int:
    from lorasweep.wording import format_share

    if _rank() > 0:  # the first process says it for all of them
        return DONE
    record = result.record
    if record.status == "interrupted":
        say_error(f"{record.reason}; to resume type the same with `output={result.folder} resume=true`")
        return INTERRUPTED
    score = "-" if record.score is None else f"{record.score:.4f}"
    say(
        f"{record.metric} {score} at step {record.best.get('step', 0):.0f} of {record.steps_planned}, "
        f"{record.trainable_params:,} trained parameters ({format_share(record.trainable_fraction)} of the base), "
        f"{record.wall_s:.0f} s: {result.folder}"
    )
    return DONE


def _show_reports(results: Sequence[SweepResult]) -> int:
    """Prints the table of one sweep, or of several side by side, and where their pages are."""
    from lorasweep.report import render_terminal

    console = PlainConsole()
    console.print(render_terminal(*(result.folder for result in results)))
    for result in results:
        console.print(f"report: {result.report}", highlight=False, markup=False, soft_wrap=True)
    return DONE


def _say_how_to_resume(result: SweepResult) -> int:
    record = result.record
    done = sum(row.state not in ("running", "paused") for row in record.trials)
    asked = sum(arm.trials for arm in record.arms)
    ended = sum(row.state != "running" for row in record.confirm)
    confirming = f" and {ended} runs of the confirm stage" if record.confirm else ""
    say_error(f"stopped with {done} of {asked} trials{confirming} done. To resume type:")
    trust = f" 'trust=[{','.join(packages)}]'" if (packages := trusted_packages()) else ""
    say(f"    lorasweep sweep --resume {result.folder}{trust}", file=sys.stderr)
    return INTERRUPTED


def _say_exception(error: LoraSweepError | OSError) -> int:
    """Prints an error as one sentence and returns its exit code.

    Of several processes that train together the first says what all of them end with, and each that it is alone.
    """
    if _rank() > 0 and not isinstance(error, RanksLost):
        return FAILED
    if isinstance(error, LoraSweepError):
        say_error(redact(str(error)))
        return WRONG if isinstance(error, ConfigError | RecordError) else FAILED
    named = f" {str(error.filename)!r}" if error.filename else ""  # a full disk, a folder that is gone or read-only
    say_error(f"the files of a run must be there and writable, but{named}: {error.strerror or error}.")
    return FAILED


def _rank() -> int:
    """Returns the place of this process among those that torchrun, srun or Lightning started with it."""
    found = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return int(next((value for value in found if value), 0))

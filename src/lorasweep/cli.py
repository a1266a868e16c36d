"""The command line: one short function per command, and the place where an error becomes one line and an exit code.

Exit code 0: done. 2: the request is wrong. 1: it was right but failed. 130: interrupted.
Imports happen on use, so that `--help` and `compare` start in a fraction of a second.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.config.named import FLAGS_OF_CODE, package_of
from lorasweep.config.targets import EVERY_PACKAGE, require_trusted, set_trusted, trusted_packages
from lorasweep.console import PlainConsole, say, say_error
from lorasweep.disk import free_folder, is_new_or_empty
from lorasweep.errors import ConfigError, LoraSweepError, RanksLost, RecordError
from lorasweep.redaction import redact

if TYPE_CHECKING:
    from lorasweep.config.run import RunConfig
    from lorasweep.record import RunRecord, SweepRecord
    from lorasweep.sweep.controller.folder import SweepFolder
    from lorasweep.sweep.definition.arms import Definition
    from lorasweep.training.inputs import RunInputs

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
TRUST = "trust"
"""The word of a command line that trusts packages; it is a setting of nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that was typed and ends the process with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; an error of ours is one line on standard error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP's threads wait a moment for the next operation before they sleep: waking them after each costs a fifth of a
    # sweep, and threads that spin without end stall each other on shared cores
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        with _threads_leave_files_to_us():
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
        return _say_error(error)
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of every command but `train`, whose arguments are Hydra's."""
    parser = argparse.ArgumentParser(
        prog="lorasweep", description="Finds the LoRA rank, alpha and learning rate for your model and data."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sweep_parser = commands.add_parser("sweep", help="search every arm of a sweep and write the report")
    sweep_parser.add_argument("words", nargs="*", metavar="NAME|FILE key=value", help="default: quickstart")
    sweep_parser.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="resume the sweep in this folder; may add confirm.seeds=N, worker=ray, trust=[PACKAGE] ...",
    )
    sweep_parser.set_defaults(command=sweep)
    status_parser = commands.add_parser("status", help="a sweep's arms and the best so far")
    status_parser.add_argument("folder", type=Path, metavar="DIR", help="a sweep's folder")
    status_parser.add_argument("--follow", action="store_true", help="show it until the sweep ends, or Ctrl-C")
    status_parser.set_defaults(command=status)
    commands.add_parser("train", help="one run; a Hydra app: --help, --cfg job, -m", add_help=False)
    plan_parser = commands.add_parser("plan", help="what a sweep would train, and its time, memory and disk")
    plan_parser.add_argument("words", nargs="*", metavar="NAME|FILE key=value", help="default: quickstart")
    plan_parser.set_defaults(command=plan)
    compare_parser = commands.add_parser("compare", help="write and show the report again from what is on disk")
    compare_parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of sweeps")
    compare_parser.set_defaults(command=compare)
    export_parser = commands.add_parser("export", help="a run's adapter for PEFT, or the merged model for transformers")
    export_parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    export_parser.add_argument("--format", required=True, choices=["peft", "merged"])
    export_parser.add_argument("--out", required=True, type=Path, metavar="D", help="a new or empty folder")
    export_parser.set_defaults(command=export)
    inspect_parser = commands.add_parser("inspect", help="what a run's weights say: how much of its rank it used")
    inspect_parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run, or of a sweep: its winners")
    inspect_parser.add_argument("other", type=Path, nargs="?", metavar="OTHER_RUN", help="a run to compare with")
    inspect_parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="what to print")
    inspect_parser.add_argument("--no-scores", action="store_true", help="don't score smaller ranks")
    inspect_parser.set_defaults(command=inspect)
    reproduce_parser = commands.add_parser(
        "reproduce", help="run a run or a sweep again from its record and check that it is the same"
    )
    reproduce_parser.add_argument(
        "folder", type=Path, nargs="?", metavar="RUN|SWEEP", help="folder of a run, or of a whole sweep"
    )
    reproduce_parser.add_argument("--trial", metavar="SWEEP/ARM/NUMBER", help="a trial of a sweep instead of RUN")
    reproduce_parser.add_argument("--tolerance", type=float, metavar="T", help="relative difference that still counts")
    reproduce_parser.add_argument("--steps", type=int, metavar="N", help="compare the first N steps only")
    reproduce_parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/reproduce/NAME")
    reproduce_parser.set_defaults(command=reproduce)
    for reader in (compare_parser, export_parser, inspect_parser, reproduce_parser):
        reader.add_argument("--trust", action="store_true", help="run code and read pickles that the record names")
    return parser


def sweep(arguments: argparse.Namespace) -> int:
    """Starts a sweep, or resumes one, and ends with its report."""
    from lorasweep.config.compose import parse_overrides
    from lorasweep.record import read_sweep
    from lorasweep.sweep.controller.lifecycle import saved_definition
    from lorasweep.sweep.workers.train import add_jobs, hand_over
    from lorasweep.training.inputs import InputsCache

    inputs_cache, console = InputsCache(), PlainConsole()
    if arguments.resume:
        _refuse_other_settings(arguments.words)
        definition = saved_definition(arguments.resume)
    else:
        definition = _read_definition(arguments.words)
    if (worker := definition.driver.worker).name == "slurm" and worker.dry_run:
        from lorasweep.sweep.workers.slurm import batch_text

        say(batch_text(worker, Path(definition.driver.sweep.output or f"outputs/{definition.name}")).removesuffix("\n"))
        return DONE
    if arguments.resume and arguments.words:
        added = add_jobs(arguments.resume, parse_overrides(arguments.words))
        if added is not None:
            say(f"the sweep runs; more Slurm jobs for it: {' '.join(added) or 'none, it has as many already'}")
            return DONE
    folder = _resume(arguments, inputs_cache) if arguments.resume else _start(definition, inputs_cache)
    console.print(f"sweep {folder.record.name} in {folder.path}", highlight=False, markup=False, soft_wrap=True)
    for note in folder.record.notes:
        console.print(f"• {note}", highlight=False, markup=False)
    known = _print_warnings(folder.record, console, after=0)
    if (job := hand_over(folder)) is not None:
        say(f"led by Slurm job {job}; what it prints is in {folder.path}/slurm/head. To look at the sweep type:")
        say(f"    lorasweep status {folder.path} --follow")
        return DONE
    complete = _train(folder, inputs_cache, console=console)
    _print_warnings(read_sweep(folder.path), console, after=known)
    if not complete:
        return _say_how_to_resume(folder.path)
    return show_report([folder.path])


def status(arguments: argparse.Namespace) -> int:
    """Shows how a sweep stands; never changes it."""
    from lorasweep.sweep.status import follow, read_status, render_status
    from lorasweep.sweep.workers.train import describe_jobs

    console = PlainConsole()
    now = read_status(arguments.folder)
    if arguments.follow:
        with suppress(KeyboardInterrupt):  # looking ends, the sweep goes on
            follow(lambda: read_status(arguments.folder), console=console)
        now = read_status(arguments.folder)
    console.print(render_status(now))
    if jobs := describe_jobs(arguments.folder):
        say(f"Slurm jobs: {jobs}")
    return DONE


def plan(arguments: argparse.Namespace) -> int:
    """Measures a few steps of each arm and shows what the sweep would take; trains nothing and writes nothing."""
    from lorasweep.sweep.checks import check_definition
    from lorasweep.sweep.definition.plan import plan_sweep, render_plan
    from lorasweep.training.inputs import InputsCache

    inputs_cache = InputsCache()
    definition = _read_definition(arguments.words)
    check_definition(definition, inputs_cache)
    PlainConsole().print(render_plan(definition, plan_sweep(definition, inputs_cache)))
    return DONE


def compare(arguments: argparse.Namespace) -> int:
    """Writes the report of each sweep again and shows it."""
    return show_report(arguments.folders)


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
    from lorasweep.record import SWEEP_FILE
    from lorasweep.runs.reproduce import reproduce_run

    if (arguments.folder is None) == (arguments.trial is None):
        raise ConfigError("`lorasweep reproduce` must have a folder or `--trial SWEEP/ARM/NUMBER`, one of them.")
    if arguments.folder is not None and (arguments.folder / SWEEP_FILE).is_file():
        return _reproduce_sweep(arguments)
    run = arguments.folder if arguments.trial is None else _find_trial(arguments.trial)
    with StopSignal() as stop:
        found = reproduce_run(
            run,
            output=_new_output(arguments.output, Path("outputs") / "reproduce" / run.resolve().name),
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
    """Runs a sweep again with as many threads, and compares proposals, decisions, losses and scores."""
    import torch

    from lorasweep.record import read_sweep
    from lorasweep.runs.reproduce_sweep import compare_sweeps
    from lorasweep.sweep.controller.lifecycle import saved_definition
    from lorasweep.training.inputs import InputsCache

    for name in ("tolerance", "steps"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"`--{name}` must be left out with a sweep, which is compared as a whole.")
    original: Path = arguments.folder
    record, definition = read_sweep(original), saved_definition(original)
    if record.status != "complete":
        raise RecordError(f"a sweep must be complete to be reproduced, but {str(original)!r} is {record.status}.")
    if definition.driver.worker.name != "local":
        raise ConfigError(
            f"a sweep must have had one worker to be reproduced as a whole, but {str(original)!r} had "
            f"`worker={definition.driver.worker.name}`: which result came first decided what was proposed. Reproduce "
            "one of its trials with `--trial SWEEP/ARM/NUMBER`."
        )
    torch.set_num_threads(record.threads or torch.get_num_threads())
    inputs_cache = InputsCache()
    output = _new_output(arguments.output, Path("outputs") / "reproduce" / original.resolve().name)
    folder = _create(definition, inputs_cache, output)
    if not _train(folder, inputs_cache, console=PlainConsole()):
        return _say_how_to_resume(folder.path)
    found = compare_sweeps(original, output)
    say(found.describe())
    return DONE if found.holds else FAILED


def show_report(folders: Sequence[Path]) -> int:
    """Writes the report of each sweep and prints one table of all of them."""
    from lorasweep.record import read_sweep
    from lorasweep.report import render_terminal, write_report

    for folder in folders:  # before anything is written
        require_trusted(read_sweep(folder).definition)
    for folder in folders:
        write_report(folder)
    console = PlainConsole()
    console.print(render_terminal(*folders))
    for folder in folders:
        console.print(f"report: {folder / 'report' / 'index.html'}", highlight=False, markup=False, soft_wrap=True)
    return DONE


def train(arguments: list[str]) -> int:
    """Runs one training as a plain Hydra app; `-m` runs a grid."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from lorasweep.config.build import build
    from lorasweep.config.compose import (
        add_arguments,
        check_command_line,
        compose_values,
        packaged_folder,
        parse_overrides,
        register_search_path,
    )
    from lorasweep.config.run import RunConfig

    check_command_line(arguments)
    register_search_path()
    codes: list[int] = []
    typed, is_grid = sys.argv, bool({"-m", "--multirun"} & set(arguments))

    def task(composed: Any) -> None:
        # as `sweep` composes it, where a class by `_target_` takes the place of what the default option sets
        values = compose_values("train", parse_overrides(HydraConfig.get().overrides.task))
        output, resume = values.pop("output"), bool(values.pop("resume"))
        sys.argv = typed  # Lightning types it again to start other processes
        codes.append(_guarded(lambda: train_once(build(RunConfig, values), output, resume=resume, is_grid=is_grid)))

    sys.argv = ["lorasweep train", *add_arguments(arguments)]
    app = hydra.main(version_base="1.3", config_path=str(packaged_folder("conf").resolve()), config_name="train")
    app(task)()
    return max(codes, default=DONE)


def train_once(config: RunConfig, output: str | None, *, resume: bool, is_grid: bool) -> int:
    """Trains one run in its folder and prints its score; of several processes the first does."""
    from lorasweep.training.inputs import build_inputs
    from lorasweep.training.processes import join_processes, on_first
    from lorasweep.training.restore import require_trusted_code

    if is_grid and config.trainer.wants_processes:
        raise ConfigError(
            "`trainer.devices` must be 1 and `trainer.strategy` auto with `-m`, but got "
            f"{config.trainer.devices!r} and {config.trainer.strategy_name}. Use `lorasweep sweep` instead of a grid."
        )
    require_trusted_code(config)
    with join_processes(config.trainer) as group:
        folder, ended = on_first(group, lambda: _train_folder(output, config, resume=resume))
        if ended is not None:
            return _say_score(ended, folder) if group.is_global_zero else DONE
        with group.rank_zero_first(local=True):  # the others of a node find what it downloads in the node's caches
            inputs = build_inputs(config)
        return _train_in(folder, config, inputs, resume=resume, is_first=group.is_global_zero)


def _train_in(folder: Path, config: RunConfig, inputs: RunInputs, *, resume: bool, is_first: bool) -> int:
    from lorasweep.training.prepare import check_run
    from lorasweep.training.run import train_run
    from lorasweep.training.run_log import RunPlace

    check_run(config, inputs.base)
    for note in inputs.notes if is_first else ():
        say(f"• {note}", file=sys.stderr)
    with StopSignal() as stop:
        record = train_run(config, RunPlace(folder=folder), inputs=inputs, stop_requested=stop, resume=resume)
    if not is_first:  # Lightning ends all processes at once where one that it started ends with an error
        return DONE
    if record.status == "interrupted":
        say_error(f"{record.reason}; to resume type the same with `output={folder} resume=true`")
        return INTERRUPTED
    swept = {"method": config.method.name, "optim.lr": config.optim.lr, "seed": config.seed}
    write_hparams_row(record, folder, swept)
    return _say_score(record, folder)


def _say_score(record: RunRecord, folder: Path) -> int:
    from lorasweep.wording import format_share

    score = "-" if record.score is None else f"{record.score:.4f}"
    say(
        f"{record.metric} {score} at step {record.best.get('step', 0):.0f} of {record.steps_planned}, "
        f"{record.trainable_params:,} trained parameters ({format_share(record.trainable_fraction)} of the base), "
        f"{record.wall_s:.0f} s: {folder}"
    )
    return DONE


def write_hparams_row(record: RunRecord, folder: Path, swept: Mapping[str, Any]) -> None:
    """Writes a run's one row of TensorBoard's HParams tab."""
    from lorasweep.report.board import write_hparams

    if record.score is None:
        return
    measured = {
        f"best/{record.metric}": record.score,
        "trainable_params": float(record.trainable_params),
        "peak_memory_bytes": float(record.peak_memory_bytes),
        "wall_s": record.wall_s,
    }
    if record.metric in record.test:
        measured[f"test/{record.metric}"] = record.test[record.metric]
    write_hparams(folder, swept={"arm": record.arm or record.config["method"]["name"], **swept}, metrics=measured)


class StopSignal:
    """Whether SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 came, to stop at the next step; a second SIGINT ends at once.

    The latter two are what batch systems send before the time of a job is over.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.requested

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def _train(folder: SweepFolder, inputs_cache: Any, *, console: PlainConsole) -> bool:
    """Trains what is left of an open sweep and closes it; returns whether the sweep is complete."""
    from lorasweep.sweep.status import followed
    from lorasweep.sweep.workers.train import train_sweep

    with StopSignal() as stop, followed(folder.path, console=console):
        return train_sweep(folder, inputs_cache, stop_requested=stop, run_ended=write_hparams_row)


def _start(definition: Definition, inputs_cache: Any) -> SweepFolder:
    from lorasweep.sweep.controller.lifecycle import new_folder

    return _create(definition, inputs_cache, new_folder(definition.name, definition.driver.sweep.output))


def _create(definition: Definition, inputs_cache: Any, path: Path) -> SweepFolder:
    from lorasweep.sweep.checks import check_definition, data_notes, sweep_metric
    from lorasweep.sweep.controller.lifecycle import create_sweep
    from lorasweep.sweep.definition.packing import packing_notes
    from lorasweep.sweep.workers.train import check_workers

    for warning in check_workers(definition, path):
        say(f"warning: {warning}")
    configs = check_definition(definition, inputs_cache)
    metric = sweep_metric(configs, inputs_cache)
    notes = [*data_notes(configs, inputs_cache), *packing_notes(definition)]
    return create_sweep(definition, path, configs=configs, metric=metric, notes=notes)


def _read_definition(words: Sequence[str]) -> Definition:
    from lorasweep.sweep.definition.arms import read_definition
    from lorasweep.sweep.definition.sweep_file import find_sweep_file

    named = bool(words) and "=" not in words[0]
    name, overrides = (words[0], words[1:]) if named else ("quickstart", words)
    return read_definition(find_sweep_file(name), overrides)


def _take_trust(words: Sequence[str]) -> list[str]:
    """Trusts what `trust=[PACKAGE]` on a command line names, in this process, and returns the other words.

    Code that is named on the command line is trusted too. No file and no record can do either.
    """
    from lorasweep.config.compose import parse_overrides

    typed = [word for word in words if word.startswith(f"{TRUST}=")]
    given = parse_overrides(typed).get(TRUST, [])
    packages = [str(package) for package in (given if isinstance(given, list) else [given])]
    for package in packages:
        if not package.isidentifier():
            raise ConfigError(
                f"`{TRUST}` must be names of packages, such as `{TRUST}=[optunahub]`, but got {package!r}. "
                "Give the first word of the class's import path."
            )
    others = [word for word in words if word not in typed]
    for key, value in (word.partition("=")[::2] for word in others):
        setting = ".".join(key.split(".")[-2:])  # also of one arm: `arms.NAME.model.factory`
        if setting in ("model.factory", "data.factory"):
            packages.append(package_of(value.strip("'\"")))
        elif setting in FLAGS_OF_CODE and value.lower() == "true":
            packages.append(FLAGS_OF_CODE[setting])
    set_trusted(packages)
    return others


def _refuse_other_settings(words: Sequence[str]) -> None:
    """Makes sure that a sweep that is resumed is given nothing but settings of its workers and its confirm stage."""
    if foreign := [word for word in words if word.split("=")[0].split(".")[0] not in ("confirm", "worker")]:
        raise ConfigError(
            f"`--resume DIR` must stand alone or with settings of `worker` and `confirm`, but got "
            f"{' '.join(foreign)!r} too: a search goes on as it began."
        )


def _resume(arguments: argparse.Namespace, inputs_cache: Any) -> SweepFolder:
    from lorasweep.config.compose import parse_overrides
    from lorasweep.sweep.checks import check_definition
    from lorasweep.sweep.controller.lifecycle import reopen_sweep
    from lorasweep.sweep.workers.train import check_workers

    folder = reopen_sweep(arguments.resume, changes=parse_overrides(arguments.words))
    check_workers(folder.definition, folder.path)
    check_definition(folder.definition, inputs_cache)
    return folder


def _find_trial(given: str) -> Path:
    """The folder of the run of `SWEEP/ARM/NUMBER`; without ARM where the sweep has one arm only."""
    from lorasweep.record import SWEEP_FILE, folder_of_run, read_sweep

    path = Path(given)
    arm = None if (path.parent / SWEEP_FILE).is_file() else path.parent.name
    folder = path.parent if arm is None else path.parent.parent
    record = read_sweep(folder)
    names = [row.name for row in record.arms]
    if arm is None and len(names) == 1:
        arm = names[0]
    for row in record.trials:
        if row.arm == arm and str(row.number) == path.name:
            return folder_of_run(folder, row.run)
    raise ConfigError(
        f"`--trial` must be SWEEP/ARM/NUMBER of a trial that was begun (arms: {', '.join(names)}), but got {given!r}."
    )


def _say_how_to_resume(path: Path) -> int:
    from lorasweep.record import read_sweep

    record = read_sweep(path)
    done = sum(row.state not in ("running", "paused") for row in record.trials)
    asked = sum(arm.trials for arm in record.arms)
    ended = sum(row.state != "running" for row in record.confirm)
    confirming = f" and {ended} runs of the confirm stage" if record.confirm else ""
    say_error(f"stopped with {done} of {asked} trials{confirming} done. To resume type:")
    trust = f" 'trust=[{','.join(packages)}]'" if (packages := trusted_packages()) else ""
    say(f"    lorasweep sweep --resume {path}{trust}", file=sys.stderr)
    return INTERRUPTED


def _print_warnings(record: SweepRecord, console: PlainConsole, *, after: int) -> int:
    """Prints the record's warnings from the given one on, and returns how many there are."""
    for warning in record.warnings[after:]:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    return len(record.warnings)


def _new_output(given: Path | None, default: Path) -> Path:
    """The folder that was asked for, or the default one with the next free number behind it."""
    return free_folder(default) if given is None else _require_new(given, key="--output")


def _require_new(path: Path, *, key: str) -> Path:
    if not is_new_or_empty(path):
        raise ConfigError(
            f"`{key}` must be a new or empty folder, but {str(path)!r} is not. Leave it out for a new one."
        )
    return path


def _train_folder(output: str | None, config: RunConfig, *, resume: bool) -> tuple[Path, RunRecord | None]:
    """The folder of a run; and the record of one that is resumed though it is complete."""
    from lorasweep.record import RUN_FILE, read_run
    from lorasweep.training.restore import check_same_run

    if resume and output is None:
        raise ConfigError("`resume=true` must come with `output=DIR`, the folder of the run, but `output` is null.")
    if output is None:
        number = 1
        while (path := Path("outputs") / "train" / f"{number:04d}").exists():
            number += 1
        return path, None
    path = Path(output)
    if not resume or not (path / RUN_FILE).is_file():
        return _require_new(path, key="output"), None
    record = read_run(path)
    check_same_run(record, config)
    return path, record if record.status == "complete" else None


@contextmanager
def _threads_leave_files_to_us() -> Iterator[None]:
    """Silences threads that can't write: TensorBoard's would print a traceback beside the sentence that we say."""
    before = threading.excepthook

    def quiet(what: threading.ExceptHookArgs) -> None:
        if not issubclass(what.exc_type, OSError):
            before(what)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = before


def _say_error(error: LoraSweepError | OSError) -> int:
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


def _guarded(action: Callable[[], int]) -> int:
    """Runs an action inside Hydra, which would print an error as a traceback of its own."""
    try:
        return action()
    except (LoraSweepError, OSError) as error:
        return _say_error(error)

"""The functions of `new`, `plan`, `sweep`, `train` and `export --into`. Other commands call a module of their own.

A wrong request raises `ConfigError`, a damaged file `RecordError`, any other failure another `LoraSweepError`.
Ctrl-C ends a sweep or a run after the current step, with a checkpoint. A sweep then raises `SweepInterrupted`, which is
a KeyboardInterrupt, so that a script ends; the result of a run has the status `interrupted`. Both can be resumed.

torch, SciPy and what needs them are imported when they are needed, after keys, files and columns were checked.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run, merge_settings
from lorasweep.config.run import RunConfig
from lorasweep.console import say_note
from lorasweep.disk import numbered_folders, take_lock
from lorasweep.errors import ConfigError, SweepInterrupted
from lorasweep.recipes.read import read_recipe
from lorasweep.record import RUN_FILE, SWEEP_FILE, read_run, read_sweep
from lorasweep.results import RunResult, SweepResult, load_run, load_sweep
from lorasweep.training.torch_variables import quick_imports
from lorasweep.wording import format_range

if TYPE_CHECKING:
    from lorasweep.recipes.write import Change
    from lorasweep.sweep.controller.folder import SweepFolder
    from lorasweep.sweep.definition.arms import Definition
    from lorasweep.sweep.plan import SweepPlan
    from lorasweep.sweep.session import NewSweep, OnNote, Progress, Session
    from lorasweep.tasks.examples import Examples

Overrides: TypeAlias = Sequence[str] | Mapping[str, Any]
"""Arguments of the command line (`["optim.lr=1e-3"]`), or dotted keys and values (`{"optim.lr": 1e-3}`)."""
Sweep: TypeAlias = str | Path | Mapping[str, Any] | None
"""Name of a sweep of lorasweep or of the folder `sweeps/`, a YAML file, or the content of a YAML file. None drafts a
sweep for the data of the overrides."""


def _ignore(note: str) -> None: ...


def new_sweep(
    file: str | Path,
    overrides: Overrides = (),
    *,
    like: str | Path | None = None,
    from_hub: str | None = None,
    minutes: float | None = None,
    on_note: OnNote = _ignore,
) -> NewSweep:
    """Reads a model and data, and writes a commented sweep file for them.

    >>> new = lorasweep.new_sweep("mine.yaml", ["model=tiny", "data=stdlib_docs", "data.block_length=32"])
    >>> [arm.name for arm in new.definition.arms]
    ['frozen', 'full', 'lora']

    Args:
        file: The new file, with the suffix `.yaml`.
        overrides: At least the data and the model, unless `from_hub` or `like` names them.
        like: A training file of axolotl, TRL or LLaMA-Factory, whose settings are followed.
        from_hub: A data set of the hub, of which all splits are read.
        minutes: As in `run_sweep`.
        on_note: Called with each sentence on what is done now.

    Raises:
        ConfigError: The request is wrong, or the sweep can't answer anything in this time; nothing was written.
    """
    began_s, path = time.monotonic(), Path(file)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"`FILE.yaml` must have the suffix .yaml, but got {str(path)!r}.")
    if path.exists():
        raise ConfigError(
            f"`FILE.yaml` must be a new file, but {str(path)!r} exists already. Remove it, or name another one."
        )
    if not path.parent.is_dir():
        raise ConfigError(f"the folder of `FILE.yaml` must exist, but {str(path.parent)!r} does not.")
    from lorasweep.sweep.definition.typed import DATA_KEYS, check_typed

    settings, recipe = parse_overrides(overrides), None
    check_typed(settings, needs_data=like is None and from_hub is None)
    if like is not None:
        has_data = from_hub is not None or not DATA_KEYS.isdisjoint(settings)
        recipe = read_recipe(Path(like), has_data=has_data)
    on_note("reads the model and the data; first loads torch, which takes seconds")
    session = _start_session(began_s, on_note)
    return session.write_draft(path, settings, recipe=recipe, from_hub=from_hub, minutes=minutes)


def define_sweep(
    sweep: Sweep = None, *, overrides: Overrides = (), minutes: float | None = None, on_note: OnNote = _ignore
) -> Definition:
    """Returns the settings of all arms of a sweep. Arguments and errors as in `plan_sweep`."""
    session, definition, typed = _define(sweep, overrides, on_note=on_note)
    return definition if minutes is None else session.plan(definition, minutes=minutes, typed=typed).definition


def plan_sweep(
    sweep: Sweep = None,
    *,
    overrides: Overrides = (),
    minutes: float | None = None,
    measure: bool = False,
    on_note: OnNote = _ignore,
) -> SweepPlan:
    """Checks a sweep, measures a few steps of its trainings, and returns its cost. Arguments as in `run_sweep`.

    `on_note` is called with each sentence on what is done now, and on what is given up for `minutes`. Rates are kept
    for a day; `measure` measures them anew.

    >>> lorasweep.plan_sweep("quickstart", overrides=["arms.full=null", "confirm.margin=0.01"]).as_json()["name"]
    'quickstart'

    Raises:
        ConfigError: The sweep can't run as asked, or can't answer anything in this time.
        RunError: A training failed, as it would in the sweep.
    """
    session, definition, typed = _define(sweep, overrides, on_note=on_note, measures=True)
    return session.plan(definition, minutes=minutes, typed=typed, anew=measure)


def run_sweep(
    sweep: Sweep = None,
    *,
    overrides: Overrides = (),
    minutes: float | None = None,
    output: str | Path | None = None,
    new: bool = False,
    progress: Progress = "auto",
) -> SweepResult:
    """Runs a sweep, writes its report, and returns its result.

    >>> arms = {"lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 4]}, "trials": 2}}
    >>> small = ["trainer.max_steps=2", "data.block_length=32", "data.max_validation_blocks=2", "confirm.seeds=0"]
    >>> result = lorasweep.run_sweep({"arms": arms}, overrides=small, progress=None)
    >>> result.status, result.best("lora").state
    ('complete', 'complete')

    Args:
        sweep: Name of a sweep of lorasweep or of the folder `sweeps/`, a YAML file, or the content of a YAML file.
            None drafts a sweep for the data of the overrides.
        overrides: Settings that replace settings of the sweep.
        minutes: The time that the sweep may take on this machine. A few steps are measured, and the sweep is cut.
        output: A new or empty folder; by default `sweep.output`, or `outputs/NAME` with the next free number.
        new: Whether to begin another sweep beside one of the same name in `outputs` that runs or is not complete.
        progress: `auto` and `verbose` show the state of the sweep while it runs, a function receives it, None shows
            nothing.

    Raises:
        ConfigError: The request is wrong; nothing was written.
        SweepInterrupted: Ctrl-C was pressed. The message says how to resume.
        LoraSweepError: The sweep can't continue. Call `resume_sweep` after you have removed the cause.
    """
    on_note = say_note if isinstance(progress, str) else _ignore
    session, definition, typed = _define(sweep, overrides, on_note=on_note, measures=minutes is not None)
    if not new and output is None and definition.sweep_config.sweep.output is None:
        _look_for_others(definition.name, on_note)
    given_up = ""
    if minutes is not None:
        plan = session.plan(definition, minutes=minutes, typed=typed)
        definition, given_up = plan.definition, plan.given_up
    opened = session.open_new(definition, output=output, given_up=given_up)
    return _train(session, opened, progress=progress)


def _look_for_others(name: str, on_note: OnNote) -> None:
    """Says which sweep of this name in `outputs` is complete. Raises ConfigError if the last one is not."""
    folders = [*takewhile(lambda folder: (folder / SWEEP_FILE).exists(), numbered_folders(Path("outputs", name)))]
    if not folders:
        return
    newest, free = load_sweep(folders[-1]), next(one for one in numbered_folders(folders[0]) if not one.exists())
    shown = shlex.quote(str(newest.folder))
    if newest.status == "complete":
        on_note(f"{newest.folder} is complete: `lorasweep compare {shown}` shows it. This sweep goes to {free}.")
        return
    command = "status" if newest.status == "running" else "sweep --resume"
    raise ConfigError(
        f"a sweep of the name {name!r} must be complete before another one begins, but {str(newest.folder)!r} is "
        f"{newest.status}. Type `lorasweep {command} {shown}`, or add `--new` (in Python `new=True`) for another one "
        "beside it."
    )


def resume_sweep(folder: str | Path, *, overrides: Overrides = (), progress: Progress = "auto") -> SweepResult:
    """Continues a sweep to its number of trials, writes its report, and returns its result.

    The sweep may grow: more trials or confirm seeds. Trials that have begun stay as they are.

    >>> result = lorasweep.resume_sweep("outputs/tiny", overrides=["arms.lora.trials=3"], progress=None)
    >>> len(result.trials_dataframe())
    3

    Args:
        folder: The sweep's folder.
        overrides: Changed settings of `worker`, or more trials or seeds, such as `["arms.lora.trials=20"]`.
        progress: As in `run_sweep`.

    Raises:
        ConfigError: A trial that has begun would change; or the data, the model or the user's code has changed.
        RecordError: The folder is not a sweep, is damaged, or another process runs it.
        LoraSweepError: The sweep can't continue.
    """
    # without torch, so that a wrong folder is refused at once, or one that is in use
    record = read_sweep(Path(folder))
    with ExitStack() as undo:
        take_lock(Path(folder), undo)
    if record.status == "complete" and not overrides:  # perhaps it was killed before its report was written
        if isinstance(progress, str):
            say_note(f"{folder} is complete. `sweep.trials=NUMBER` or `confirm.seeds=NUMBER` would train more.")
        return _finish(Path(folder))
    session = _start_session(time.monotonic(), _ignore)
    return _train(session, session.reopen(Path(folder), changes=parse_overrides(overrides)), progress=progress)


def train_run(
    overrides: Overrides | RunConfig = (),
    *,
    from_sweep: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> RunResult:
    """Trains one run and returns its result. If several processes train a run together, each of them calls this.

    >>> run = lorasweep.train_run({"method.rank": 8, "trainer.max_steps": 2, "data.block_length": 32})
    >>> run.status, run.metric, len(run.steps_dataframe())
    ('complete', 'bits_per_byte', 2)

    Args:
        overrides: The settings that differ from the defaults, such as `["method.rank=8", "optim.lr=1e-3"]`, or all
            settings as a `RunConfig`.
        from_sweep: Folder of a complete sweep, whose recommended settings replace the defaults. `SWEEP/NAME` takes
            those of an arm, or of one of its confirmed values.
        output: A new or empty folder; by default the first free one of `outputs/train/0001`, `0002`, ...
        resume: Whether to continue the run in `output`.
        origin: The `origin` in the run's record, if `overrides` is a `RunConfig`.

    Raises:
        ConfigError: The request is wrong.
        RunError: The run diverged or does not fit in memory. Its record has the reason.
    """
    settings: Mapping[str, Any] = {}
    if from_sweep is not None:
        from lorasweep.report.recommend import read_recommended

        settings, origin = read_recommended(Path(from_sweep))
    if isinstance(overrides, RunConfig):
        config = overrides
    else:
        config = compose_run(merge_settings(settings, parse_overrides(overrides)))
    with quick_imports():
        from lorasweep.training.solo_run import train_solo_run

    return load_run(train_solo_run(config, output=output, resume=resume, origin=origin))


def list_examples(overrides: Overrides | RunConfig, *, number: int = 3) -> Examples:
    """Returns the first training examples of a run, with the parts that are scored. Trains nothing.

    >>> lorasweep.list_examples({"data.block_length": 16}, number=1).passages[0][-1][1]
    True

    Raises ConfigError if the request is wrong, or the data has no text.
    """
    config = overrides if isinstance(overrides, RunConfig) else compose_run(parse_overrides(overrides))
    with quick_imports():
        from lorasweep.tasks.examples import read_examples

    return read_examples(config, number=number)


def find_run(source: str | Path) -> tuple[Path, str]:
    """Returns the folder and the name of a run: of `source` itself, or of the recommended run of SWEEP or SWEEP/ARM.

    >>> lorasweep.find_run("outputs/tiny/lora")[0].parent.name
    'runs'

    Of several seeds it is the one with the best score on validation data. Raises ConfigError if the sweep has no such
    arm, and RecordError if the folder is no run and no complete sweep, or nothing is shown to be learned in it.
    """
    source = Path(source)
    if _is_run(source):
        read_run(source)
        return source, source.name
    from lorasweep.report.recommend import find_recommended_run

    return find_recommended_run(source)


@dataclass(frozen=True, kw_only=True)
class RecipeExport:
    """The settings that were written into a training file of another tool."""

    changes: list[Change]
    evidence: str
    """How well the settings are known, in a few words."""


def export_recipe(source: str | Path, file: str | Path, *, tool: str) -> RecipeExport:
    """Writes the settings of SWEEP, SWEEP/ARM or a run into a training file of `axolotl`, `trl` or `llamafactory`.

    Only the lines of the decided keys change, and each gets the evidence for it as a comment.

    Raises:
        ConfigError: The file is of another tool, or trains in another way than the sweep. It stays as it is.
        RecordError: The sweep or the run is not complete, or nothing is shown to be learned.
    """
    from lorasweep.recipes.write import write_recipe
    from lorasweep.report.recommend import load_recommended
    from lorasweep.report.text import describe_evidence

    source, evidence, otherwise = Path(source), dict[str, str](), "one run, compared with no other"
    if _is_run(source):
        run, summary = read_run(source), otherwise
    else:
        data, one, setting = load_recommended(source, key="RUN", methods=("lora", "peft"))
        assert setting.record is not None  # `find_recommended` refuses others
        run, otherwise, summary = setting.record, "as in the run, not searched", describe_evidence(one, data)
        arm = next(row for row in data.record.arms if row.name == one.arm)
        for key in setting.params:
            searched = f"searched in {format_range(arm.space[key])}, {arm.trials} trials"
            evidence[key] = summary if key == arm.key else searched
    changes = write_recipe(Path(file), tool=tool, run=run, evidence=evidence, otherwise=otherwise)
    return RecipeExport(changes=changes, evidence=summary)


def _is_run(folder: Path) -> bool:
    """Returns whether a folder must be a run, because it is neither SWEEP nor SWEEP/ARM."""
    return (folder / RUN_FILE).is_file() or not any((one / SWEEP_FILE).is_file() for one in (folder, folder.parent))


def _define(
    sweep: Sweep, overrides: Overrides, *, on_note: OnNote, measures: bool = False
) -> tuple[Session, Definition, Mapping[str, Any]]:
    """Returns the sweep that is named, or drafted for the data of the overrides, with its session and what was typed.

    Keys, files and columns are checked before torch is loaded.
    """
    from lorasweep.sweep.definition.arms import read_definition
    from lorasweep.sweep.definition.sweep_file import find_sweep_file
    from lorasweep.sweep.definition.typed import check_files, check_sources, check_typed

    began_s, typed, named = time.monotonic(), parse_overrides(overrides), None
    if sweep is None:
        check_typed(typed)
    else:
        check_files(typed)
        named = read_definition(sweep if isinstance(sweep, Mapping) else find_sweep_file(str(sweep)), overrides)
        check_sources(named.arms[0].base, named.arms[0].settings)
    if measures:
        arms = "the drafted sweep" if named is None else f"{named.name} ({', '.join(arm.name for arm in named.arms)})"
        on_note(f"measures a few steps of {arms}; first loads torch, the model and the data")
    elif named is not None and sys.stderr.isatty():
        on_note(f"{named.name}: loads torch, the model and the data")
    session = _start_session(began_s, on_note)
    if named is None:
        from lorasweep.sweep.draft import draft_definition

        named = draft_definition(typed, session.inputs_cache, on_note=on_note)
    return session, named, typed


def _start_session(began_s: float, on_note: OnNote) -> Session:
    with quick_imports():
        from lorasweep.sweep.session import Session

    return Session(began_s=began_s, on_note=on_note)


def _train(session: Session, opened: SweepFolder, *, progress: Progress) -> SweepResult:
    folder = opened.path
    if not session.train(opened, progress=progress):
        raise SweepInterrupted(f"To resume the sweep call `lorasweep.resume_sweep({str(folder)!r})`", folder=folder)
    return _finish(folder)


def _finish(folder: Path) -> SweepResult:
    """Writes the report of a complete sweep and returns its result."""
    from lorasweep.report.write import write_report

    result = load_sweep(folder)
    write_report(result.findings)
    return result

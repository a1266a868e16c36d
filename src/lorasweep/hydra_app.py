"""`lorasweep train` as a Hydra app: one run, or a grid (`-m`) whose jobs Hydra's sweepers and launchers start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from omegaconf import DictConfig

from lorasweep.config import compose
from lorasweep.config.command_line import add_double_plus, describe_job, parse_overrides
from lorasweep.config.redaction import redact
from lorasweep.config.run import RunConfig
from lorasweep.console import say_error
from lorasweep.errors import INTERRUPTED_EXIT_CODE, LoraSweepError
from lorasweep.outcome import DONE, Outcome, end_with_error


class Job(NamedTuple):
    """A composed run. `name` has its overrides in a grid, and is empty for a single run."""

    name: str
    config: RunConfig
    typed: Mapping[str, Any]  # values by dotted key that were typed, or that a sweep recommends
    values: Mapping[str, Any]  # all settings, with `output` and `resume`


class JobError(Exception):
    """A job of a grid failed. The arguments are its exit code, its error as a sentence, and its process id."""


def run_hydra_app(
    words: Sequence[str],
    run_job: Callable[[Job], Outcome],
    *,
    settings: Mapping[str, Any],
    is_grid: bool,
    require_all: bool,
) -> int:
    """Calls `run_job` for the run, or for each job of a grid, perhaps in other processes. Returns the exit code.

    `settings` replace defaults, and `words` win over them. The content of an outcome is a `RunResult` or None.
    Raises ConfigError if a word is no override or Hydra refuses it. The error of a single run is raised too.
    """
    typed = parse_overrides(words)
    compose.refuse_secrets(typed)  # because Hydra prints the overrides of a job that fails
    options = compose.choose_options("train", compose.merge_settings(settings, typed))
    all_words = [option for option in options if option.partition("=")[0] not in typed] + add_double_plus(words)
    argv, codes, errors = sys.argv, [DONE], list[Exception]()

    def run(composed: DictConfig) -> float | None:
        sys.argv = argv  # Lightning starts other processes with this command line
        own = HydraConfig.get().overrides.task
        name = redact(describe_job(own, all_words)) if is_grid else ""
        try:
            layers = compose.merge_settings(settings, parse_overrides(own))
            values = compose.apply_settings("train", composed, layers, require_all=require_all)
            outcome = run_job(Job(name, compose.build_run(values), layers, values))
            reason = outcome.content.record.reason if outcome.content else None
        except (LoraSweepError, OSError) as error:
            if not is_grid:
                errors.append(error)  # raised below, because Hydra would print a line for it
                return None
            outcome, reason = end_with_error(error, name), str(error)
        if outcome.code and is_grid:
            if outcome.code == INTERRUPTED_EXIT_CODE:  # ends the grid
                raise KeyboardInterrupt
            raise JobError(outcome.code, reason, os.getpid())
        codes.append(outcome.code)
        # an optimizing sweeper reads the score
        return outcome.content.record.score if outcome.content and not outcome.code else None

    compose.register_search_path()
    conf = str(compose.packaged_folder("conf").resolve())
    app = hydra.main(version_base="1.3", config_path=conf, config_name="train")(run)
    sys.argv = ["lorasweep train", *(["--multirun"] if is_grid else []), *all_words]
    try:  # with this variable Hydra raises errors instead of printing them
        with compose.one_line_errors(), env_override({"HYDRA_FULL_ERROR": "1"}):
            app()
    except JobError as error:
        if error.args[2] != os.getpid():  # the job's process printed the error, perhaps into a file
            say_error(f"a job failed: {error.args[1]}")
        codes.append(error.args[0])
    finally:
        sys.argv = argv
    if errors:
        raise errors[0]
    return max(codes)

"""Scores a confirmed run by lm-evaluation-harness (`confirm.harness`), beside its score on test data."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lorasweep.config.sweep import HarnessConfig
from lorasweep.config.trust import is_trusted
from lorasweep.errors import ConfigError, RunError, describe_error
from lorasweep.fixed_seed import fixed_seed
from lorasweep.models.load import BaseModel
from lorasweep.record import RunRecord, read_run, write_record
from lorasweep.training.environment import get_device
from lorasweep.training.failures import convert_memory_errors
from lorasweep.training.inputs import RunInputs
from lorasweep.training.restore import restore_config, restore_model

PACKAGE = "lm_eval"
FEWSHOT_SEED = 1234
"""Seed of the examples that are shown before each question: the harness's own default."""


def check_harness(harness: HarnessConfig, base: BaseModel) -> None:
    """Raises ConfigError if the harness can't score this base model, or a task can't be loaded.

    Loading a task reads its data, so that missing data is found before hours of training.
    """
    if find_spec(PACKAGE) is None:
        raise ConfigError(
            "`confirm.harness` needs the package 'lm-eval', which is not installed. "
            "Run `pip install 'lorasweep[lm-eval]'`."
        )
    if harness.include_path is not None and not is_trusted(PACKAGE):
        raise ConfigError(
            "`confirm.harness.include_path` must be a folder that you trust, because a task's file can run code, but "
            f"got {harness.include_path!r}. If you know it, add `trust=[{PACKAGE}]` to the command line."
        )
    if base.kind != "causal_lm" or base.tokenizer is None or not isinstance(base.model, PreTrainedModel):
        raise ConfigError(
            "`confirm.harness.tasks` must be empty unless the base is a causal model of transformers with a tokenizer, "
            f"but got {list(harness.tasks)} with `model.kind={base.kind}`."
        )
    _load_tasks(harness)


def score_by_harness(folder: Path, *, harness: HarnessConfig, inputs: RunInputs) -> RunRecord:
    """Scores a run's best weights on the tasks, and returns the updated record. Skips a run that has these scores.

    Raises:
        RunError: A task failed.
        OutOfMemory: The evaluation does not fit into memory.
    """
    record = read_run(folder)
    if record.harness:
        return record
    config = restore_config(record)
    model: Any = restore_model(config, inputs.whole_base(config), folder=folder / "best")
    model.to(get_device(config.trainer)).eval()
    with convert_memory_errors(), inputs.telemetry.phase("evaluating"), inputs.autocast(config):
        results = _evaluate(model, harness, inputs=inputs, batch_size=config.trainer.eval_batch_size)
    model.cpu()
    record.harness = _list_scores(results)
    record.packages[PACKAGE] = version(PACKAGE)
    write_record(record, folder)
    return record


def _evaluate(model: Any, harness: HarnessConfig, *, inputs: RunInputs, batch_size: int) -> Mapping[str, Any]:
    from lm_eval import evaluate  # noqa: PLC0415 (optional)
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 (optional)

    tasks = _load_tasks(harness)
    for task in tasks["tasks"].values():
        # as `simple_evaluate` does, which would also collect facts about the machine with other programs
        own_number = task.get_config("num_fewshot")
        if own_number is None or (own_number and harness.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=harness.num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        with _silence(), fixed_seed():
            wrapped = HFLM(pretrained=model, tokenizer=inputs.base.tokenizer, batch_size=batch_size)
            found = evaluate(lm=wrapped, task_dict=tasks, limit=harness.limit, log_samples=False, bootstrap_iters=0)
    except Exception as error:
        if "out of memory" in str(error):
            raise
        raise RunError(
            f"lm-evaluation-harness must score {list(harness.tasks)}, but: {describe_error(error)}."
        ) from error
    results: Mapping[str, Any] = found["results"]
    return results


def _load_tasks(harness: HarnessConfig) -> Any:
    """Returns the tasks as `lm_eval.evaluate` takes them. Tasks of `include_path` are found first.

    Raises:
        ConfigError: A task is unknown, its data can't be read, or it runs code that a model wrote.
    """
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (optional)

    try:
        with _silence():
            manager = TaskManager(include_path=harness.include_path, include_defaults=harness.include_path is None)
            if not set(harness.tasks) <= set(manager.all_tasks):  # reading the thousands of default tasks takes longer
                manager = TaskManager(include_path=harness.include_path)
            tasks = manager.load(list(harness.tasks))
    except Exception as error:  # the files and the data are the user's
        raise ConfigError(
            "`confirm.harness.tasks` must be tasks that lm-evaluation-harness can load, but got "
            f"{list(harness.tasks)}: {describe_error(error)}."
        ) from error
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"`confirm.harness.tasks` must not run code that a model wrote, but {name!r} does. Remove it."
            )
    return tasks


def _list_scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the scores as `TASK/METRIC`; `none`, the harness's name of no filter, is left out of the name."""
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if "," in name and isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextmanager
def _silence() -> Iterator[None]:
    """Hides progress bars and log lines of the harness."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)

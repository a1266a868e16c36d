"""lorasweep finds, for a model and data, which LoRA rank, α and learning rate to use, and whether LoRA is enough.

    result = lorasweep.run_sweep("quickstart", overrides=["trainer.max_steps=60"])
    result.best("lora").params, result.trials_dataframe(), result.study("lora")

Each command has a function. `TrainingModule` and `DataModule` are for your own Trainer. Each name is imported when it
is first used, because torch is slow to import.
"""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorasweep.training.torch_variables import set_torch_variables

if TYPE_CHECKING:
    from lorasweep.api import (
        export_recipe,
        find_run,
        list_examples,
        new_sweep,
        plan_sweep,
        resume_sweep,
        run_sweep,
        train_run,
    )
    from lorasweep.record import Trial
    from lorasweep.report.comparison import compare_sweeps
    from lorasweep.report.write import write_report
    from lorasweep.results import RunResult, SweepResult, load_run, load_sweep
    from lorasweep.runs.export import export_run
    from lorasweep.runs.reproduce import reproduce_run
    from lorasweep.sweep.status import read_status
    from lorasweep.training.data_module import DataModule
    from lorasweep.training.module import TrainingModule
    from lorasweep.training.own_module import record_scores

__all__ = [
    "DataModule",
    "RunResult",
    "SweepResult",
    "TrainingModule",
    "Trial",
    "compare_sweeps",
    "export_recipe",
    "export_run",
    "find_run",
    "list_examples",
    "load_run",
    "load_sweep",
    "new_sweep",
    "plan_sweep",
    "read_status",
    "record_scores",
    "reproduce_run",
    "resume_sweep",
    "run_sweep",
    "train_run",
    "write_report",
]

set_torch_variables()  # here, because every entry (command, Python, Ray) imports this file before torch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# PEFT imports bitsandbytes if it is installed, which then warns that it has no fast code for processors
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_NAMES = {
    "api": "export_recipe find_run list_examples new_sweep plan_sweep resume_sweep run_sweep train_run",
    "record": "Trial",
    "report.comparison": "compare_sweeps",
    "report.write": "write_report",
    "results": "RunResult SweepResult load_run load_sweep",
    "runs.export": "export_run",
    "runs.reproduce": "reproduce_run",
    "sweep.status": "read_status",
    "training.data_module": "DataModule",
    "training.module": "TrainingModule",
    "training.own_module": "record_scores",
}
"""The public names of each module."""
_MODULES = {name: f"lorasweep.{module}" for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 (rarely needed)

        return version("lorasweep")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Lists the public names, also before their first use."""
    return __all__

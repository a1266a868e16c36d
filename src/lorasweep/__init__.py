"""lorasweep finds, for a model and data, which LoRA rank, α and learning rate to use, and whether LoRA is enough.

    result = lorasweep.run_sweep("quickstart", overrides=["trainer.max_steps=60"])
    result.best("lora").params, result.trials_dataframe(), result.study("lora")

`run_sweep`, `resume_sweep` and `train_run` train; `load_sweep`, `load_run` and `inspect_run` read
a folder. `TrainingModule` and
`DataModule` are for your own Trainer. Each name is imported when it is first used, because torch is slow to import.
"""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorasweep.training.torch_variables import set_torch_variables

if TYPE_CHECKING:
    from lorasweep.api import resume_sweep, run_sweep, train_run
    from lorasweep.record import Trial
    from lorasweep.report.judge import judge
    from lorasweep.results import RunResult, SweepResult, load_run, load_sweep
    from lorasweep.runs.inspect import inspect_run
    from lorasweep.training.data_module import DataModule
    from lorasweep.training.module import TrainingModule
    from lorasweep.training.own_module import record_scores

__all__ = [
    "DataModule",
    "RunResult",
    "SweepResult",
    "TrainingModule",
    "Trial",
    "inspect_run",
    "judge",
    "load_run",
    "load_sweep",
    "record_scores",
    "resume_sweep",
    "run_sweep",
    "train_run",
]

set_torch_variables()  # here, because every entry (command, Python, Ray) imports this file before torch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# PEFT imports bitsandbytes if it is installed, which then warns that it has no fast code for processors
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_MODULES = {
    **dict.fromkeys(("resume_sweep", "run_sweep", "train_run"), "lorasweep.api"),
    **dict.fromkeys(("RunResult", "SweepResult", "load_run", "load_sweep"), "lorasweep.results"),
    "DataModule": "lorasweep.training.data_module",
    "TrainingModule": "lorasweep.training.module",
    "Trial": "lorasweep.record",
    "record_scores": "lorasweep.training.own_module",
    "inspect_run": "lorasweep.runs.inspect",
    "judge": "lorasweep.report.judge",
}
"""The module of each public name."""


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

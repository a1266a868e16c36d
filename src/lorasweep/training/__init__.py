"""One training: from settings, base model and data to a folder with a record, step metrics and the weights it kept."""

from lorasweep.training.environment import resolve_precision
from lorasweep.training.run import build_workbench, train_run
from lorasweep.training.run_log import RunPlace, Workbench

__all__ = ["RunPlace", "Workbench", "build_workbench", "resolve_precision", "train_run"]

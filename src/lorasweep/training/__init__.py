"""One training: from settings, base model and data to a folder with a record, step metrics and the weights it kept."""

from lorasweep.training.cost import choose_pack_size, measure_pack_sizes, measure_run
from lorasweep.training.environment import describe_code, describe_packages, name_device, resolve_precision
from lorasweep.training.evaluate import Scored, evaluate_model
from lorasweep.training.export import Export, ExportFormat, export_run
from lorasweep.training.pack import train_pack
from lorasweep.training.reproduce import Reproduction, reproduce_run
from lorasweep.training.restore import restore_base, restore_config, restore_model
from lorasweep.training.run import check_run, train_run
from lorasweep.training.run_log import RunPlace
from lorasweep.training.score import score_run
from lorasweep.training.slots import Job
from lorasweep.training.telemetry import Telemetry
from lorasweep.training.workbench import Benches, Workbench, build_workbench

__all__ = [
    "Benches",
    "Export",
    "ExportFormat",
    "Job",
    "Reproduction",
    "RunPlace",
    "Scored",
    "Telemetry",
    "Workbench",
    "build_workbench",
    "check_run",
    "choose_pack_size",
    "describe_code",
    "describe_packages",
    "evaluate_model",
    "export_run",
    "measure_pack_sizes",
    "measure_run",
    "name_device",
    "reproduce_run",
    "resolve_precision",
    "restore_base",
    "restore_config",
    "restore_model",
    "score_run",
    "train_pack",
    "train_run",
]

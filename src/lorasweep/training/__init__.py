"""One training: from settings, base model and data to a folder with a record, step metrics and the weights it kept."""

from lorasweep.training.checkpoint import remove_checkpoints
from lorasweep.training.cost import measure_pack, measure_run
from lorasweep.training.environment import describe_code, describe_packages, name_device, resolve_precision
from lorasweep.training.evaluate import Scored, evaluate_model
from lorasweep.training.export import Export, ExportFormat, export_run
from lorasweep.training.pack import train_pack
from lorasweep.training.pack_size import PackSize, choose_pack_size
from lorasweep.training.pack_state import PackState, SlotState, read_pack_state, write_pack_state
from lorasweep.training.prepare import check_run
from lorasweep.training.processes import join_processes, on_first
from lorasweep.training.reproduce import Reproduction, reproduce_run
from lorasweep.training.restore import check_same_run, restore_base, restore_config, restore_model
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunPlace, end_paused_run
from lorasweep.training.score import score_run
from lorasweep.training.slots import Evaluated, Job, OnEvaluation
from lorasweep.training.telemetry import Telemetry
from lorasweep.training.workbench import Benches, Workbench, build_workbench

__all__ = [
    "Benches",
    "Evaluated",
    "Export",
    "ExportFormat",
    "Job",
    "OnEvaluation",
    "PackSize",
    "PackState",
    "Reproduction",
    "RunPlace",
    "Scored",
    "SlotState",
    "Telemetry",
    "Workbench",
    "build_workbench",
    "check_run",
    "check_same_run",
    "choose_pack_size",
    "describe_code",
    "describe_packages",
    "end_paused_run",
    "evaluate_model",
    "export_run",
    "join_processes",
    "measure_pack",
    "measure_run",
    "name_device",
    "on_first",
    "read_pack_state",
    "remove_checkpoints",
    "reproduce_run",
    "resolve_precision",
    "restore_base",
    "restore_config",
    "restore_model",
    "score_run",
    "train_pack",
    "train_run",
    "write_pack_state",
]

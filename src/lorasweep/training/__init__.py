"""One training: from settings, base model and data to a folder with a record, step metrics and the weights it kept."""

from lorasweep.training.cost import measure_pack, measure_run
from lorasweep.training.environment import describe_code, describe_packages, name_device, resolve_precision
from lorasweep.training.evaluate import Scored, evaluate_model
from lorasweep.training.export import Export, ExportFormat, export_run
from lorasweep.training.follow import follow_runs, lead_run, release_followers, share_bench
from lorasweep.training.pack import train_pack
from lorasweep.training.pack_size import PackSize, choose_pack_size
from lorasweep.training.pack_state import PackState, SlotState, read_pack_state, write_pack_state
from lorasweep.training.ranks import Ranks, current_ranks, join_ranks, wants_ranks
from lorasweep.training.reproduce import Reproduction, reproduce_run
from lorasweep.training.restore import restore_base, restore_config, restore_model
from lorasweep.training.run import check_run, train_run
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
    "Ranks",
    "Reproduction",
    "RunPlace",
    "Scored",
    "SlotState",
    "Telemetry",
    "Workbench",
    "build_workbench",
    "check_run",
    "choose_pack_size",
    "current_ranks",
    "describe_code",
    "describe_packages",
    "end_paused_run",
    "evaluate_model",
    "export_run",
    "follow_runs",
    "join_ranks",
    "lead_run",
    "measure_pack",
    "measure_run",
    "name_device",
    "read_pack_state",
    "release_followers",
    "reproduce_run",
    "resolve_precision",
    "restore_base",
    "restore_config",
    "restore_model",
    "score_run",
    "share_bench",
    "train_pack",
    "train_run",
    "wants_ranks",
    "write_pack_state",
]

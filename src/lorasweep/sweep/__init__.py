"""Many runs: which trials a sweep has, who proposes them, and the loop that asks, trains and tells, stage by stage."""

from lorasweep.sweep.confirm import draw_seeds
from lorasweep.sweep.definition import Arm, Definition, read_definition
from lorasweep.sweep.driver import Worker, check_definition, data_notes, sweep_metric
from lorasweep.sweep.fairness import find_warnings
from lorasweep.sweep.folder import SweepFolder
from lorasweep.sweep.launch import count_workers, start_workers, watch_workers, why_ended
from lorasweep.sweep.live import LiveTable, render_plan
from lorasweep.sweep.opening import create_sweep, join_sweep, new_folder, reopen_sweep, saved_definition
from lorasweep.sweep.plan import ArmPlan, plan_sweep
from lorasweep.sweep.status import SweepStatus, read_status
from lorasweep.sweep.sweep_file import find_sweep_file
from lorasweep.sweep.trials import Observer
from lorasweep.sweep.watch import follow, render_status, watching

__all__ = [
    "Arm",
    "ArmPlan",
    "Definition",
    "LiveTable",
    "Observer",
    "SweepFolder",
    "SweepStatus",
    "Worker",
    "check_definition",
    "count_workers",
    "create_sweep",
    "data_notes",
    "draw_seeds",
    "find_sweep_file",
    "find_warnings",
    "follow",
    "join_sweep",
    "new_folder",
    "plan_sweep",
    "read_definition",
    "read_status",
    "render_plan",
    "render_status",
    "reopen_sweep",
    "saved_definition",
    "start_workers",
    "sweep_metric",
    "watch_workers",
    "watching",
    "why_ended",
]

"""Many runs: what a sweep is, the controller that owns its trials, and the worker that trains them, stage by stage."""

from lorasweep.sweep.checks import check_definition, data_notes, sweep_metric
from lorasweep.sweep.controller.confirm import draw_seeds
from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.lifecycle import create_sweep, new_folder, reopen_sweep, saved_definition
from lorasweep.sweep.definition import Arm, Definition, read_definition
from lorasweep.sweep.fairness import find_warnings
from lorasweep.sweep.packing import packing_notes
from lorasweep.sweep.plan import ArmPlan, plan_sweep, render_plan
from lorasweep.sweep.reproduce import compare_sweeps
from lorasweep.sweep.status import SweepStatus, follow, followed, read_status, render_status
from lorasweep.sweep.sweep_file import find_sweep_file
from lorasweep.sweep.workers.train import add_jobs, check_workers, describe_jobs, hand_over, train_sweep

__all__ = [
    "Arm",
    "ArmPlan",
    "Controller",
    "Definition",
    "SweepFolder",
    "SweepStatus",
    "add_jobs",
    "check_definition",
    "check_workers",
    "compare_sweeps",
    "create_sweep",
    "data_notes",
    "describe_jobs",
    "draw_seeds",
    "find_sweep_file",
    "find_warnings",
    "follow",
    "followed",
    "hand_over",
    "new_folder",
    "packing_notes",
    "plan_sweep",
    "read_definition",
    "read_status",
    "render_plan",
    "render_status",
    "reopen_sweep",
    "saved_definition",
    "sweep_metric",
    "train_sweep",
]

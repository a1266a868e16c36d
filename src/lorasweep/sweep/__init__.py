"""Many runs: which trials a sweep has, who proposes them, and the loop that asks, trains and tells."""

from lorasweep.sweep.definition import Arm, Definition, find_sweep_file, read_definition
from lorasweep.sweep.driver import Benches, Worker, check_definition, sweep_metric
from lorasweep.sweep.folder import SweepFolder, create_sweep, new_folder, reopen_sweep
from lorasweep.sweep.live import LiveTable, render_plan
from lorasweep.sweep.plan import ArmPlan, plan_sweep
from lorasweep.sweep.trials import Observer

__all__ = [
    "Arm",
    "ArmPlan",
    "Benches",
    "Definition",
    "LiveTable",
    "Observer",
    "SweepFolder",
    "Worker",
    "check_definition",
    "create_sweep",
    "find_sweep_file",
    "new_folder",
    "plan_sweep",
    "read_definition",
    "render_plan",
    "reopen_sweep",
    "sweep_metric",
]

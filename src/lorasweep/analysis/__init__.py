"""What a finished run's weights say: spectra and ranks of its change, what a smaller rank scores, shared subspaces.

    from lorasweep.analysis import inspect_run
    inspection = inspect_run(Path("outputs/train/0001"))

`restore` brings a run's model back, `changes` reads ΔW from it, `spectrum`, `subspaces` and `truncation` measure it,
`measure` and `inspection` put the numbers together, `run` and `sweep` do it for one run and for a sweep's winners.
"""

from lorasweep.analysis.inspection import Inspection
from lorasweep.analysis.run import inspect_run
from lorasweep.analysis.sweep import SweepInspection, inspect_sweep
from lorasweep.analysis.terminal import as_csv, as_json, render_inspection

__all__ = [
    "Inspection",
    "SweepInspection",
    "as_csv",
    "as_json",
    "inspect_run",
    "inspect_sweep",
    "render_inspection",
]

import subprocess
import sys
from pathlib import Path

import lorasweep

CODE = """
import gc
from lorasweep.quick_imports import quick_imports
with quick_imports():
    assert not gc.isenabled()
    import torch
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
assert len(gc.get_objects()) < 1_000
"""


def test_no_collection_looks_at_what_was_imported():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={"PYTHONPATH": str(Path(lorasweep.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

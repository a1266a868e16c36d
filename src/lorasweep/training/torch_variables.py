"""Sets variables of OpenMP, oneDNN and malloc before torch is imported, and stops garbage collection during imports."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPIN_COUNT = 4_000
"""Number of times that a waiting thread looks for work before it sleeps, if every thread has its own core. How long a
look takes depends on the processor: 29 to 50 nanoseconds on a Xeon.

With 0, each operation must wake the threads: on idle cores a step of a pack took 1.1 to 1.2 times as long. On an EPYC a
step took 1.27 times as long with 1,000 as with 4,000. Beside a process that spins, a step on the Xeon took 2.1 times as
long as on idle cores with 4,000, and 3.3 times with 20,000 (benchmarks/MEASURED.md)."""

MAX_CACHED_PRIMITIVES = 256
"""Size of the caches of torch and oneDNN for primitives (prepared matrix products of one shape). With their default,
1,024, bf16 products of rows of different lengths took 0.55 GiB. A missing primitive costs 0.1 to 0.3 ms."""

MALLOC_LIMITS = {-3: 32 * 1024**2, -1: 256 * 1024**2}
"""Values in bytes of glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (malloc.h, mallopt(3)).

malloc maps each tensor above the first limit anew, and gives free memory above the second back to the system. Both cost
time, because the system clears each page that it maps. The first limit is the largest that glibc chooses by itself.
With these values, an evaluation of `tiny` with 64 sequences a batch took 0.65 of its time, a step of a pack 0.88. A run
begins by giving back all free memory (`memory.reset_peak_memory`)."""


def set_torch_variables() -> None:
    """Sets the variables for this process and its children, and the limits of malloc for this process.

    Values that the user has set stay. Torch reads the variables once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        for parameter, value in MALLOC_LIMITS.items():
            mallopt(parameter, value)
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(MAX_CACHED_PRIMITIVES))
    if "OMP_WAIT_POLICY" in os.environ or os.environ.get("GOMP_SPINCOUNT", str(SPIN_COUNT)) != str(SPIN_COUNT):
        return
    # Other processes train on the same cores if this process has fewer threads than cores, or if it is a worker of Ray
    # (Ray is then imported first). A spinning thread then keeps other threads of its own step from running, and a step
    # took two to three times as long.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    shares_cores = "ray" in sys.modules or (threads.isdecimal() and int(threads) < count_cores())
    os.environ["GOMP_SPINCOUNT"] = "0" if shares_cores else str(SPIN_COUNT)


def count_cores() -> int:
    """Returns the number of processor cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def quick_imports() -> Iterator[None]:
    """Stops garbage collection during the imports of a `with` block. Does nothing if torch is imported already.

    torch, Lightning and transformers make 0.9 million objects, and nearly all of them stay. Python would look at all of
    them again and again: 1.5 s of the 5 s that the imports took. After the block no collection looks at them any more.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

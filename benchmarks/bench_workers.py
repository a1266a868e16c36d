"""How fast many workers of one sweep ask and tell, and whether they ever get in each other's way.

Each worker is a process with its own connections that runs the real loop; only the training is made up and takes no
time, so that all of them are at the storage all the time:

    python benchmarks/bench_workers.py --workers 1 8 64 --trials 1000                # PostgreSQL, started for this
    python benchmarks/bench_workers.py --storage journal --workers 1 8 --trials 400

Prints trials per second, milliseconds (median, 99th percentile) to take a trial and to tell it, trials that were told
twice or by nobody (must be 0), connections that the server saw at most, and a worker's own memory.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

import lorasweep.sweep.driver
from lorasweep.record import RunRecord, read_sweep
from lorasweep.sweep import Worker, create_sweep, join_sweep, read_definition
from lorasweep.sweep.database import URL_VARIABLE
from lorasweep.sweep.trials import Trials
from lorasweep.training import Benches

sys.path.append(str(Path(__file__).parent.parent))
from tests.servers.mariadb import MariaDB
from tests.servers.postgres import Postgres

SPACE = {"method.rank": [1, 2, 4, 8, 16, 32, 64], "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
STEPS = (50, 100, 150)
"""Evaluations of a trial."""


@dataclass
class Served:
    """What one worker did."""

    told: list[int] = field(default_factory=list)
    """Trials by number."""
    take_s: list[float] = field(default_factory=list)
    tell_s: list[float] = field(default_factory=list)
    own_bytes: int = 0
    """Memory that it does not share with the process it was forked from."""
    error: str = ""


class Silent:
    """An observer that hears nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Takes whatever there is to tell."""
        return lambda *_, **__: None


class NoBenches(Benches):
    """No base model and no data: nothing is trained."""

    def of(self, config: Any) -> Any:
        """Nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=["postgresql", "mysql", "journal"], default="postgresql")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--train-s", type=float, default=0.0, help="seconds that a trial takes")
    parser.add_argument("--max-connections", type=int, default=300, help="of the PostgreSQL that is started")
    asked = parser.parse_args()
    print(
        f"{asked.storage}, {asked.sampler}, {asked.trials} trials of {len(STEPS)} evaluations, {os.cpu_count()} cores"
    )
    print(
        f"{'workers':>7} {'trials/s':>9} {'take ms':>16} {'tell ms':>16} {'wrong':>6} {'connected':>10} {'own_MiB':>8}"
    )
    for num_workers in asked.workers:
        print(measure(num_workers, asked), flush=True)


def measure(num_workers: int, asked: argparse.Namespace) -> str:
    """Returns a row.

    Raises:
        RuntimeError: A worker failed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        count: Callable[[], int] = int
        if asked.storage != "journal":
            server = stack.enter_context(serve_database(asked.storage, asked.max_connections))
            os.environ[URL_VARIABLE] = server.create_database()
            count = server.count_connections if isinstance(server, Postgres) else count
        path = make_sweep(folder, asked)
        began = time.perf_counter()
        served, connections = run_workers(num_workers, path, asked.train_s, count)
        seconds = time.perf_counter() - began
        if failed := [row.error for row in served if row.error]:
            raise RuntimeError(f"{len(failed)} of {num_workers} workers failed: {failed[0]}")
        wrong = count_wrong(path, served, asked.trials)
    takes = [1e3 * value for row in served for value in row.take_s]
    tells = [1e3 * value for row in served for value in row.tell_s]
    own = statistics.median(row.own_bytes for row in served) / 2**20
    return (
        f"{num_workers:>7} {asked.trials / seconds:>9.1f} {spread(takes):>16} {spread(tells):>16} {wrong:>6} "
        f"{connections:>10} {own:>8.0f}"
    )


def run_workers(num_workers: int, path: Path, train_s: float, count: Callable[[], int]) -> tuple[list[Served], int]:
    """Runs a sweep to its end; returns what each worker did, and the most connections that there were at once."""
    context = get_context("fork")  # each starts at once, and only what it writes to is its own
    results = context.Queue()
    processes = [context.Process(target=serve, args=(path, train_s, results)) for _ in range(num_workers)]
    for process in processes:
        process.start()
    served, connections = [], 0
    while len(served) < num_workers:
        try:
            served.append(results.get(timeout=0.3))
        except queue.Empty:
            connections = max(connections, count())
    for process in processes:
        process.join()
    return served, connections


def serve(path: Path, train_s: float, results: Any) -> None:
    """Is one worker."""
    served = Served()
    lorasweep.sweep.driver.train_run = lambda config, place, **others: pretend(place, train_s, **others)
    take, tell = Trials.take, Trials.tell

    def timed_take(self: Trials, arms: Any) -> Any:
        began = time.perf_counter()
        opened = take(self, arms)
        if opened is not None:
            served.take_s.append(time.perf_counter() - began)
        return opened

    def timed_tell(self: Trials, opened: Any, record: RunRecord) -> None:
        began = time.perf_counter()
        tell(self, opened, record)
        served.tell_s.append(time.perf_counter() - began)
        served.told.append(opened.trial.number)

    Trials.take, Trials.tell = timed_take, timed_tell  # type: ignore[method-assign]
    try:
        folder = join_sweep(path)
        with open(os.devnull, "w") as nothing:
            sys.stdout = sys.stderr = nothing
            worker = Worker(
                folder,
                NoBenches(),
                observer=Silent(),
                stop_requested=lambda: False,
                run_ended=lambda record, folder, params: None,
            )
            worker.run()
        folder.close()
    except BaseException as error:
        served.error = repr(error)
    served.own_bytes = own_memory()
    results.put(served)


def pretend(place: Any, train_s: float, *, should_stop: Callable[[int, int, float], bool], **_: Any) -> RunRecord:
    """A run with a made-up curve."""
    scores = [1.6 + 10 / step + (place.trial * 37 % 101) / 100 for step in STEPS]
    for step, score in zip(STEPS, scores, strict=True):
        time.sleep(train_s / len(STEPS))
        should_stop(0, step, score)
    best = {"bits_per_byte": min(scores), "step": STEPS[-1]}
    return RunRecord(status="complete", config={}, metric="bits_per_byte", direction="minimize", best=best)


def count_wrong(path: Path, served: list[Served], asked: int) -> int:
    """Returns how many trials were told by two workers or by none, or are not complete in the record."""
    told = Counter(number for row in served for number in row.told)
    record = read_sweep(path)
    complete = Counter(row.number for row in record.trials if row.state == "complete")
    numbers = set(told) | set(complete) | set(range(asked))
    return sum(told[number] != 1 or complete[number] != 1 for number in numbers) + (record.status != "complete")


def make_sweep(folder: Path, asked: argparse.Namespace) -> Path:
    """Begins a sweep of one arm."""
    arm = {"settings": {"method": "lora"}, "space": SPACE, "trials": asked.trials}
    settings = {"sampler": asked.sampler, "pruner": "none", "confirm.seeds": 0, "worker.pack_size": 1}
    settings["storage"] = asked.storage
    (folder / "many.yaml").write_text(yaml.safe_dump({"name": "many", "settings": settings, "arms": {"lora": arm}}))
    definition = read_definition(folder / "many.yaml", [])
    configs = {arm.name: next(arm.corners()) for arm in definition.arms}
    create_sweep(definition, folder / "sweep", configs=configs, metric="bits_per_byte").close()
    return folder / "sweep"


@contextmanager
def serve_database(kind: str, max_connections: int) -> Iterator[Postgres | MariaDB]:
    """A server of its own for one row."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    server = MariaDB(folder) if kind == "mysql" else Postgres(folder, max_connections=max_connections)
    server.initialise()
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def spread(values: list[float]) -> str:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.0f} ({ordered[int(0.99 * (len(ordered) - 1))]:.0f})"


def own_memory() -> int:
    """Bytes that this process does not share."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(row.split()[1]) for row in rows if row.startswith("Private_"))


if __name__ == "__main__":
    main()

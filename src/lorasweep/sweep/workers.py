"""Who serves a sweep: each worker's file with its heartbeat, and which of the others are gone for good.

DIR/workers/ID.json  written by its worker at each heartbeat; by another one only to say that the worker is lost
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasweep.errors import RecordError, WorkerLost
from lorasweep.record import WorkerRow, read_worker, read_workers, utc_now, worker_file, write_worker

BEATS_PER_LEASE = 4
LONGEST_BEAT_S = 15.0
SHORTEST_BEAT_S = 1.0
"""Between two heartbeats where there is news."""
LONGEST_DELAY_S = 5.0
"""Of a thread that is to wake up; a longer one means that the whole process was stopped."""
MOST_PID = 2**31 - 1
_ID = re.compile(r"[A-Za-z0-9-]{1,100}")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process as others on its machine can find it."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: float

    def is_on_machine_of(self, other: Process) -> bool:
        """Whether both can see each other's process number."""
        return (self.host, self.boot, self.pid_namespace) == (other.host, other.boot, other.pid_namespace)

    def is_dead(self) -> bool:
        """Whether it has ended; asked on its machine."""
        if not 0 < self.pid <= MOST_PID:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        state, started = _state_and_start(self.pid)
        return state in ("Z", "X") or (bool(self.started) and bool(started) and started != self.started)


def process_of(row: WorkerRow) -> Process:
    """Returns the process that a worker's file is of."""
    return Process(
        host=row.host, boot=row.boot, pid_namespace=row.pid_namespace, pid=row.pid, started=row.process_started
    )


def this_process() -> Process:
    """Returns this process as others can find it."""
    return Process(
        host=socket.gethostname(),
        boot=_read("/proc/sys/kernel/random/boot_id"),
        pid_namespace=_link("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=_state_and_start(os.getpid())[1],
    )


class Registration:
    """A worker's own file and the thread that keeps it fresh. A context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        lease_s: float,
        code: str = "",
        packages: str = "",
        device: str = "",
        job: str | None = None,
        measure: Callable[[], dict[str, float]] = dict,
        idle: Callable[[], None] = lambda: None,
        stopped: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Names the worker.

        Args:
            folder: The sweep's.
            lease_s: After so long without a heartbeat others may take the worker for lost.
            code: Version and commit of the code.
            packages: Fingerprint of the packages.
            device: Where it trains.
            job: Its Slurm job.
            measure: Returns the telemetry of the moment; called at each heartbeat by another thread.
            idle: Called at each heartbeat by another thread.
            stopped: Called by another thread with the seconds for which the process was stopped, once it goes on.
        """
        process = this_process()
        name = re.sub(r"[^A-Za-z0-9-]", "-", process.host)[:40] or "host"
        self.row = WorkerRow(
            id=f"{name}-{process.pid}-{secrets.token_hex(3)}",
            host=process.host,
            pid=process.pid,
            boot=process.boot,
            pid_namespace=process.pid_namespace,
            process_started=process.started,
            started_at=utc_now(),
            device=device,
            threads=torch.get_num_threads(),
            code=code,
            packages=packages,
            job=job,
        )
        self.lost = False
        """Whether others said so."""
        self._folder = folder
        self._lease_s, self._written = lease_s, time.monotonic()
        self._beat_s = min(lease_s / BEATS_PER_LEASE, LONGEST_BEAT_S)
        self._measure, self._idle, self._stopped = measure, idle, stopped
        self._ended, self._news = threading.Event(), threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True)

    @property
    def id(self) -> str:
        """Names the worker."""
        return self.row.id

    def __enter__(self) -> Registration:
        """Writes the file and starts the heartbeat."""
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the heartbeat; a worker that `end` was not called for ended by an error."""
        self.end("it ended by an error")

    def end(self, reason: str | None = None) -> None:
        """Says that the worker has ended, so that others can go on with its trials at once; only the first call counts.

        Args:
            reason: Why, where the sweep is not complete.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        self._news.set()
        with suppress(RuntimeError):  # never started
            self._thread.join()
        self.row.status, self.row.reason, self.row.ended_at, self.row.running = "ended", reason, utc_now(), []
        with suppress(OSError):  # the folder is gone
            self._write()

    def check(self) -> None:
        """Makes sure that this worker still owns its trials.

        Raises:
            WorkerLost: Others took it for lost.
        """
        if time.monotonic() - self._written > self._lease_s:  # this process was stopped
            with suppress(OSError):
                self._write()
        if self.lost:
            raise WorkerLost(
                f"a worker must give a sign of life within `worker.lease_s`, but {self.id} did not, so others go on "
                "with its trials. Nothing is lost; to join again type `lorasweep worker DIR`."
            )

    def note_runs(self, *, began: str | None = None, ended: str | None = None) -> None:
        """Notes a run that begins or ended; others read it within a second or so."""
        self.row.running = [name for name in self.row.running if name != ended]
        self.row.running += [] if began is None else [began]
        self.row.done += ended is not None
        self._news.set()

    def _keep_alive(self) -> None:
        pause_s, rested = min(SHORTEST_BEAT_S, self._beat_s / 2), time.monotonic()
        while not self.lost:
            self._wait(self._ended, pause_s)
            self._wait(self._news, self._beat_s - pause_s)
            self._news.clear()
            if self._ended.is_set():
                return
            with suppress(OSError):  # a disk that is full or away for a while
                self._write()
            if time.monotonic() - rested >= self._beat_s - pause_s:
                self._idle()
                rested = time.monotonic()

    def _wait(self, event: threading.Event, seconds: float) -> None:
        began = time.monotonic()
        event.wait(seconds)
        late_s = time.monotonic() - began - seconds
        if late_s > LONGEST_DELAY_S:
            self._stopped(late_s)

    def _write(self) -> None:
        with self._writing:
            if _status(self._folder, self.id) == "lost":
                self.lost = True
                return
            self.row.beat += 1
            self.row.beat_at = utc_now()
            with suppress(Exception):  # numbers to look at must not end the heartbeat
                self.row.telemetry = self._measure()
            write_worker(self.row, self._folder)
            self._written = time.monotonic()


class Colleagues:
    """The other workers of a sweep as one of them sees them."""

    def __init__(self, folder: Path, *, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins to watch.

        Args:
            folder: The sweep's.
            lease_s: A heartbeat that has not moved for so long means that a worker is gone. No clocks of two machines
                are compared: it is the time that passed here since the heartbeat was first seen.
            clock: Seconds that only ever rise.
        """
        self._folder, self._lease_s, self._clock = folder, lease_s, clock
        self._here = this_process()
        self._seen: dict[str, tuple[int, float]] = {}

    def live(self) -> list[WorkerRow]:
        """Returns the workers that are not gone, as far as can be said."""
        return [row for row in read_workers(self._folder) if not self._row_is_gone(row)]

    def is_gone(self, worker: str | None) -> bool:
        """Whether a worker has ended, or gave no sign of life for so long that it counts as lost.

        Args:
            worker: Its id; None, which a trial has whose worker died before it signed, is gone.
        """
        if worker is None:
            return True
        row = self._read(worker)
        return self._has_expired(worker, -1) if row is None else self._row_is_gone(row)

    def say_lost(self, worker: str | None) -> bool:
        """Writes into a worker's file that it is lost, and returns whether it still is gone; within the sweep's lock.

        The worker, should it come back, finds that and writes no more.
        """
        row = None if worker is None else self._read(worker)
        if row is None or row.status != "running":
            return True
        if not self._row_is_gone(row):
            return False
        reason = "it gave no sign of life"
        write_worker(replace(row, status="lost", reason=reason, ended_at=utc_now(), running=[]), self._folder)
        return True

    def _read(self, worker: str) -> WorkerRow | None:
        with suppress(RecordError, OSError):
            return read_worker(worker_file(self._folder, worker)) if _ID.fullmatch(worker) else None
        return None

    def _row_is_gone(self, row: WorkerRow) -> bool:
        if row.status != "running":
            return True
        process = process_of(row)
        if process.is_on_machine_of(self._here) and process.is_dead():
            return True
        return self._has_expired(row.id, row.beat)

    def _has_expired(self, worker: str, beat: int) -> bool:
        now = self._clock()
        known = self._seen.get(worker)
        if known is None or known[0] != beat:
            self._seen[worker] = beat, now
            return False
        return now - known[1] > self._lease_s


def _status(folder: Path, worker: str) -> str | None:
    with suppress(RecordError, OSError):
        return read_worker(worker_file(folder, worker)).status
    return None


def _state_and_start(pid: int) -> tuple[str, float]:
    """State and start (in clock ticks since the boot) of a process, see proc(5); empty and 0 without /proc."""
    stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (stat[0], float(stat[19])) if len(stat) > 19 else ("", 0.0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return platform.node()

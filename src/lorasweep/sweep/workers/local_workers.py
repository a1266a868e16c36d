"""Trains the packs of a sweep in several processes of this machine, each on its share of the processor cores.

Small tensors do not scale over threads, so several processes of one thread train more than one process of several. On
Linux they are forked when base and data are loaded, and share the memory of both. The process of `lorasweep sweep` owns
the controller, answers the calls of the workers through pipes, and trains nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lorasweep.config.sweep import LocalWorker
from lorasweep.record import read_sweep
from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.lifecycle import read_saved_definition
from lorasweep.sweep.cost import count_workers
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.confirm import count_confirm_runs
from lorasweep.sweep.workers.worker import RemoteController, Worker
from lorasweep.training.environment import DTYPES, name_device, resolve_device
from lorasweep.training.inputs import InputsCache
from lorasweep.training.memory import total_memory_bytes
from lorasweep.training.pack_size import MAX_PASS_TOKENS
from lorasweep.training.stop_signal import STOP_SIGNALS

CHECK_INTERVAL_S = 0.5
"""Seconds between two checks for a stop request. Calls and ends of workers are noticed immediately."""
PROCESS_BYTES = 2**29
"""Memory that a process is assumed to need beside weights and activations."""
TRAINED_BYTES = 16
"""Bytes for each weight that trains: in fp32 itself, its gradient and the two moments of Adam."""
ACTIVATION_BYTES = 34
"""Bytes of activations in 16 bits for each token, layer and element of the hidden size (Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", eq. 2, without attention scores)."""


def number_workers(definition: Definition, inputs_cache: InputsCache) -> Definition:
    """Returns the definition with a number for `worker.num=auto` of local workers.

    It depends on the sweep, the cores that torch uses and the machine's memory, not on what the machine does now.
    """
    config = definition.sweep_config.worker
    if not isinstance(config, LocalWorker) or config.num != "auto":
        return definition
    return definition.with_overrides({"worker.num": _choose_number(definition, inputs_cache)})


def _choose_number(definition: Definition, inputs_cache: InputsCache) -> int:
    if any(resolve_device(arm.base.trainer) == "gpu" for arm in definition.arms) or torch.get_num_threads() == 1:
        return 1
    seeds = next(iter(definition.sweep_config.confirm.list_looks()), 0)
    confirm_runs = sum(count_confirm_runs(arm, seeds=seeds) for arm in definition.arms)
    num_runs = max(sum(arm.trials for arm in definition.arms), confirm_runs)
    shared_bytes = needed_bytes = 0
    for arm in definition.arms:
        inputs = inputs_cache.load(arm.base)
        sizes = [(weight.numel(), weight.element_size()) for weight in inputs.base.model.parameters()]
        shared_bytes = max(shared_bytes, sum(number * size for number, size in sizes))
        trains_few = arm.base.method.trains_nothing or arm.base.method.adapter_kind is not None
        trained = 0 if trains_few else TRAINED_BYTES * sum(number for number, _ in sizes)
        shape: Any = getattr(inputs.base.model, "config", None)
        layers, hidden = getattr(shape, "num_hidden_layers", 0), getattr(shape, "hidden_size", 0)
        width = DTYPES[inputs.precision].itemsize / 2
        activations = MAX_PASS_TOKENS["cpu", inputs.precision] * layers * hidden * width * ACTIVATION_BYTES
        needed_bytes = max(needed_bytes, trained + round(activations) + PROCESS_BYTES)
    return max(1, min(torch.get_num_threads(), num_runs, (total_memory_bytes() - shared_bytes) // needed_bytes))


@contextmanager
def limit_threads(definition: Definition) -> Iterator[None]:
    """Lets torch use as many threads inside the block as each local worker of a sweep has."""
    before = torch.get_num_threads()
    if isinstance(definition.sweep_config.worker, LocalWorker):
        torch.set_num_threads(max(1, before // count_workers(definition)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The arguments of a worker's process."""

    name: str
    path: Path
    threads: int
    num_workers: int
    connection: Connection
    stop: ctypes.c_bool
    loaded: tuple[Definition, InputsCache] | None
    """The definition, and the inputs with base and data; None if the worker has to load them."""


@dataclass(kw_only=True, eq=False)
class _Member:
    """One worker, as its parent sees it."""

    name: str
    process: BaseProcess
    connection: Connection


class LocalWorkers:
    """The worker processes of a sweep on this machine. This process answers their calls."""

    def __init__(self, controller: Controller, *, num: int, inputs_cache: InputsCache) -> None:
        """`num` processes share the cores that torch uses now."""
        self._controller, self._num = controller, num
        self._definition = controller.sweep.definition
        self._cache = inputs_cache
        self._threads = max(1, torch.get_num_threads() // num)
        # A forked process must not use a GPU or several threads if its parent did: CUDA refuses, and OpenMP waits
        # forever.
        self._forks = sys.platform == "linux" and self._threads == 1 and not torch.cuda.is_available()
        self._context: Any = multiprocessing.get_context("fork" if self._forks else "spawn")
        self._stop = self._context.RawValue(ctypes.c_bool, False)  # without a lock, which a killed worker could hold
        self._numbers = itertools.count(1)
        self._members: list[_Member] = []

    def train(self, *, stop_requested: Callable[[], bool]) -> None:
        """Trains the remaining trials, or until a stop is requested. Raises errors of the controller and of a worker.

        A worker that dies is replaced if no other is left: it may have died because memory ran out.
        """
        if self._forks:
            self._load()
        try:
            for _ in range(self._num):
                self._start()
            while self._members:
                self._stop.value = bool(stop_requested())
                waited = [part for member in self._members for part in (member.connection, member.process.sentinel)]
                ready = wait(waited, timeout=CHECK_INTERVAL_S)
                for member in list(self._members):
                    if member.connection in ready:
                        self._answer(member)
                    elif member.process.sentinel in ready:  # after the last call was answered
                        self._end(member)
                if not self._members and not self._stop.value and not self._controller.is_over():
                    self._start()
        finally:
            for member in self._members:
                member.process.kill()  # they ignore the signals that stop a sweep
                member.process.join()

    def _load(self) -> None:
        """Loads what the workers share. Scores of a frozen reference are computed here once, by all cores."""
        self._cache.folder = self._controller.sweep.path
        for arm in self._definition.arms:
            self._cache.load(arm.base)

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        start = _Start(
            name=str(next(self._numbers)),
            path=self._controller.sweep.path,
            threads=self._threads,
            num_workers=self._num,
            connection=theirs,
            stop=self._stop,
            loaded=(self._definition, self._cache) if self._forks else None,
        )
        process = self._context.Process(target=_work, args=(start,), name=f"lorasweep worker {start.name}")
        process.start()
        theirs.close()
        self._members.append(_Member(name=start.name, process=process, connection=ours))

    def _answer(self, member: _Member) -> None:
        """Answers one call of a worker. Raises the error that ended the worker, if it sends one."""
        try:
            message = member.connection.recv()
        except (EOFError, OSError):  # it has ended, or died in the middle of a message
            self._end(member)
            return
        if isinstance(message, BaseException):
            raise message
        name, args, kwargs = message
        answer = getattr(self._controller, name)(*args, **kwargs)  # its errors end the sweep, so no worker needs them
        with suppress(OSError):  # the worker died while it waited
            member.connection.send(answer)

    def _end(self, member: _Member) -> None:
        """Forgets a worker that has ended, and releases its pack if it ended before the pack, as with `sys.exit()`."""
        self._members.remove(member)
        member.connection.close()
        member.process.join()  # its files are closed a moment before its exit code is known
        code = member.process.exitcode or 0
        if code or (self._controller.holds_pack(member.name) and not self._stop.value):
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._controller.warn(
                f"A worker process died ({how}); another one continues its pack. If the system killed it because "
                "memory ran out, use a smaller `worker.num`."
            )
            self._controller.release_worker(member.name)


def _work(start: _Start) -> None:
    """Runs a worker in its own process."""
    for number in STOP_SIGNALS:  # a terminal and batch systems signal all processes, and the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    torch.set_num_threads(start.threads)

    def call(name: str, *args: Any, **kwargs: Any) -> Any:
        start.connection.send((name, args, kwargs))
        return start.connection.recv()

    try:
        definition, cache = start.loaded or (read_saved_definition(start.path), InputsCache())
        controller = RemoteController(call)
        controller.note_worker(device=name_device(), threads=start.threads)
        Worker(
            path=start.path,
            definition=definition,
            controller=controller,  # type: ignore[arg-type]
            test_metric=read_sweep(start.path).verdict_metric.name,
            inputs_cache=cache,
            stop_requested=lambda: bool(start.stop.value),
            name=start.name,
            num_workers=start.num_workers,
        ).run()
    except Exception as error:
        start.connection.send(ExceptionWithTraceback(error, error.__traceback__))


def _end_with_parent() -> None:
    """Ends this process when its parent has ended, even in the middle of a step. Checkpoints stay whole."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

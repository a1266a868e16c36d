"""Workers as Ray actors. Ray starts them, places them, notices when one dies, and restarts the controller.

A sweep has three kinds of processes:

- The process in which `lorasweep sweep` was typed asks Ray for workers, and for another one whenever one has died.
- The controller is a named actor. It reads the sweep's journal when it starts, also when Ray restarts it.
- Each worker is an actor that runs the loop of `worker.py`. While the controller restarts, a worker's calls wait, and
  Ray repeats them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from lorasweep.config.run import RunConfig
from lorasweep.config.trust import set_trusted, trusted_packages
from lorasweep.errors import LoraSweepError, RanksLost, WorkerError, first_line
from lorasweep.record import RunRecord, read_sweep
from lorasweep.sweep.controller.controller import Controller, RunEnded
from lorasweep.sweep.controller.lifecycle import reopen_sweep, saved_definition
from lorasweep.sweep.workers.ray_cluster import WorkerNeeds, count_fitting
from lorasweep.sweep.workers.worker import Worker
from lorasweep.training.environment import describe_packages, name_device
from lorasweep.training.inputs import InputsCache
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunPlace

CONTROLLER = "controller"
"""Name of the controller's actor in the sweep's namespace."""
CHECK_INTERVAL_S = 1.0
"""Seconds between two checks for a request to stop and for nodes that joined. A worker that ends is noticed at once."""
PEER_TIMEOUT_S = 10.0
"""Seconds that the other ranks have to end a run after one has ended it, before all ranks begin again."""
STOP_TIMEOUT_S = 10.0
"""Seconds that a worker has to answer the request to stop."""
RESTART_FOREVER = {"max_restarts": -1, "max_task_retries": -1}
"""Ray restarts an actor that died, and makes the calls again whose answers were lost."""


class WorkerRefused(WorkerError):  # noqa: N818 (named by what happened)
    """A worker can't take part, because its runs could not be compared with those of the others."""

    def __init__(self, message: str, node: str) -> None:
        """Takes the reason and the id of the worker's node."""
        super().__init__(message, node)  # Ray pickles an exception by its `args`
        self.node = node

    def __str__(self) -> str:
        """Returns the reason."""
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """The settings of the controller's process that a process on another node takes over."""

    folder: Path
    """The current folder, for relative paths."""
    path: Path
    """The sweep's folder."""
    code: dict[str, str]
    """The versions that code and packages must have."""
    trusted: tuple[str, ...]
    """Packages whose classes settings may name beside the usual ones."""

    def enter(self) -> None:
        """Takes over the settings, once this process sees the same files and has the same code.

        Raises:
            WorkerRefused: It does not.
        """
        node = ray.get_runtime_context().get_node_id()
        if not self.path.is_dir():
            raise WorkerRefused(
                f"every node must see the sweep's folder under the same path, but {str(self.path)!r} is not there on "
                f"node {node[:8]}. Put it on a file system that the nodes share (`sweep.output`).",
                node,
            )
        own = code_versions()
        if differing := [f"{name} {own[name]}, not {self.code[name]}" for name in own if own[name] != self.code[name]]:
            raise WorkerRefused(
                f"every node must have the same code and packages, but node {node[:8]} has {'; '.join(differing)}. "
                "Install the same versions on every node.",
                node,
            )
        set_trusted(self.trusted)
        if self.folder.is_dir():
            os.chdir(self.folder)


@cache
def code_versions() -> dict[str, str]:
    """Returns the versions of packages that can change numbers, and a checksum of this package's code."""
    own = hashlib.sha256()
    for file in sorted(Path(str(files("lorasweep"))).rglob("*.py")):
        own.update(file.read_bytes())
    return {"lorasweep": own.hexdigest()[:16], "python": sys.version.split()[0], **describe_packages()}


class ControllerActor(Controller):
    """The controller of a sweep in a process of its own."""

    def __init__(self, context: WorkerContext, *, session: str, run_ended: RunEnded) -> None:
        """Opens the sweep, whose journal has the work of an earlier process of this session."""
        context.enter()
        super().__init__(reopen_sweep(context.path), run_ended=run_ended, session=session)
        self.save("running")

    def close(self) -> None:
        """Closes the sweep's folder."""
        self.sweep.close()


class ControllerClient:
    """The controller for another process: the same methods."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Returns a method that waits for the controller's answer and raises the controller's errors.

        The method raises `WorkerError` where Ray gave the controller up.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return ray.get(getattr(self._actor, name).remote(*args, **kwargs))
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            except RayActorError as error:
                if isinstance(cause := error.__cause__, LoraSweepError):
                    raise cause from None
                raise WorkerError(
                    f"a sweep's controller must run as long as its workers do, but Ray gave it up: {first_line(error)}"
                ) from error

        return call


@ray.remote(concurrency_groups={"control": 1})
class WorkerActor:
    """One process of a worker. The first one runs the worker's loop, the others train its trials with it."""

    def __init__(self, context: WorkerContext, *, threads: int) -> None:
        self._context = context
        self._stop = threading.Event()
        self._peers: list[Any] = []
        self._inputs_cache = InputsCache()
        torch.set_num_threads(threads)

    def run(self, controller: Any, *, name: str, num_workers: int, peers: Sequence[Any]) -> None:
        """Runs the worker's loop until the sweep is over or the worker is stopped.

        Raises:
            WorkerRefused: One of the worker's processes can't take part.
        """
        self.enter()
        client, path = ControllerClient(controller), self._context.path
        client.note_worker(device=name_device(), threads=torch.get_num_threads())
        self._peers = list(peers)
        try:
            ray.get([peer.enter.remote() for peer in peers])
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except RayError:
            _end_process()
        Worker(
            path=path,
            definition=saved_definition(path),
            controller=client,  # type: ignore[arg-type]
            metric=read_sweep(path).metric,
            inputs_cache=self._inputs_cache,
            stop_requested=self._stop.is_set,
            name=name,
            num_workers=num_workers,
            train_alone=self._train_with_peers if peers else None,
        ).run()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]  # while `run` runs
    def stop(self) -> None:
        """Has the worker stop after its present step."""
        self._stop.set()

    def enter(self) -> None:
        """Checks that this process can take part; raises `WorkerRefused` if not."""
        self._context.enter()

    def train_as_peer(self, config: RunConfig, place: RunPlace, *, resume: bool, ranks: Mapping[str, str]) -> None:
        """Trains a run together with the other ranks, as the rank that the environment variables `ranks` describe."""
        os.environ.update(ranks)
        try:
            train_run(config, place, inputs=self._inputs_cache.load(config), resume=resume)
        except BaseException as error:
            # an error of ours is raised by all ranks; after any other one the others would wait for this process
            if not isinstance(error, LoraSweepError) or isinstance(error, RanksLost):
                _end_process()

    def _train_with_peers(self, config: RunConfig, place: RunPlace, *, resume: bool, **own: Any) -> RunRecord:
        """Trains a run on all ranks. Where one of them was lost, this process ends too, so that all begin again."""
        with socket.socket() as free:  # another port for each run: torch keeps its store, with old values, for a while
            free.bind(("", 0))
            meeting = (ray.util.get_node_ip_address(), free.getsockname()[1])
        size = len(self._peers) + 1
        calls = [
            peer.train_as_peer.remote(config, place, resume=resume, ranks=_rank_variables(rank, size, *meeting))
            for rank, peer in enumerate(self._peers, start=1)
        ]
        ended = threading.Event()
        threading.Thread(target=_end_with_peers, args=(calls, ended), daemon=True).start()
        os.environ.update(_rank_variables(0, size, *meeting))
        try:
            record = train_run(config, place, resume=resume, **own)
            ray.get(calls, timeout=PEER_TIMEOUT_S)
        except (RanksLost, RayError):
            _end_process()
        except Exception:  # the controller must hear of it first, even if another rank died of it too
            with suppress(RayError):
                ray.get(calls, timeout=PEER_TIMEOUT_S)
            raise
        finally:
            ended.set()
        return record


def _rank_variables(rank: int, size: int, address: str, port: int) -> dict[str, str]:
    """Returns the environment variables by which torchrun tells a process its rank.

    Each rank counts as a node of one process, because Ray lets a process see its own GPUs only.
    """
    values = {"RANK": rank, "GROUP_RANK": rank, "WORLD_SIZE": size, "GROUP_WORLD_SIZE": size}
    values |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    texts = {name: str(value) for name, value in values.items()}
    return texts | {"MASTER_ADDR": address, "TORCHELASTIC_RUN_ID": "ray"}


def _end_with_peers(calls: Sequence[Any], ended: threading.Event) -> None:
    """Ends this process where another rank has ended and this one waits for it, as it may under NCCL."""
    ray.wait(list(calls))
    if not ended.wait(PEER_TIMEOUT_S):
        _end_process()


def _end_process() -> NoReturn:
    """Ends a process of a worker whose other processes are gone: the pool replaces the worker. Ray's log has why."""
    traceback.print_exc()
    os._exit(1)


@dataclass(kw_only=True, eq=False)
class _PoolMember:
    """One worker: its processes in Ray's placement group."""

    name: str
    actors: list[Any]
    group: Any

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        ray.util.remove_placement_group(self.group)


class WorkerPool:
    """The workers of a sweep on the Ray cluster that this process is connected to."""

    def __init__(self, path: Path, *, num: int | Literal["auto"], needs: WorkerNeeds, run_ended: RunEnded) -> None:
        """Starts the controller.

        Args:
            path: The sweep's folder, which no process has open. Every node sees it under this path.
            num: How many workers; `auto` takes as many as fit, and more when nodes join.
            needs: The resources of each worker.
            run_ended: As for `Controller`; a function that another process can import.
        """
        self._num = num
        self._needs = needs
        self._context = WorkerContext(
            folder=Path.cwd(), path=path.resolve(), code=code_versions(), trusted=trusted_packages()
        )
        self._session = secrets.token_hex(4)
        self._members: dict[Any, _PoolMember] = {}  # by the reference of the call that runs the worker's loop
        self._numbers = itertools.count(1)
        self._refused: list[WorkerRefused] = []  # the places of workers on these nodes stay empty
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._actor = (
            ray.remote(ControllerActor)
            .options(name=CONTROLLER, num_cpus=0, scheduling_strategy=here, **RESTART_FOREVER)
            .remote(self._context, session=self._session, run_ended=run_ended)
        )
        self._controller = ControllerClient(self._actor)

    def train(self, *, stop_requested: Callable[[], bool], require_nodes: Callable[[], None] = lambda: None) -> bool:
        """Trains the rest of the sweep and returns whether it is complete.

        Args:
            stop_requested: Asked every second whether to stop; each trial then keeps its last checkpoint.
            require_nodes: Called while there is no worker; raises an error if there will be none.

        Raises:
            WorkerError: As for `Worker.run`, or every worker was refused.
        """
        try:
            self._controller.is_over()  # an error while it begins is raised here
            while not stop_requested() and not self._controller.is_over():
                self._start_missing()
                if not self._members:
                    require_nodes()
                self._wait(CHECK_INTERVAL_S)
            self._stop()
            return bool(self._controller.finish())
        finally:
            for member in self._members.values():
                member.kill()
            self._controller.close()
            ray.kill(self._actor)

    def _start_missing(self) -> None:
        """Asks Ray for the workers that are missing. A worker for which there is no room waits until there is."""
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._refused = [refused for refused in self._refused if refused.node in nodes]
        wanted = count_fitting(self._needs) if self._num == "auto" else self._num
        for _ in range(wanted - len(self._members) - len(self._refused)):
            needs, make = self._needs, cast("Any", WorkerActor)
            bundle = {"CPU": needs.cpus} | ({"GPU": needs.gpus} if needs.gpus else {})
            group = ray.util.placement_group([bundle] * needs.processes)
            places = [
                PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
                for rank in range(needs.processes)
            ]
            actors = [
                make.options(num_cpus=needs.cpus, num_gpus=needs.gpus, scheduling_strategy=place).remote(
                    self._context, threads=needs.cpus
                )
                for place in places
            ]
            name = f"{self._session}-{next(self._numbers)}"
            run = actors[0].run.remote(self._actor, name=name, num_workers=wanted, peers=actors[1:])
            self._members[run] = _PoolMember(name=name, actors=actors, group=group)

    def _wait(self, timeout_s: float) -> None:
        """Waits for a worker to end. The trials of one that died are handed out again; `_start_missing` replaces it."""
        if not self._members:
            time.sleep(timeout_s)
            return
        ended, _ = ray.wait(list(self._members), timeout=timeout_s)
        for run in ended:
            member = self._members.pop(run)
            member.kill()
            try:
                ray.get(run)
            except RayTaskError as error:  # the worker's own loop raised
                if not isinstance(error.cause, WorkerRefused):
                    raise (error.cause if isinstance(error.cause, LoraSweepError) else error) from None
                self._refused.append(error.cause)
                self._controller.warn(str(error.cause))
                if not self._members:
                    raise error.cause from None
            except RayError:  # its process died, or its node, or Ray ended it because the node had no memory left
                self._controller.release_worker(member.name)

    def _stop(self) -> None:
        """Has every worker stop after its present step. One that does not answer waits for room, and is let go."""
        calls = {member.actors[0].stop.remote(): run for run, member in self._members.items()}
        _, unanswered = ray.wait(list(calls), num_returns=len(calls), timeout=STOP_TIMEOUT_S) if calls else ([], [])
        for call in unanswered:
            self._members.pop(calls[call]).kill()
        while self._members:
            self._wait(CHECK_INTERVAL_S)

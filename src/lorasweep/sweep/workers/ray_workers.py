"""Workers as Ray actors. Ray starts them, places them, notices when one dies, and restarts the controller.

A sweep has three kinds of processes:

- The process in which `lorasweep sweep` was typed asks Ray for workers, and for another one whenever one has died.
- The controller is a named actor. It reads the sweep's journal when it starts, also when Ray restarts it.
- Each worker is an actor that runs the loop of `worker.py`. While the controller restarts, a worker's calls wait, and
  Ray repeats them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from lorasweep.config.run import RunConfig
from lorasweep.config.targets import set_trusted, trusted_packages
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
LOOK_INTERVAL_S = 1.0
"""Seconds between two looks at a request to stop and at nodes that joined; a worker that ends is noticed at once."""
PEER_TIMEOUT_S = 10.0
"""Seconds that the other ranks have to end a run after the first one has, before all ranks begin again."""
STOP_TIMEOUT_S = 10.0
"""Seconds in which a worker that has begun answers the request to stop."""
RESTART_FOREVER = {"max_restarts": -1, "max_task_retries": -1}
"""Ray restarts an actor that died, and makes the calls again whose answers were lost."""


def train_on_ray(
    path: Path,
    *,
    num: int | Literal["auto"],
    needs: WorkerNeeds,
    stop_requested: Callable[[], bool],
    run_ended: RunEnded,
    require_nodes: Callable[[], None] = lambda: None,
) -> bool:
    """Trains what is left of a sweep with workers on the Ray cluster that this process is connected to.

    Args:
        path: The sweep's folder, which no process has open. Every node sees it under this path.
        num: How many workers; `auto` takes as many as fit, and more when nodes join.
        needs: What one process of a worker needs.
        stop_requested: Asked every second whether to stop; each trial then keeps its last checkpoint.
        run_ended: As for `Controller`; a function that another process can import.
        require_nodes: Called while there is no worker; raises what says that there will be none.

    Returns:
        Whether the sweep is complete.

    Raises:
        WorkerError: As for `Worker.run`, or every worker was refused.
    """
    return _WorkerPool(path, num, needs, run_ended=run_ended).work(stop_requested, require_nodes=require_nodes)


class WorkerRefused(WorkerError):  # noqa: N818 (named by what happened)
    """A worker can't take part, because what it trained could not be compared."""

    def __init__(self, message: str, node: str) -> None:
        """Takes the reason and the id of the worker's node."""
        super().__init__(message)
        self.node = node

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how Ray hands it to another process."""
        return type(self), (str(self), self.node)


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a process on another node needs in order to work as this one does."""

    folder: Path
    """From which relative paths are meant."""
    path: Path
    """The sweep's folder."""
    code: dict[str, str]
    """The versions that its code and packages must have."""
    trusted: tuple[str, ...]
    """Packages whose classes settings may name beside the usual ones."""

    def enter(self) -> None:
        """Makes sure that this process sees the same files and has the same code.

        Raises:
            WorkerRefused: It does not, so that what it trained could not be compared.
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
                "Install there what is installed here.",
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
        """Opens the sweep, whose journal says what an earlier process of this session had done."""
        context.enter()
        super().__init__(reopen_sweep(context.path), run_ended=run_ended, session=session)
        self.save("running")

    def close(self) -> None:
        """Lets go of the sweep's folder."""
        self.sweep.close()


class ControllerClient:
    """The controller as another process sees it: the same methods."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Returns a method that waits for the controller's answer and raises what it raised."""
        method = getattr(self._actor, name)
        return lambda *args, **kwargs: result_of(method.remote(*args, **kwargs))


def result_of(reference: Any) -> Any:
    """Returns what a call returned, or raises what it raised.

    Raises:
        WorkerError: Ray gave the actor up.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except RayActorError as error:
        if isinstance(cause := error.__cause__, LoraSweepError):
            raise cause from None
        raise WorkerError(
            f"a sweep's controller must run as long as its workers do, but Ray gave it up: {first_line(error)}"
        ) from error


@ray.remote(concurrency_groups={"control": 1})
class WorkerActor:
    """One process of a worker. The first one runs the worker's loop, the others train its trials with it."""

    def __init__(self, context: WorkerContext, *, threads: int) -> None:
        self._context = context
        self._stop = threading.Event()
        self._peers: list[Any] = []
        self._benches = InputsCache()
        torch.set_num_threads(threads)

    def run(self, controller: Any, *, name: str, num_workers: int, peers: Sequence[Any]) -> None:
        """Runs the worker's loop until the sweep is over or the worker is stopped."""
        self._context.enter()
        client, path = ControllerClient(controller), self._context.path
        client.note_worker(device=name_device(), threads=torch.get_num_threads())
        self._peers = list(peers)
        self._prepare_peers()
        Worker(
            path=path,
            definition=saved_definition(path),
            controller=client,  # type: ignore[arg-type]
            metric=read_sweep(path).metric,
            inputs_cache=self._benches,
            stop_requested=self._stop.is_set,
            name=name,
            num_workers=num_workers,
            train_alone=self._train_together if peers else None,
        ).run()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]  # while `run` runs
    def stop(self) -> None:
        """Has the worker stop after its present step."""
        self._stop.set()

    def enter(self) -> None:
        """Makes sure that this process can take part.

        Raises:
            WorkerRefused: It can't.
        """
        self._context.enter()

    def _prepare_peers(self) -> None:
        """Makes sure that the other ranks can take part; raises what refuses one of them."""
        try:
            ray.get([peer.enter.remote() for peer in self._peers])
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except RayError:  # one of them died
            traceback.print_exc()
            os._exit(1)

    def train_as_peer(self, config: RunConfig, place: RunPlace, *, resume: bool, cluster: RayEnvironment) -> None:
        """Trains a run together with the other ranks. Where that fails, the process ends, so that none waits for it."""
        try:
            train_run(config, place, inputs=self._benches.of(config), resume=resume, cluster=cluster)
        except BaseException as error:
            if not isinstance(error, LoraSweepError) or isinstance(error, RanksLost):  # others are raised by all ranks
                traceback.print_exc()  # into Ray's log of this process
                os._exit(1)

    def _train_together(self, config: RunConfig, place: RunPlace, *, resume: bool, **own: Any) -> RunRecord:
        """Trains a run on all ranks. Where one of them was lost, this process ends too, so that all begin again."""
        with socket.socket() as found:  # another port for each run: torch keeps a store, and what is in it, for a while
            found.bind(("", 0))
            port = found.getsockname()[1]
        place_of = {"size": len(self._peers) + 1, "address": ray.util.get_node_ip_address(), "port": port}
        peers = [
            peer.train_as_peer.remote(config, place, resume=resume, cluster=RayEnvironment(rank=rank, **place_of))
            for rank, peer in enumerate(self._peers, start=1)
        ]
        ended = threading.Event()
        threading.Thread(target=_end_with_peers, args=(peers, ended), daemon=True).start()
        try:
            record = train_run(config, place, resume=resume, cluster=RayEnvironment(rank=0, **place_of), **own)
        except RanksLost:
            traceback.print_exc()
            os._exit(1)
        except Exception:  # the controller must hear of it first, even if another rank died of it too
            with suppress(RayError):
                ray.get(peers, timeout=PEER_TIMEOUT_S)
            raise
        finally:
            ended.set()
        self._wait_for_peers(peers)
        return record

    def _wait_for_peers(self, calls: Sequence[Any]) -> None:
        """Returns when the other ranks have ended a run that this one has ended."""
        try:
            ray.get(calls, timeout=PEER_TIMEOUT_S)
        except RayError:  # a rank died, or hangs
            traceback.print_exc()
            os._exit(1)


def _end_with_peers(calls: Sequence[Any], ended: threading.Event) -> None:
    """Ends this process where another rank has ended and this one waits for it, as it may under NCCL."""
    ray.wait(list(calls))
    if not ended.wait(PEER_TIMEOUT_S):
        os._exit(1)


class RayEnvironment(ClusterEnvironment):
    """Where the ranks of a run meet, as Lightning asks for it."""

    def __init__(self, *, rank: int, size: int, address: str, port: int) -> None:
        self._rank, self._size = rank, size
        self._address, self._port = address, port

    @property
    def creates_processes_externally(self) -> bool:
        """Returns True: Ray has started the ranks."""
        return True

    @property
    def main_address(self) -> str:
        """Returns the address of the first rank's node."""
        return self._address

    @property
    def main_port(self) -> int:
        """Returns a port there."""
        return self._port

    @staticmethod
    def detect() -> bool:
        """Returns False: it is given to the Trainer."""
        return False

    def world_size(self) -> int:
        """Returns the number of ranks."""
        return self._size

    def set_world_size(self, size: int) -> None:
        """Does nothing: Ray's placement says how many there are."""

    def global_rank(self) -> int:
        """Returns the place among all ranks."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Does nothing: Ray's placement says which it is."""

    def local_rank(self) -> int:
        """Returns the GPU of this rank: always the first, because Ray lets a process see its own GPUs only."""
        return 0

    def node_rank(self) -> int:
        """Returns 0: Lightning uses it to count ranks, which Ray does here."""
        return 0


@dataclass(kw_only=True, eq=False)
class _PoolMember:
    """One worker: its processes, and the call that runs its loop."""

    name: str
    actors: list[Any]
    group: Any
    """Ray's placement group, where it has several processes."""
    run: Any


class _WorkerPool:
    """The workers of a sweep while it trains."""

    def __init__(self, path: Path, num: int | Literal["auto"], needs: WorkerNeeds, *, run_ended: RunEnded) -> None:
        self._num = num
        self._needs = needs
        self._context = WorkerContext(
            folder=Path.cwd(), path=path.resolve(), code=code_versions(), trusted=trusted_packages()
        )
        self._session = secrets.token_hex(4)
        self._members: dict[Any, _PoolMember] = {}
        """By the reference of the call that runs it."""
        self._count = 0
        self._refused: list[WorkerRefused] = []
        """Workers that were refused on nodes which are still there: their places stay empty."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._actor = (
            ray.remote(ControllerActor)
            .options(name=CONTROLLER, num_cpus=0, scheduling_strategy=here, **RESTART_FOREVER)
            .remote(self._context, session=self._session, run_ended=run_ended)
        )
        self._controller = ControllerClient(self._actor)

    def work(self, stop_requested: Callable[[], bool], *, require_nodes: Callable[[], None]) -> bool:
        """Trains until the sweep is over, was stopped or can't go on; returns whether it is complete."""
        try:
            self._controller.is_over()  # an error while it begins is raised here
            while not stop_requested() and not self._controller.is_over():
                self._start_missing()
                if not self._members:
                    require_nodes()
                self._wait(LOOK_INTERVAL_S)
            self._stop()
            return bool(self._controller.finish())
        finally:
            for member in self._members.values():
                self._kill(member)
            self._controller.close()
            ray.kill(self._actor)

    def _start_missing(self) -> None:
        """Asks Ray for the workers that are missing. One for which there is no room waits until there is."""
        fitting = count_fitting(self._needs)
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._refused = [refused for refused in self._refused if refused.node in nodes]
        wanted = fitting if self._num == "auto" else self._num
        while len(self._members) + len(self._refused) < wanted:
            self._count += 1
            name = f"{self._session}-{self._count}"
            options: dict[str, Any] = {"num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus}
            group, places = None, [options]
            if self._needs.processes > 1:
                bundle = {"CPU": self._needs.cpus, **({"GPU": self._needs.gpus} if self._needs.gpus else {})}
                group = ray.util.placement_group([bundle] * self._needs.processes)
                there = [
                    PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
                    for rank in range(self._needs.processes)
                ]
                places = [options | {"scheduling_strategy": each} for each in there]
            make: Any = WorkerActor
            actors = [make.options(**each).remote(self._context, threads=self._needs.cpus) for each in places]
            run = actors[0].run.remote(self._actor, name=name, num_workers=max(wanted, 1), peers=actors[1:])
            self._members[run] = _PoolMember(name=name, actors=actors, group=group, run=run)

    def _wait(self, timeout_s: float) -> None:
        """Waits for a worker to end. The trials of one that died are handed out again; `_start_missing` replaces it."""
        if not self._members:
            time.sleep(timeout_s)
            return
        ended, _ = ray.wait(list(self._members), timeout=timeout_s)
        for run in ended:
            member = self._members.pop(run)
            self._kill(member)
            try:
                ray.get(run)
            except RayTaskError as error:  # the worker's own loop raised
                if isinstance(error.cause, WorkerRefused):
                    self._refused.append(error.cause)
                    self._controller.warn(str(error.cause))
                    if not self._members:
                        raise error.cause from None
                else:
                    raise (error.cause if isinstance(error.cause, LoraSweepError) else error) from None
            except RayError:  # its process died, or its node, or Ray ended it because the node had no memory left
                self._controller.release_worker(member.name)

    def _stop(self) -> None:
        """Has every worker stop after its present step. One that does not answer waits for room, and is let go."""
        calls = {member.actors[0].stop.remote(): member for member in self._members.values()}
        _, unanswered = ray.wait(list(calls), num_returns=len(calls), timeout=STOP_TIMEOUT_S) if calls else ([], [])
        for call in unanswered:
            self._kill(self._members.pop(calls[call].run))
        while self._members:
            self._wait(LOOK_INTERVAL_S)

    def _kill(self, member: _PoolMember) -> None:
        for actor in member.actors:
            ray.kill(actor)
        if member.group is not None:
            ray.util.remove_placement_group(member.group)

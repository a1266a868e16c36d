"""Runs the controller and the workers of a sweep as Ray actors. Ray places them, and notices when an actor dies.

A sweep has three kinds of processes:

- The process of `lorasweep sweep` asks Ray for workers, and replaces workers that died (`WorkerPool`).
- The controller is an actor. If it dies, the sweep ends, and can be resumed.
- Each worker is an actor that runs the loop of `worker.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from lorasweep.errors import LoraSweepError, OutOfMemory, RanksLost, WorkerError, first_line
from lorasweep.record import read_sweep
from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.lifecycle import read_saved_definition, reopen_sweep
from lorasweep.sweep.workers.ray_cluster import WorkerNeeds, count_fitting_workers
from lorasweep.sweep.workers.worker import RemoteController, Worker
from lorasweep.training.environment import describe_packages, name_device
from lorasweep.training.inputs import InputsCache
from lorasweep.training.open_run import RunRequest
from lorasweep.training.run import train_runs

CHECK_INTERVAL_S = 1.0
"""Seconds between two checks for a stop request and for new nodes. The end of a worker is noticed immediately."""
PEER_TIMEOUT_S = 10.0
"""Seconds that the other ranks have to end a run after one rank has ended it. Then all ranks are restarted."""
STOP_TIMEOUT_S = 10.0
"""Seconds that a worker has to answer a stop request."""


class WorkerRefused(WorkerError):  # noqa: N818 (named by what happened)
    """A worker can't take part, because its node lacks the sweep's folder or has other code."""


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """Folders and code versions of `lorasweep sweep`, which all processes of the sweep must share."""

    current_folder: Path
    """For relative paths in settings."""
    sweep_path: Path
    code: dict[str, str]
    """The result of `code_versions`."""

    def enter(self) -> None:
        """Raises `WorkerRefused` if this process differs. Sets its current folder."""
        if not self.sweep_path.is_dir():
            raise WorkerRefused(
                f"every node must see the sweep's folder under the same path, but {str(self.sweep_path)!r} is missing "
                f"on {_name_node()}. Put it on a file system that the nodes share (`sweep.output`).",
            )
        here, wanted = code_versions(), self.code
        if differing := [f"{name} {here[name]}, not {wanted[name]}" for name in here if here[name] != wanted[name]]:
            raise WorkerRefused(
                f"every node must have the same code and packages, but {_name_node()} has {'; '.join(differing)}. "
                "Install the same versions on every node.",
            )
        if self.current_folder.is_dir():
            os.chdir(self.current_folder)


def _name_node() -> str:
    return f"node {ray.get_runtime_context().get_node_id()[:8]}"


@cache
def code_versions() -> dict[str, str]:
    """Returns the versions of packages that can change results, and a checksum of lorasweep's code."""
    code = hashlib.sha256()
    for file in sorted(Path(str(files("lorasweep"))).rglob("*.py")):
        code.update(file.read_bytes())
    return {"lorasweep": code.hexdigest()[:16], "python": sys.version.split()[0], **describe_packages()}


def _get_results(calls: Any, *, timeout_s: float | None = None) -> Any:
    """Returns the results of calls. Raises errors of lorasweep and OSError without Ray's wrapper, others in it."""
    try:
        return ray.get(calls, timeout=timeout_s)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LoraSweepError | OSError) else error) from None


class ControllerActor(Controller):
    """The controller of a sweep as a Ray actor."""

    def __init__(self, context: WorkerContext, *, num_workers: int) -> None:
        context.enter()
        super().__init__(reopen_sweep(context.sweep_path), num_workers=num_workers)
        self.save("running")

    def close(self) -> None:
        self.sweep.close()


def _call_actor(actor: Any, sweep: Path, name: str, *args: Any, **kwargs: Any) -> Any:
    """Returns the answer of the controller's method, or raises its error."""
    try:
        return _get_results(getattr(actor, name).remote(*args, **kwargs))
    except RayActorError as error:
        if isinstance(cause := error.__cause__, LoraSweepError):
            raise cause from None
        raise WorkerError(
            f"a sweep's controller must run as long as its workers, but it ended: {first_line(error)}. Type "
            f"`lorasweep sweep --resume {sweep}`."
        ) from error


@ray.remote(concurrency_groups={"control": 1})
class WorkerActor:
    """One process of a worker. The first process runs the worker's loop; its peers train the same packs with it."""

    def __init__(self, context: WorkerContext, *, threads: int) -> None:
        self._context = context
        self._stop = threading.Event()
        self._peers: list[Any] = []
        self._inputs_cache = InputsCache()
        torch.set_num_threads(threads)

    def run(self, controller: Any, *, name: str, num_workers: int, peers: Sequence[Any]) -> None:
        self.enter()
        path = self._context.sweep_path
        client = RemoteController(partial(_call_actor, controller, path))
        definition, record = read_saved_definition(path), read_sweep(path)
        client.note_worker(device=name_device(), threads=torch.get_num_threads())
        self._peers = list(peers)
        try:
            _get_results([peer.enter.remote() for peer in peers])
        except RayTaskError:
            raise
        except RayError:  # a peer died, so all processes of this worker must be replaced
            _end_process()
        Worker(
            path=path,
            definition=definition,
            controller=client,  # type: ignore[arg-type]
            test_metric=record.verdict_metric.name,
            inputs_cache=self._inputs_cache,
            stop_requested=self._stop.is_set,
            name=name,
            num_workers=num_workers,
            train_runs=self._train_with_peers if peers else None,
        ).run()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]  # can be called during `run`
    def stop(self) -> None:
        """Asks the worker to stop after the current step."""
        self._stop.set()

    def enter(self) -> None:
        self._context.enter()

    def train_as_peer(self, requests: Sequence[RunRequest], *, checkpoint_file: Path, ranks: Mapping[str, str]) -> None:
        """Trains a pack together with the other ranks. `ranks` has the environment variables of this rank."""
        os.environ.update(ranks)
        self._inputs_cache.folder = self._context.sweep_path
        try:
            train_runs(
                requests,
                inputs=self._inputs_cache.load(requests[0].config),
                checkpoint_file=checkpoint_file,
                on_evaluation=lambda evaluations: [None] * len(evaluations),
                on_end=lambda run, outcome: None,
            )
        except OutOfMemory:  # `_train_with_peers` tells the controller
            raise
        except BaseException as error:
            # All ranks raise an error of lorasweep. After any other error the other ranks would wait for this process.
            if not isinstance(error, LoraSweepError) or isinstance(error, RanksLost):
                _end_process()

    def _train_with_peers(self, requests: Sequence[RunRequest], *, checkpoint_file: Path, **options: Any) -> bool:
        """Trains a pack on all ranks, as `train_runs`.

        If a rank is lost, ends this process too, so that the pool replaces all ranks.
        """
        # a free port for each pack, because torch's store of the last pack may still listen on the last port
        with socket.socket() as free_socket:
            free_socket.bind(("", 0))
            rendezvous = (ray.util.get_node_ip_address(), free_socket.getsockname()[1])
        size = len(self._peers) + 1
        ranks = [_rank_variables(rank, size, *rendezvous) for rank in range(size)]
        calls = [
            peer.train_as_peer.remote(requests, checkpoint_file=checkpoint_file, ranks=variables)
            for peer, variables in zip(self._peers, ranks[1:], strict=True)
        ]
        ended = threading.Event()

        def end_with_peers() -> None:
            ray.wait(list(calls))
            if not ended.wait(PEER_TIMEOUT_S):  # another rank has ended, and this rank still waits for it (with NCCL)
                _end_process()

        threading.Thread(target=end_with_peers, daemon=True).start()
        os.environ.update(ranks[0])
        try:
            try:
                is_done = train_runs(requests, checkpoint_file=checkpoint_file, **options)
            except RanksLost:
                _get_results(calls, timeout_s=PEER_TIMEOUT_S)  # raises `OutOfMemory` of another rank
                raise
            ray.get(calls, timeout=PEER_TIMEOUT_S)
        except (RanksLost, RayError):
            _end_process()
        except Exception:  # raised for the controller, even if another rank died of the same error
            with suppress(RayError):
                ray.get(calls, timeout=PEER_TIMEOUT_S)
            raise
        finally:
            ended.set()
        return is_done


def _rank_variables(rank: int, size: int, address: str, port: int) -> dict[str, str]:
    """Returns torchrun's environment variables for one rank.

    Each rank counts as a node with one process, because Ray hides from it the GPUs of the other ranks.
    """
    values = {"RANK": rank, "GROUP_RANK": rank, "WORLD_SIZE": size, "GROUP_WORLD_SIZE": size}
    values |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    texts = {name: str(value) for name, value in values.items()}
    return texts | {"MASTER_ADDR": address, "TORCHELASTIC_RUN_ID": "ray"}


def _end_process() -> NoReturn:
    """Ends this process, so that the pool replaces the whole worker. Prints the error into Ray's log."""
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

    def __init__(self, path: Path, *, num: int | Literal["auto"], num_planned: int, needs: WorkerNeeds) -> None:
        """Starts the controller. No process may have the sweep open.

        `num="auto"` means as many workers as fit at each moment. Packs are planned for `num_planned` workers.
        """
        self._num, self._num_planned = num, num_planned
        self._needs = needs
        self._context = WorkerContext(current_folder=Path.cwd(), sweep_path=path.resolve(), code=code_versions())
        self._members: dict[Any, _PoolMember] = {}  # the key is the running call of the worker's loop
        self._numbers = itertools.count(1)
        self._nodes: set[str] = set()
        self._num_refused = 0  # refused workers are not replaced until the cluster has other nodes
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor_class = ray.remote(ControllerActor).options(num_cpus=0, scheduling_strategy=here)
        self._actor = actor_class.remote(self._context, num_workers=num_planned)
        self._controller = RemoteController(partial(_call_actor, self._actor, path))

    def train(self, *, stop_requested: Callable[[], bool], require_nodes: Callable[[], None] = lambda: None) -> bool:
        """Trains the remaining trials, and returns whether the sweep is complete.

        `require_nodes` is called while the sweep has no worker. It raises an error if no node can join.
        """
        try:
            self._controller.is_over()  # raises if the controller could not start
            while not stop_requested() and not self._controller.is_over():
                self._start_missing()
                if not self._members:
                    require_nodes()
                self._wait_for_ends()
            # Workers end first, because their last calls still change the record that `finish` writes.
            self._stop_workers()
            return bool(self._controller.finish())
        finally:
            for member in self._members.values():
                member.kill()
            with suppress(WorkerError):  # the controller has ended
                self._controller.close()
            ray.kill(self._actor)

    def _stop_workers(self) -> None:
        """Stops every worker after its current step. Kills workers that do not answer: they have not started yet."""
        calls = {member.actors[0].stop.remote(): run for run, member in self._members.items()}
        _, unanswered = ray.wait(list(calls), num_returns=len(calls), timeout=STOP_TIMEOUT_S) if calls else ([], [])
        for call in unanswered:
            self._members.pop(calls[call]).kill()
        while self._members:
            self._wait_for_ends()

    def _start_missing(self) -> None:
        """Asks Ray for the missing workers. Ray starts each one as soon as the cluster has room for it."""
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if nodes != self._nodes:
            self._nodes, self._num_refused = nodes, 0
        needs, actor_class = self._needs, cast("Any", WorkerActor)
        wanted = count_fitting_workers(needs) if self._num == "auto" else self._num
        for _ in range(wanted - len(self._members) - self._num_refused):
            # A placement group reserves the resources of all processes at once. Without it, two workers could each get
            # half of their processes and wait for each other.
            bundle = {"CPU": needs.cpus} | ({"GPU": needs.gpus} if needs.gpus else {})
            group = ray.util.placement_group([bundle] * needs.processes)
            actors = []
            for rank in range(needs.processes):
                strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
                options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "scheduling_strategy": strategy}
                actors.append(actor_class.options(**options).remote(self._context, threads=needs.cpus))
            name = str(next(self._numbers))
            run = actors[0].run.remote(self._actor, name=name, num_workers=self._num_planned, peers=actors[1:])
            self._members[run] = _PoolMember(name=name, actors=actors, group=group)

    def _wait_for_ends(self) -> None:
        """Waits until a worker ends, and releases the packs of a dead worker. `_start_missing` replaces workers."""
        if not self._members:
            time.sleep(CHECK_INTERVAL_S)
            return
        ended, _ = ray.wait(list(self._members), timeout=CHECK_INTERVAL_S)
        for run in ended:
            member = self._members.pop(run)
            member.kill()  # also its peers, which would wait for the process that ended
            try:
                _get_results(run)
            except WorkerRefused as error:
                self._num_refused += 1
                self._controller.warn(str(error))
                if not self._members:
                    raise
            except RayTaskError:  # a bug in the worker's loop
                raise
            except RayError:  # the process or the node died, or Ray ended the process to free memory
                self._controller.release_worker(member.name)

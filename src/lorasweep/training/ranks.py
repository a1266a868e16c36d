"""The processes that train one run together, and how they agree. `strategy` has what gradients and weights need.

Two kinds of traffic are kept apart. What ranks say to each other goes through a connection of its own (gloo), and each
such meeting begins by asking whether somebody failed: so a rank that runs out of memory leaves nobody waiting. Tensors
go through torch.distributed's default group (gloo or NCCL), which is torn down when a rank fails and made again.
"""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lorasweep.config.run import TrainerConfig
from lorasweep.errors import ConfigError, LoraSweepError, RanksLost, RunError, first_line
from lorasweep.launch import Launch, describe_launch, meeting_point, read_launch

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""Of a meeting or a sum of tensors: how much longer than the others a rank may take for what comes between two."""
IDLE = timedelta(days=30)
"""Of waiting for the next run of a sweep. A rank whose process ends is noticed at once."""
BUCKET_BYTES = 32 * 2**20
"""Small tensors are summed together up to this size."""
FAILED, BARRIER, ANY, BROADCAST, GATHER = range(5)


class PeerFailed(Exception):  # noqa: N818
    """Another rank failed; `Ranks.together` makes everybody end with its error."""


class Ranks:
    """The processes of one run. Of a process alone every call is trivial, and torch.distributed is not used.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
        local_rank: Its number on its node.
    """

    def __init__(self, launch: Launch | None = None, *, store: Store | None = None) -> None:
        """Takes one of several processes and where they meet; alone when left out."""
        launch = launch or Launch()
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self._failures = 0
        self._heard_of_failure = False
        self._backend = "gloo"
        self._store = store
        if store is not None:
            meeting = PrefixStore("control", store)
            self._control: Any = dist.ProcessGroupGloo(meeting, self.rank, self.size, TIMEOUT)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and talks to the study."""
        return self.rank == 0

    def barrier(self) -> None:
        """Returns once every rank has called it.

        Raises:
            PeerFailed: One of them failed instead. So do all methods below.
        """
        self._meet(BARRIER, 0)

    def any(self, flag: bool) -> bool:  # noqa: FBT001
        """Returns whether it is so on any rank."""
        return bool(self._meet(ANY, int(flag)))

    def broadcast(self, value: T, *, timeout: timedelta = TIMEOUT) -> T:
        """Returns the first rank's value, whatever the others gave. It must be picklable."""
        if self.size == 1:
            return value
        sent = _to_bytes(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        length = self._meet(BROADCAST, len(sent), timeout=timeout)
        content = sent if self.is_first else torch.empty(length, dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._wait(lambda: self._control.broadcast([content], options))
        received: T = value if self.is_first else _from_bytes(content)
        return received

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, in order of ranks. They must be picklable."""
        if self.size == 1:
            return [value]
        sent = _to_bytes(value)
        length = self._meet(GATHER, len(sent))
        padded = torch.zeros(length, dtype=torch.uint8)
        padded[: len(sent)] = sent
        received = [torch.empty_like(padded) for _ in range(self.size)]
        self._wait(lambda: self._control.allgather([received], [padded]))
        return [_from_bytes(content) for content in received]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is inside ends well on every rank or on none: the first error becomes that of all.

        An error of ours is raised as such everywhere; of any other one, the rest raise a `RunError` that tells it.

        Raises:
            RanksLost: A rank's process is gone.
        """
        own: BaseException | None = None
        try:
            yield
            self.barrier()
        except RanksLost:
            raise
        except PeerFailed:
            assert self.size > 1
        except BaseException as error:
            if self.size == 1:
                raise
            own = error
        else:
            return
        self._raise_first_error(own)

    def in_turn(self, load: Callable[[], T]) -> T:
        """Returns what each rank loads: the first of each node before the others, who find it in the node's caches."""
        with self.together():
            if self.local_rank == 0:
                loaded = load()
            self.barrier()
            if self.local_rank != 0:
                loaded = load()
        return loaded

    def connect(self) -> None:
        """Makes torch.distributed's default group, where it is not there yet."""
        if self._store is not None and not dist.is_initialized():
            meeting = PrefixStore(f"work/{self._failures}", self._store)
            dist.init_process_group(self._backend, store=meeting, rank=self.rank, world_size=self.size, timeout=TIMEOUT)

    def use_gpu(self) -> None:
        """Takes the GPU of this rank, and NCCL for tensors on it."""
        torch.cuda.set_device(self.local_rank % torch.cuda.device_count())  # Slurm may show each rank its own alone
        self._backend = "cpu:gloo,cuda:nccl"

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all ranks, which must give the same shapes in the same order."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def seed_of(self, seed: int) -> int:
        """Returns this rank's own seed of what each draws for its own rows; that of the first is the seed itself."""
        if self.is_first:
            return seed
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.rank}".encode()).digest()[:7], "little")

    def leave(self) -> None:
        """Returns when every rank is done, so that no launcher takes one that ends first for a failure of all."""
        if self.size > 1:
            with suppress(RanksLost, PeerFailed):
                self.barrier()
            self._disconnect()

    def _meet(self, kind: int, number: int, *, timeout: timedelta = TIMEOUT) -> int:
        """Returns the largest number that a rank gave; each meeting is of one kind on all of them."""
        if self.size == 1:
            return number
        header = torch.tensor([kind == FAILED, kind, -kind, number])
        options: Any = dist.AllreduceOptions()
        options.reduceOp, options.timeout = dist.ReduceOp.MAX, timeout
        self._wait(lambda: self._control.allreduce([header], options))
        failed, most, least, largest = header.tolist()
        if failed:
            self._heard_of_failure = True
            raise PeerFailed
        assert most == -least, f"ranks met for different things: {most} and {-least}"
        return int(largest)

    def _wait(self, begin: Callable[[], Any]) -> None:
        try:
            begin().wait()
        except RuntimeError as error:
            raise RanksLost(
                f"every process of a run must be there, but rank {self.rank} waits for one that is gone "
                f"({first_line(error)[:120]}). Look at its output, and launch them again to go on."
            ) from error

    def _raise_first_error(self, own: BaseException | None) -> None:
        """Meets the others after a failure; `own` is this rank's, if it has one."""
        assert self._store is not None
        is_first = own is not None and self._store.add(f"failed/{self._failures}", 1) == 1
        self._failures += 1
        _let_go(own)
        self._disconnect()  # others may wait for this rank's part of a sum: they fail now, and come here
        if not self._heard_of_failure:  # who heard of one in a meeting has met already
            with suppress(PeerFailed):
                self._meet(FAILED, 0)
        self._heard_of_failure = False
        told = (type(own), _message(own)) if own is not None and is_first else None
        told_by = [(rank, found) for rank, found in enumerate(self.gather(told)) if found is not None]
        ((rank, (kind, line)),) = told_by
        if is_first:
            assert own is not None
            raise own
        ours = issubclass(kind, LoraSweepError) or not issubclass(kind, Exception)
        error = kind(line) if ours else RunError(f"rank {rank} failed: {kind.__name__}: {line}")
        raise error from own

    def _disconnect(self) -> None:
        if dist.is_initialized():
            # not `destroy_process_group`, which under NCCL waits for what others no longer send
            dist.distributed_c10d._abort_process_group()
            gc.collect()  # gloo closes its connections when nothing refers to them


_current = Ranks()


def current_ranks() -> Ranks:
    """Returns the ranks that this process is one of; itself alone before `join_ranks`."""
    return _current


def join_ranks(config: TrainerConfig) -> Ranks:
    """Meets the other processes that were launched with this one; called once, before anything is loaded.

    Processes that were launched together and are to work each for itself, as workers of a sweep whose `trainer.devices`
    is 1 may be, don't call it.

    Raises:
        ConfigError: As many as `trainer.devices` and `trainer.num_nodes` say were not launched, or have no GPU each.
    """
    global _current
    launch = read_launch()
    check_launch(config, launch)
    if launch.size > 1 and _current.size == 1:
        _current = Ranks(launch, store=_find_store(launch))
        if torch.cuda.is_available() and config.device != "cpu":
            _current.use_gpu()
    return _current


def wants_ranks(config: TrainerConfig) -> bool:
    """Whether a run is to be trained by several processes, or by as many as there are."""
    return config.devices != 1 or config.num_nodes != 1


def check_launch(config: TrainerConfig, launch: Launch) -> None:
    """Makes sure that as many processes were launched as the settings say, each with a device.

    Raises:
        ConfigError: They were not.
    """
    how = describe_launch(devices=_devices(config, launch), num_nodes=config.num_nodes)
    if config.num_nodes != launch.num_nodes:
        raise ConfigError(
            f"`trainer.num_nodes` must be the number of nodes that processes were launched on, {launch.num_nodes}, but "
            f"got {config.num_nodes!r}. Set it so, or launch with {how}."
        )
    if launch.size % launch.num_nodes or config.devices not in ("auto", launch.local_size):
        raise ConfigError(
            "`trainer.devices` must be the number of processes that were launched on each node, "
            f"{launch.size / launch.num_nodes:g}, but got {config.devices!r}. Set it so, or launch with {how}."
        )
    _require_strategy(config, launch.size)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    there = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    if launch.local_size > there and not (on_gpu and there == 1 and "SLURM_STEP_NUM_TASKS" in os.environ):
        kind = "GPUs" if on_gpu else "processor cores"
        raise ConfigError(
            f"`trainer.devices <= {there}` must hold, the number of {kind} of this node, but got {launch.local_size}. "
            "Launch fewer processes."
        )


def require_ranks(config: TrainerConfig) -> None:
    """Makes sure that this process has joined as many ranks as a run asks for.

    Raises:
        ConfigError: It has not.
    """
    ranks = current_ranks()
    _require_strategy(config, ranks.size)
    asked = ranks.size if config.devices == "auto" else config.devices * config.num_nodes
    if asked != ranks.size:
        raise ConfigError(
            f"`trainer.devices` times `trainer.num_nodes` must be the number of processes of this run, {ranks.size}, "
            f"but is {asked}. Launch with "
            f"{describe_launch(devices=_devices(config, Launch()), num_nodes=config.num_nodes)}."
        )


def _require_strategy(config: TrainerConfig, size: int) -> None:
    if config.strategy != "auto" and size == 1 and config.devices in (1, "auto") and config.num_nodes == 1:
        raise ConfigError(
            f"`trainer.strategy` must be auto for one process, but got {config.strategy!r}. Launch several with "
            f"{describe_launch(devices=2, num_nodes=1)}."
        )


def _devices(config: TrainerConfig, launch: Launch) -> int:
    return launch.local_size if config.devices == "auto" else config.devices


def _find_store(launch: Launch) -> Store:
    """Where the processes find each other: torchrun's store, or one that the first process of a Slurm step opens."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        host, port = meeting_point()
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    store: Store = next(rendezvous("env://", launch.rank, launch.size, timeout=TIMEOUT))[0]
    return store


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, LoraSweepError) else first_line(error)


def _let_go(error: BaseException | None) -> None:
    """Frees what the frames of an error hold: a sharded model, and in it the connections that others wait at."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(content: Tensor) -> Any:
    """What another process of this run sent; nothing else can reach the connection."""
    return pickle.loads(content.numpy().tobytes())


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts tensors into runs of one kind and place, of at most `BUCKET_BYTES` or one tensor."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        fits = num_bytes + tensor.nbytes <= BUCKET_BYTES
        if bucket and not (fits and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(tensor)
        num_bytes += tensor.nbytes
    if bucket:
        yield bucket

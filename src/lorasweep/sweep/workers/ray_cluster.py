"""The Ray cluster of a sweep's workers: started on this machine for the sweep, or one that is there and is joined.

Nothing of ours listens on a port. Ray's processes of a cluster that is started here listen on 127.0.0.1 alone, ask for
a token, and have no dashboard.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorasweep.config.run import TrainerConfig
from lorasweep.errors import ConfigError, first_line

OBJECT_STORE_BYTES = 100 * 2**20
"""Shared memory of Ray's object store on each node. Trials and results have a few KiB; Ray's least is 75 MiB."""
SOCKETS_FOLDER = "/tmp"
"""Folder for temporary files of Ray, whose sockets lie some 70 characters below it: a socket's path has at most 107."""
CONNECT_TIMEOUT_S = 10.0
"""Seconds that a Ray head has to accept a connection."""
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
    "gcs_rpc_server_reconnect_timeout_s": 15,
}
"""A node whose processes are gone is noticed after 3 s instead of Ray's 15 s; a node that only answers slowly is asked
three times. Processes end when the head's own server has been gone for 15 s instead of 60 s."""


@dataclass(frozen=True, kw_only=True)
class WorkerNeeds:
    """The resources of one worker, in Ray's units."""

    cpus: int
    """Processor cores of each process."""
    gpus: int
    """GPUs of each process."""
    processes: int = 1
    """Processes that train each trial together, with a device each."""

    def count_on(self, resources: dict[str, float]) -> int:
        """Returns how many processes fit on a node with these resources."""
        by_cpus = int(resources.get("CPU", 0) // self.cpus)
        return min(by_cpus, int(resources.get("GPU", 0) // self.gpus)) if self.gpus else by_cpus


@contextmanager
def local_cluster(folder: Path) -> Iterator[None]:
    """Starts a Ray cluster on this machine for a sweep in this folder, and ends it at the end of the block.

    Raises:
        ConfigError: Ray is not installed, or does not start.
    """
    # This variable of Ray says that the cluster has one node. Only then Ray's processes listen on 127.0.0.1 alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with _connected(folder, **_head_options(), _node_ip_address="127.0.0.1"):
        yield


@contextmanager
def head_for_nodes(folder: Path, *, ip: str | None, token_file: Path) -> Iterator[str]:
    """Starts the head of a Ray cluster that other machines join, without room for a worker; ends it after the block.

    Args:
        folder: The sweep's folder.
        ip: The address by which the machines reach this one; None is the address that Ray finds.
        token_file: Gets the token that they need, readable by its owner alone.

    Yields:
        `HOST:PORT` of the head.

    Raises:
        ConfigError: Ray is not installed, or does not start.
    """
    handle = os.open(token_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.write(handle, secrets.token_hex(32).encode())
    os.close(handle)
    for name in ("RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):  # Ray would prefer these to our options
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    with _connected(folder, **_head_options(), num_cpus=0, num_gpus=0, _node_ip_address=ip):
        import ray  # noqa: PLC0415

        yield ray.get_runtime_context().gcs_address


@contextmanager
def joined_cluster(folder: Path, *, address: str) -> Iterator[None]:
    """Joins a Ray cluster that runs, for a sweep in this folder, and leaves it at the end of the block.

    Args:
        folder: The sweep's folder.
        address: `auto` for the cluster of this machine, or `HOST:PORT`.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster that lets this process in.
    """
    if ":" in address and not answers(address):  # Ray itself would try for minutes
        raise ConfigError(
            f"`worker.address` must be a Ray cluster that runs and lets this process in, but nothing answers at "
            f"{address!r}."
        )
    with _connected(folder, address=address):
        yield


def answers(address: str) -> bool:
    """Returns whether a process listens at `HOST:PORT`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _head_options() -> dict[str, Any]:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    return {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_system_config": HEALTH_CHECKS,
    }


@contextmanager
def _connected(folder: Path, **options: Any) -> Iterator[None]:
    """Connects this process by `ray.init(**options)`. Environment variables must be set before: Ray reads them once."""
    if find_spec("ray") is None:
        raise ConfigError("`worker=ray` must find Ray, but it is not installed. Type `pip install 'lorasweep[ray]'`.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # named after the folder, so that two sweeps on one cluster do not share actors
    namespace = "lorasweep-" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    import ray  # noqa: PLC0415

    with contextlib.ExitStack() as undo:
        if options["address"] == "local":
            options["_temp_dir"] = tempfile.mkdtemp(prefix="lorasweep-", dir=SOCKETS_FOLDER)
            undo.callback(shutil.rmtree, options["_temp_dir"], ignore_errors=True)
        undo.callback(ray.shutdown)
        try:
            ray.init(namespace=namespace, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # of several kinds: no answer, another version, a token that is missing or wrong
            raise ConfigError(
                f"`worker.address` must be a Ray cluster that runs and lets this process in, but got "
                f"{options['address']!r}: {first_line(error)}"
            ) from error
        yield


def count_processes(trainer: TrainerConfig) -> int:
    """Returns how many processes train each trial together."""
    return 1 if trainer.devices == "auto" else trainer.devices * trainer.num_nodes


def count_fitting(needs: WorkerNeeds) -> int:
    """Returns how many workers fit on the nodes that are in the cluster now."""
    return sum(needs.count_on(resources) for resources in _read_resources()) // needs.processes


def check_capacity(needs: WorkerNeeds) -> None:
    """Checks that one worker fits on the cluster.

    Raises:
        ConfigError: It does not; the message has the resources of the nodes.
    """
    if not count_fitting(needs):
        found = [f"{each.get('CPU', 0):.0f} and {each.get('GPU', 0):.0f}" for each in _read_resources()]
        raise ConfigError(
            f"one worker must fit on the cluster with {needs.processes} processes of {needs.cpus} processor cores and "
            f"{needs.gpus} GPUs (`worker.cpus`, `worker.gpus`), but the cores and GPUs of its nodes are: "
            f"{', '.join(found) or 'none'}."
        )


def _read_resources() -> list[dict[str, float]]:
    import ray  # noqa: PLC0415

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]

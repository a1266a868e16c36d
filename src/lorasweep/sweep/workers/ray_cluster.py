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
"""Shared memory of Ray's object store on a node. Our calls are small: the least that Ray takes is 75 MiB."""
CONNECT_TIMEOUT_S = 10.0
"""Seconds that a cluster has to accept a connection."""
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
    """What one process of a worker needs, as Ray counts it. A worker of several processes has one per device."""

    cpus: int
    gpus: int
    processes: int = 1

    def fit_on(self, resources: dict[str, float]) -> int:
        """Returns how many such processes fit on a node with these resources."""
        fits = int(resources.get("CPU", 0) // self.cpus)
        return min(fits, int(resources.get("GPU", 0) // self.gpus)) if self.gpus else fits

    def describe(self) -> str:
        """Returns it in words."""
        gpus = f" and {self.gpus} GPU{'s' * (self.gpus > 1)}" if self.gpus else ""
        return f"{self.cpus} processor core{'s' * (self.cpus > 1)}{gpus}"


@contextmanager
def local_cluster(folder: Path) -> Iterator[None]:
    """Starts a Ray cluster on this machine and ends it in the end.

    Args:
        folder: The sweep's folder.

    Raises:
        ConfigError: Ray is not installed, or does not start.
    """
    # Ray's name for: this node is all there is to the cluster. Only then its processes listen on 127.0.0.1 alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with _connected(folder, **_head_options(), _node_ip_address="127.0.0.1"):
        yield


@contextmanager
def head_for_nodes(folder: Path, *, ip: str | None, token_file: Path) -> Iterator[str]:
    """Starts the head of a Ray cluster that other machines join, without room for a worker, and ends it in the end.

    Args:
        folder: The sweep's folder.
        ip: The address by which the machines reach this one; None is the one that Ray finds.
        token_file: Gets the token that they must know, readable by its owner alone.

    Yields:
        `HOST:PORT`, which they join.

    Raises:
        ConfigError: Ray is not installed, or does not start.
    """
    handle = os.open(token_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.write(handle, secrets.token_hex(32).encode())
    os.close(handle)
    for name in ("RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):  # would win over what is said here
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    with _connected(folder, **_head_options(), num_cpus=0, num_gpus=0, _node_ip_address=ip):
        import ray  # noqa: PLC0415

        yield ray.get_runtime_context().gcs_address


@contextmanager
def joined_cluster(folder: Path, *, address: str) -> Iterator[None]:
    """Joins a Ray cluster that runs and leaves it in the end.

    Args:
        folder: The sweep's folder.
        address: `auto` for the one of this machine, or `HOST:PORT`.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster that lets this process in.
    """
    _check_answers(address)
    with _connected(folder, address=address):
        yield


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
    """Connects this process; options are those of `ray.init`. The environment must be set before: Ray reads it once."""
    if find_spec("ray") is None:
        raise ConfigError("`worker=ray` must find Ray, but it is not installed. Type `pip install 'lorasweep[ray]'`.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # named after the folder: two sweeps on one cluster don't meet
    namespace = "lorasweep-" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    import ray  # noqa: PLC0415

    with contextlib.ExitStack() as undo:
        if options["address"] == "local":
            options["_temp_dir"] = tempfile.mkdtemp(prefix="lorasweep-", dir="/tmp")  # a socket's path has 107 bytes
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


def _check_answers(address: str) -> None:
    """Refuses an address where nothing listens at once; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():  # `auto`, which Ray looks up
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"`worker.address` must be a Ray cluster that runs and lets this process in, but nothing answers at "
            f"{address!r}: {error.strerror or error}."
        ) from error


def count_processes(trainer: TrainerConfig) -> int:
    """Returns how many processes train each trial together."""
    return 1 if trainer.devices == "auto" else trainer.devices * trainer.num_nodes


def count_fitting(needs: WorkerNeeds) -> int:
    """Returns how many workers the nodes hold that are in the cluster now."""
    import ray  # noqa: PLC0415

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(needs.fit_on(resources) for resources in nodes) // needs.processes


def check_capacity(needs: WorkerNeeds) -> None:
    """Makes sure that the cluster can hold one worker.

    Raises:
        ConfigError: It can't; the message says what its nodes have.
    """
    import ray  # noqa: PLC0415

    if count_fitting(needs):
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = ", ".join(f"{n.get('CPU', 0):.0f} cores and {n.get('GPU', 0):.0f} GPUs" for n in nodes) or "no resources"
    each = f"{needs.processes} processes with " if needs.processes > 1 else ""
    raise ConfigError(
        f"one worker must fit on the cluster with {each}{needs.describe()} (`worker.cpus`, `worker.gpus`), but its "
        f"nodes have {have}."
    )

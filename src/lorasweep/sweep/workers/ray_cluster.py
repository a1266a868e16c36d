"""Starts or joins the Ray cluster of a sweep's workers.

lorasweep listens on no port. The Ray processes that it starts require a token and have no dashboard. Those of
`start_local_cluster` listen only on 127.0.0.1.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.config.components import require_package
from lorasweep.errors import ConfigError, first_line

OBJECT_STORE_BYTES = 100 * 2**20
"""Shared memory of Ray's object store on each node. Trials and results have a few KiB; Ray needs at least 75 MiB."""
SOCKETS_FOLDER = "/tmp"
"""Folder for Ray's temporary files. It is short, because Ray appends about 70 characters to the paths of its sockets,
and Linux allows 107."""
CONNECT_TIMEOUT_S = 10.0
"""Timeout of a connection to a Ray head."""
HEALTH_CHECK_SETTINGS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
    "gcs_rpc_server_reconnect_timeout_s": 15,
}
"""Settings with which Ray notices a dead node after 3 s instead of 15 s. It checks a node three times, because the node
may be slow. Ray's processes end 15 s after the head is gone, instead of 60 s."""


@dataclass(frozen=True, kw_only=True)
class WorkerNeeds:
    """The resources of one worker: processes that train a trial together, and CPU cores and GPUs of each process."""

    cpus: int
    gpus: int
    processes: int = 1


@contextmanager
def start_local_cluster() -> Iterator[None]:
    """Starts a cluster on this machine, and ends it after the block."""
    # This variable tells Ray that the cluster has one node. Otherwise Ray would not only listen on 127.0.0.1.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with _start_head(_node_ip_address="127.0.0.1"):
        yield


@contextmanager
def start_head_for_nodes(*, ip: str | None, token_file: Path) -> Iterator[str]:
    """Starts the head of a Ray cluster that other machines join, and ends it after the block. Yields its `HOST:PORT`.

    The head trains nothing. The other machines reach it at `ip`, or at the address that Ray finds, and join with the
    token in `token_file`, which only the file's owner may read.
    """
    handle = os.open(token_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.write(handle, secrets.token_hex(32).encode())
    os.close(handle)
    for name in ("RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):  # Ray would prefer these to our options
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    with _start_head(num_cpus=0, num_gpus=0, _node_ip_address=ip):
        import ray  # noqa: PLC0415

        yield ray.get_runtime_context().gcs_address


@contextmanager
def join_cluster(address: str) -> Iterator[None]:
    """Connects this process to a running Ray cluster: `auto` (of this machine) or `HOST:PORT`."""
    if ":" in address and not is_listening(address):  # otherwise Ray would try for minutes
        raise ConfigError(f"`worker.address` must be a running Ray cluster, but {address!r} does not answer.")
    with _connect(address):
        yield


def is_listening(address: str) -> bool:
    """Returns whether a process listens at `HOST:PORT`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _start_head(**options: Any) -> Iterator[None]:
    """Starts a Ray head that requires a token and has no dashboard."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    with (
        tempfile.TemporaryDirectory(prefix="lorasweep-", dir=SOCKETS_FOLDER, ignore_cleanup_errors=True) as temporary,
        _connect(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _system_config=HEALTH_CHECK_SETTINGS,
            _temp_dir=temporary,
            **options,
        ),
    ):
        yield


@contextmanager
def _connect(address: str, **options: Any) -> Iterator[None]:
    """Calls `ray.init`. Environment variables must be set before, because Ray reads them when it is first imported."""
    require_package("ray", key="worker", extra="ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # noqa: PLC0415

    try:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # Ray raises many classes, such as for another version or a wrong token
            raise ConfigError(
                f"`worker.address` must be a running Ray cluster that accepts this process, but got {address!r}: "
                f"{first_line(error)}"
            ) from error
        yield
    finally:
        ray.shutdown()  # also after a start that failed halfway


def count_fitting_workers(needs: WorkerNeeds) -> int:
    wanted = {"CPU": needs.cpus} | ({"GPU": needs.gpus} if needs.gpus else {})
    nodes = _read_resources()
    return sum(min(int(node.get(kind, 0) // n) for kind, n in wanted.items()) for node in nodes) // needs.processes


def check_capacity(needs: WorkerNeeds) -> None:
    """Raises ConfigError if not even one worker fits on the cluster."""
    if not count_fitting_workers(needs):
        nodes = [f"{node.get('CPU', 0):.0f} and {node.get('GPU', 0):.0f}" for node in _read_resources()]
        raise ConfigError(
            f"a worker with {needs.processes} processes of {needs.cpus} CPU cores and {needs.gpus} GPUs must fit on "
            f"the cluster, but the cores and GPUs of its nodes are: {', '.join(nodes) or 'none'}. Change `worker.cpus` "
            "or `worker.gpus`."
        )


def _read_resources() -> list[dict[str, float]]:
    import ray  # noqa: PLC0415

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]

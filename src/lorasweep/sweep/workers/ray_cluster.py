"""The Ray cluster of a sweep's workers: a new one on this machine, or an existing one.

lorasweep listens on no port. The Ray processes that it starts need a token and have no dashboard; those of
`local_cluster` listen on 127.0.0.1 only.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorasweep.errors import ConfigError, first_line

OBJECT_STORE_BYTES = 100 * 2**20
"""Shared memory of Ray's object store on each node. Trials and results have a few KiB; Ray needs at least 75 MiB."""
SOCKETS_FOLDER = "/tmp"
"""Folder for Ray's temporary files. It is short, because Ray appends about 70 characters to the paths of its sockets,
and Linux allows 107."""
CONNECT_TIMEOUT_S = 10.0
"""Timeout of a connection to a Ray head."""
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
    "gcs_rpc_server_reconnect_timeout_s": 15,
}
"""With these settings Ray notices a dead node after 3 s instead of 15 s. A slow node is asked three times. Processes
end when the head's server has been gone for 15 s instead of 60 s."""


@dataclass(frozen=True, kw_only=True)
class WorkerNeeds:
    """The resources of one worker: CPU cores and GPUs of each process, and processes that train a trial together."""

    cpus: int
    gpus: int
    processes: int = 1

    def count_on(self, resources: dict[str, float]) -> int:
        """Returns how many processes fit on a node with these resources."""
        by_cpus = int(resources.get("CPU", 0) // self.cpus)
        return min(by_cpus, int(resources.get("GPU", 0) // self.gpus)) if self.gpus else by_cpus


@contextmanager
def local_cluster() -> Iterator[None]:
    # This variable tells Ray that the cluster has one node. Only then do Ray's processes listen on 127.0.0.1 only.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with _started_head(_node_ip_address="127.0.0.1"):
        yield


@contextmanager
def head_for_nodes(*, ip: str | None, token_file: Path) -> Iterator[str]:
    """Starts the head of a Ray cluster for other machines, without resources for a worker; ends it after the block.

    Args:
        ip: IP address at which the machines reach this one; None uses the address that Ray finds.
        token_file: File to write the token into that they need. Only its owner may read it.

    Yields:
        `HOST:PORT` of the head.
    """
    handle = os.open(token_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.write(handle, secrets.token_hex(32).encode())
    os.close(handle)
    for name in ("RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):  # Ray would prefer these to our options
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    with _started_head(num_cpus=0, num_gpus=0, _node_ip_address=ip):
        import ray  # noqa: PLC0415

        yield ray.get_runtime_context().gcs_address


@contextmanager
def joined_cluster(address: str) -> Iterator[None]:
    """Joins a running Ray cluster (`auto` for the one of this machine, or `HOST:PORT`) during the block."""
    if ":" in address and not answers(address):  # Ray would try for minutes
        raise ConfigError(f"`worker.address` must be a running Ray cluster, but {address!r} does not answer.")
    with _connected(address):
        yield


def answers(address: str) -> bool:
    """Returns whether a process listens at `HOST:PORT`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _started_head(**options: Any) -> Iterator[None]:
    """Starts a Ray head with a token and without a dashboard."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    with (
        tempfile.TemporaryDirectory(prefix="lorasweep-", dir=SOCKETS_FOLDER, ignore_cleanup_errors=True) as temporary,
        _connected(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _system_config=HEALTH_CHECKS,
            _temp_dir=temporary,
            **options,
        ),
    ):
        yield


@contextmanager
def _connected(address: str, **options: Any) -> Iterator[None]:
    """Connects this process by `ray.init`. Ray reads environment variables only once, when it is imported here."""
    if find_spec("ray") is None:
        raise ConfigError("`worker=ray` must find Ray, but it is not installed. Type `pip install 'lorasweep[ray]'`.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # noqa: PLC0415

    try:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # many classes: no answer, another version, a wrong token
            raise ConfigError(
                f"`worker.address` must be a running Ray cluster that accepts this process, but got {address!r}: "
                f"{first_line(error)}"
            ) from error
        yield
    finally:
        ray.shutdown()  # also after a start that failed halfway


def count_fitting_workers(needs: WorkerNeeds) -> int:
    return sum(needs.count_on(resources) for resources in _read_resources()) // needs.processes


def check_capacity(needs: WorkerNeeds) -> None:
    """Raises ConfigError if not even one worker fits on the cluster."""
    if not count_fitting_workers(needs):
        nodes = [f"{each.get('CPU', 0):.0f} and {each.get('GPU', 0):.0f}" for each in _read_resources()]
        raise ConfigError(
            f"one worker must fit on the cluster with {needs.processes} processes of {needs.cpus} CPU cores and "
            f"{needs.gpus} GPUs (`worker.cpus`, `worker.gpus`), but the cores and GPUs of its nodes are: "
            f"{', '.join(nodes) or 'none'}."
        )


def _read_resources() -> list[dict[str, float]]:
    import ray  # noqa: PLC0415

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]

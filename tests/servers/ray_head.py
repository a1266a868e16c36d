"""A Ray head on 127.0.0.1, as a process of its own, for tests of nodes that join a sweep's cluster."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOOPBACK = Path(__file__).parent / "ray_loopback"
"""For PYTHONPATH of every process that starts a part of Ray."""


class RayHead:
    """The head of a sweep's cluster, which writes its address into the sweep's folder; it ends with this process."""

    def __init__(self, folder):
        token = folder / "ray.token"
        if not token.exists():
            token.touch(0o600)
            token.write_text(secrets.token_hex(32))
        self._temporary = tempfile.mkdtemp(prefix="lorasweep-", dir="/tmp")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder), self._temporary],
            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask("address")

    def nodes(self):
        return sorted(self._ask("nodes"))

    def run_on(self, node):
        """Runs a task on a node, and returns the environment that it saw there."""
        return dict(self._ask(f"run {node}"))

    def kill(self):
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _ask(self, question):
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve(folder, temporary):
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    from lorasweep.sweep.workers.ray_cluster import HEALTH_CHECK_SETTINGS, OBJECT_STORE_BYTES  # noqa: PLC0415
    from lorasweep.sweep.workers.slurm import ADDRESS_FILE  # noqa: PLC0415

    ray.init(
        _node_ip_address="127.0.0.1",
        _temp_dir=temporary,
        _system_config={**HEALTH_CHECK_SETTINGS, "gcs_rpc_server_reconnect_timeout_s": 3},
        num_cpus=0,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
    )
    address = ray.get_runtime_context().gcs_address
    (folder / ADDRESS_FILE).write_text(address)
    head = ray.get_runtime_context().get_node_id()
    for question in sys.stdin:
        word, _, name = question.strip().partition(" ")
        nodes = {node["NodeName"]: node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != head}
        answer = address
        if word == "nodes":
            answer = list(nodes)
        elif word == "run":
            there = NodeAffinitySchedulingStrategy(nodes[name], soft=False)
            answer = ray.get(ray.remote(lambda: dict(os.environ)).options(scheduling_strategy=there).remote())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])

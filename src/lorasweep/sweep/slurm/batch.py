"""From settings to Slurm's batch file, and its submission; submitit writes the file and unpacks the task on the node.

Below DIR/workers/slurm: the batch files, what each task calls, and its output (`ARRAY_TASK_RANK_log.out` and `.err`).
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, environment_variables
from submitit.helpers import clean_env

from lorasweep.config.slurm import SlurmWorkers
from lorasweep.errors import WorkerError
from lorasweep.sweep.slurm.task import FOLDER, SlurmTask

CONTAINER_PYTHON = "python3"
IGNORING_SIGNAL = """sh -c 'trap "" USR2; exec "$@"' sh"""
"""Starts what follows so that the signal does not end it while it imports; the worker then takes the signal."""


class Batch(submitit.SlurmExecutor):
    """The array of workers of one sweep: its batch file as a text, and its submission."""

    def __init__(self, workers: SlurmWorkers, sweep: Path, *, name: str, num: int | None = None) -> None:
        """Takes the settings.

        Args:
            workers: What the jobs are like.
            sweep: The sweep's folder.
            name: The sweep's name, which the jobs bear.
            num: Jobs of the array where it is to have fewer than `worker.num`.
        """
        sweep = sweep.resolve()
        self.num = workers.num if num is None else num
        python = CONTAINER_PYTHON if workers.container else shlex.quote(sys.executable)
        super().__init__(sweep / FOLDER, python=f"{IGNORING_SIGNAL} {python}")
        self.update_parameters(**_parameters(workers, sweep, name=name, num=self.num))

    @classmethod
    def affinity(cls) -> int:
        """Says that Slurm is here; whether it is, `check_slurm` tells in a sentence."""
        return 2

    def text(self) -> str:
        """Returns the batch file."""
        parameters = self.parameters
        if self.num > 1:  # submitit makes no array of a single job
            self.parameters = parameters | {"map_count": self.num}
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters = parameters

    def submit_tasks(self, task: SlurmTask) -> str:
        """Submits the array and returns its job id.

        Raises:
            WorkerError: Slurm refuses it.
        """
        try:
            with _environment_of_a_login():
                job_id = self.submit_array([task] * self.num)[0].job_id
        except FailedJobError as error:
            raise WorkerError(f"Slurm must take the workers, but sbatch says: {last_line(str(error))}.") from error
        return str(job_id).split("_")[0]


@contextmanager
def _environment_of_a_login() -> Iterator[None]:
    """Takes away what a Slurm job that this process may run in would hand on, but for what a user sets."""
    kept = {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS") or k.startswith("SBATCH_")}
    with clean_env(), environment_variables(**kept):
        yield


def _parameters(workers: SlurmWorkers, sweep: Path, *, name: str, num: int) -> dict[str, Any]:
    """What submitit calls the options of sbatch and srun."""
    found: dict[str, Any] = {
        "job_name": f"lorasweep-{name}",
        "partition": workers.partition,
        "account": workers.account,
        "qos": workers.qos,
        "time": workers.time_min,
        "signal_delay_s": workers.signal_s,
        "nodes": workers.nodes,
        "ntasks_per_node": workers.tasks_per_node,
        "gpus_per_node": workers.gpus or None,
        "cpus_per_task": workers.cpus,
        "mem": None if workers.mem_gb is None else f"{round(workers.mem_gb * 1024)}M",
        "constraint": workers.constraint,
        "array_parallelism": num,
        "setup": list(workers.setup) or None,
        "srun_args": _srun_options(workers, sweep),
        "additional_parameters": {"requeue": True, **workers.extra},
    }
    return {"wckey": None} | {key: value for key, value in found.items() if value is not None}


def _srun_options(workers: SlurmWorkers, sweep: Path) -> list[str]:
    options = [f"--cpus-per-task={workers.cpus}"]  # Slurm 22.05 to 23.02 do not take it over from sbatch
    if workers.nodes * workers.tasks_per_node > 1:
        options.append("--kill-on-bad-exit=1")  # a rank alone waits for the others for ever
    if workers.container is not None:
        here = Path.cwd()
        mounts = ",".join(f"{folder}:{folder}" for folder in dict.fromkeys((str(here), str(sweep))))
        options += [
            f"--container-image={workers.container}",
            f"--container-mounts={mounts}",
            f"--container-workdir={here}",
        ]
    return options


def last_line(text: str) -> str:
    """Returns the last line of what a command of Slurm said, without its name and full stop."""
    line = next(iter(reversed(text.strip().splitlines())), "nothing")
    for prefix in ("sbatch: ", "error: ", "Batch job submission failed: ", "allocation failure: "):
        line = line.removeprefix(prefix)
    return line.strip().rstrip(".")

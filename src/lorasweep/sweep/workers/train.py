"""Trains the remaining trials of a sweep: in processes of this machine, on Ray, or on Ray in Slurm jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from lorasweep.config.sweep import LocalWorker, SlurmWorkers
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError, WorkerError
from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.folder import SweepFolder, check_disk
from lorasweep.sweep.cost import count_workers
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.workers.local_workers import LocalWorkers
from lorasweep.sweep.workers.ray_cluster import (
    WorkerNeeds,
    check_capacity,
    count_fitting_workers,
    join_cluster,
    start_head_for_nodes,
    start_local_cluster,
)
from lorasweep.sweep.workers.worker import Worker
from lorasweep.training.environment import name_device
from lorasweep.training.inputs import InputsCache

JOBS_INTERVAL_S = 5.0
"""Seconds between two calls of `squeue` while a sweep has no worker."""
HOPELESS_REASONS = ("PartitionTimeLimit", "PartitionNodeLimit", "MaxWallDurationPerJobLimit", "BadConstraints")
"""Parts of Slurm's reasons for a waiting job that can never start. Slurm accepts the submission of such a job."""


def check_workers(definition: Definition) -> None:
    """Raises ConfigError if the workers of a sweep can't train its trials."""
    config = definition.sweep_config.worker
    processes = {arm.name: _count_processes(arm) for arm in definition.arms}
    listed = ", ".join(f"{number} (arm `{name}`)" for name, number in processes.items())
    if isinstance(config, LocalWorker) and max(processes.values()) > 1:
        raise ConfigError(
            f"`trainer.devices` must be 1 with `worker=local`, but the arms have these numbers of processes: {listed}. "
            "Use `worker=ray`, which starts several processes for a trial."
        )
    if len(set(processes.values())) > 1:
        raise ConfigError(
            "`trainer.devices` times `trainer.num_nodes` must be the same for all arms, because a worker has that many "
            f"processes, but got {listed}."
        )


def _count_processes(arm: Arm) -> int:
    trainer = arm.base.trainer
    return 1 if trainer.devices == "auto" else trainer.devices * trainer.num_nodes


def train_sweep(sweep: SweepFolder, inputs_cache: InputsCache, *, stop_requested: Callable[[], bool]) -> bool:
    """Trains the remaining trials of an open sweep, and closes it. Returns False if the sweep was stopped.

    Raises WorkerError if the system refused a file.
    """
    try:
        return _train(sweep, inputs_cache, stop_requested=stop_requested)
    except OSError as error:
        check_disk(sweep.path, error)
        raise


def _train(sweep: SweepFolder, inputs_cache: InputsCache, *, stop_requested: Callable[[], bool]) -> bool:
    config = sweep.definition.sweep_config.worker
    if not isinstance(config, LocalWorker):
        sweep.close()  # the controller's process opens it again
        processes = _count_processes(sweep.definition.arms[0])
        needs = WorkerNeeds(cpus=config.cpus, gpus=config.gpus, processes=processes)
        if isinstance(config, SlurmWorkers):
            planned = count_workers(sweep.definition)
            return _train_on_slurm(sweep.path, config, needs, num_planned=planned, stop_requested=stop_requested)
        address = config.address
        with start_local_cluster() if address is None else join_cluster(address):
            from lorasweep.sweep.workers.ray_workers import WorkerPool  # noqa: PLC0415 (needs Ray)

            check_capacity(needs)
            planned = count_fitting_workers(needs) if config.num == "auto" else config.num
            pool = WorkerPool(sweep.path, num=config.num, num_planned=planned, needs=needs)
            return pool.train(stop_requested=stop_requested)
    try:
        controller = Controller(sweep)
        controller.save("running")
        if (num := count_workers(sweep.definition)) > 1:
            LocalWorkers(controller, num=num, inputs_cache=inputs_cache).train(stop_requested=stop_requested)
        else:
            controller.note_worker(device=name_device(), threads=torch.get_num_threads())
            Worker(
                path=sweep.path,
                definition=sweep.definition,
                controller=controller,
                test_metric=sweep.record.verdict_metric.name,
                inputs_cache=inputs_cache,
                stop_requested=stop_requested,
            ).run()
        return controller.finish()
    finally:
        sweep.close()


def _train_on_slurm(
    path: Path, config: SlurmWorkers, needs: WorkerNeeds, *, num_planned: int, stop_requested: Callable[[], bool]
) -> bool:
    from lorasweep.sweep.workers import slurm  # noqa: PLC0415 (needs submitit)

    def require_jobs() -> None:
        time.sleep(JOBS_INTERVAL_S)
        states = slurm.read_live_jobs(path)
        if states is None:  # Slurm does not answer now
            return
        if all(any(reason in state for reason in HOPELESS_REASONS) for state in states.values()):
            raise WorkerError(
                f"a sweep's Slurm jobs must wait or run, but the jobs of {str(path)!r} are: "
                f"{', '.join(sorted(set(states.values()))) or 'none'}. Read their output in {str(path / 'slurm')!r}; "
                "if it is missing, set `sweep.output` to a folder that all machines share. "
                f"Type `lorasweep sweep --resume {path}` to submit other jobs."
            )

    with start_head_for_nodes(ip=config.head_ip, token_file=path / slurm.TOKEN_FILE) as address:
        from lorasweep.sweep.workers.ray_workers import WorkerPool  # noqa: PLC0415 (Ray must be imported after the head has started)

        # The address is written after the token, because a job that reads the address joins at once.
        write_atomically(path / slurm.ADDRESS_FILE, address)
        try:
            slurm.cancel_jobs(path)  # jobs that a killed process of this sweep left behind
            slurm.submit_jobs(config, path)
            pool = WorkerPool(path, num="auto", num_planned=num_planned, needs=needs)
            return pool.train(stop_requested=stop_requested, require_nodes=require_jobs)
        finally:
            write_atomically(path / slurm.ADDRESS_FILE, "")  # tells the nodes to end
            slurm.cancel_jobs(path)

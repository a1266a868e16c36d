"""Trains what is left of a sweep: with one worker in this process, with workers on Ray, or on Ray in Slurm jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lorasweep.config.slurm import SlurmConfig
from lorasweep.config.sweep import LocalWorker, RayWorkers
from lorasweep.errors import ConfigError, WorkerError
from lorasweep.sweep.controller.controller import Controller, RunEnded
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.lifecycle import is_running, saved_definition
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.workers.ray_cluster import (
    WorkerNeeds,
    check_capacity,
    count_processes,
    head_for_nodes,
    joined_cluster,
    local_cluster,
)
from lorasweep.sweep.workers.worker import Worker
from lorasweep.training.environment import name_device
from lorasweep.training.inputs import InputsCache

JOBS_INTERVAL_S = 5.0
"""Seconds between two questions to Slurm about the jobs of a sweep that has no worker."""


def check_workers(definition: Definition, path: Path) -> list[str]:
    """Checks that the workers which a sweep asks for can train its trials; returns sentences of warning.

    Args:
        definition: The sweep.
        path: Its folder, which need not exist yet.

    Raises:
        ConfigError: They can't, or Slurm refuses their jobs.
    """
    config = definition.sweep_config.worker
    processes = {arm.name: count_processes(arm.corners[0].trainer) for arm in definition.arms}
    found = ", ".join(f"{number} (arm `{name}`)" for name, number in processes.items())
    if isinstance(config, LocalWorker) and max(processes.values()) > 1:
        raise ConfigError(
            f"`trainer.devices` must be 1 with `worker=local`, but the processes of a trial are {found}. "
            "Use `worker=ray`, which starts them."
        )
    if len(set(processes.values())) > 1:
        raise ConfigError(
            "`trainer.devices` times `trainer.num_nodes` must be the same for all arms, the processes of a worker, "
            f"but got {found}."
        )
    if isinstance(config, SlurmConfig):
        from lorasweep.sweep.workers.slurm import check_slurm  # noqa: PLC0415 (needs submitit)

        return check_slurm(config, path)
    return []


def hand_over(sweep: SweepFolder) -> str | None:
    """Closes a sweep that a Slurm job is to lead (`worker.head=job`), submits that job and returns its id.

    Returns None where this process leads the sweep.

    Raises:
        WorkerError: Slurm refuses the job.
    """
    config = sweep.definition.sweep_config.worker
    if not isinstance(config, SlurmConfig) or config.head != "job":
        return None
    from lorasweep.sweep.workers.slurm import submit_head  # noqa: PLC0415
    from lorasweep.sweep.workers.slurm_job import leads_in_job  # noqa: PLC0415 (needs submitit)

    if leads_in_job():
        return None
    sweep.close()  # the job opens it
    return submit_head(config, sweep.path)


def add_jobs(path: Path, changes: Mapping[str, Any]) -> list[str] | None:
    """Submits more Slurm jobs for a sweep that runs, up to `worker.jobs`; returns their ids.

    Returns None where the sweep in this folder does not run on Slurm now.

    Args:
        path: The sweep's folder.
        changes: Settings of the workers to be changed (`{"worker.jobs": 8}`).

    Raises:
        ConfigError: Slurm would not take the jobs.
        WorkerError: Slurm refuses them.
    """
    config = saved_definition(path, changes=changes).sweep_config.worker
    if not isinstance(config, SlurmConfig) or not is_running(path):
        return None
    from lorasweep.sweep.workers.slurm import check_slurm, submit_missing_jobs  # noqa: PLC0415

    check_slurm(config, path)
    return submit_missing_jobs(config, path)


def describe_jobs(path: Path) -> str | None:
    """Returns how many of a sweep's Slurm jobs are in which state; None if it has none or Slurm is not here."""
    if not (path / "slurm").is_dir() or find_spec("submitit") is None:
        return None
    from lorasweep.sweep.workers import slurm  # noqa: PLC0415

    return slurm.describe_jobs(path)


def train_sweep(
    sweep: SweepFolder, inputs_cache: InputsCache, *, stop_requested: Callable[[], bool], run_ended: RunEnded
) -> bool:
    """Trains what is left of an open sweep, closes it, and returns whether it is complete (False: it was stopped).

    Args:
        sweep: The open sweep.
        inputs_cache: Base models and data of this process.
        stop_requested: Asked after every step; each trial then keeps its last checkpoint.
        run_ended: As for `Controller`.

    Raises:
        ConfigError: `worker` asks for a Ray cluster that is not there, or that can't hold a worker.
        WorkerError: As for `Worker.run`, or no Slurm job is left.
    """
    config = sweep.definition.sweep_config.worker
    if isinstance(config, LocalWorker):
        try:
            return _train_here(sweep, inputs_cache, stop_requested=stop_requested, run_ended=run_ended)
        finally:
            sweep.close()
    sweep.close()  # the controller's process opens it
    if isinstance(config, SlurmConfig):
        return _train_on_slurm(sweep, config, stop_requested=stop_requested, run_ended=run_ended)
    return _train_on_ray(sweep, config, stop_requested=stop_requested, run_ended=run_ended)


def _train_here(
    sweep: SweepFolder, inputs_cache: InputsCache, *, stop_requested: Callable[[], bool], run_ended: RunEnded
) -> bool:
    controller = Controller(sweep, run_ended=run_ended)
    controller.note_worker(device=name_device(), threads=torch.get_num_threads())
    controller.save("running")
    Worker(
        path=sweep.path,
        definition=sweep.definition,
        controller=controller,
        metric=sweep.record.metric,
        inputs_cache=inputs_cache,
        stop_requested=stop_requested,
    ).run()
    return controller.finish()


def _train_on_ray(
    sweep: SweepFolder, config: RayWorkers, *, stop_requested: Callable[[], bool], run_ended: RunEnded
) -> bool:
    needs = _worker_needs(sweep.definition, config)
    address = config.address
    with local_cluster(sweep.path) if address is None else joined_cluster(sweep.path, address=address):
        from lorasweep.sweep.workers.ray_workers import WorkerPool  # noqa: PLC0415 (needs Ray)

        check_capacity(needs)
        pool = WorkerPool(sweep.path, num=config.num, needs=needs, run_ended=run_ended)
        return pool.train(stop_requested=stop_requested)


def _train_on_slurm(
    sweep: SweepFolder, config: SlurmConfig, *, stop_requested: Callable[[], bool], run_ended: RunEnded
) -> bool:
    from lorasweep.sweep.workers.slurm import cancel_jobs, read_live_jobs, submit_missing_jobs  # noqa: PLC0415
    from lorasweep.sweep.workers.slurm_job import TOKEN_FILE, leads_in_job, write_address  # noqa: PLC0415

    path, is_left_to_next_head = sweep.path, False

    def require_jobs() -> None:
        time.sleep(JOBS_INTERVAL_S)
        if read_live_jobs(path) == {}:
            raise WorkerError(
                f"a sweep's Slurm jobs must wait or run, but none of {str(path)!r} is left; what they printed is in "
                f"{str(path / 'slurm')!r}. Type `lorasweep sweep --resume {path}` to submit others."
            )

    with head_for_nodes(path, ip=config.head_ip, token_file=path / TOKEN_FILE) as address:
        from lorasweep.sweep.workers.ray_workers import WorkerPool  # noqa: PLC0415 (only now may Ray be imported)

        write_address(path, address)
        try:
            submit_missing_jobs(config, path)
            pool = WorkerPool(path, num="auto", needs=_worker_needs(sweep.definition, config), run_ended=run_ended)
            complete = pool.train(stop_requested=stop_requested, require_nodes=require_jobs)
            is_left_to_next_head = not complete and leads_in_job()  # this job is requeued and finds its nodes waiting
        finally:
            if not is_left_to_next_head:
                write_address(path, "")  # nodes end by themselves
                cancel_jobs(path)  # and jobs that wait for a machine
        return complete


def _worker_needs(definition: Definition, config: RayWorkers | SlurmConfig) -> WorkerNeeds:
    trainer = definition.arms[0].corners[0].trainer
    return WorkerNeeds(cpus=config.cpus, gpus=config.gpus, processes=count_processes(trainer))

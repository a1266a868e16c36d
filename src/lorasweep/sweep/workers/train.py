"""Trains what is left of a sweep: with one worker in this process, or with workers on Ray."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorasweep.config.sweep import RayWorkers
from lorasweep.sweep.controller.controller import Controller, RunEnded
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.workers.ray_cluster import open_cluster
from lorasweep.sweep.workers.worker import Worker
from lorasweep.training import Benches, name_device


def train_sweep(
    sweep: SweepFolder, benches: Benches, *, stop_requested: Callable[[], bool], run_ended: RunEnded
) -> bool:
    """Trains what is left of an open sweep, closes it, and returns whether it is complete (False: it was stopped).

    Args:
        sweep: The open sweep.
        benches: Base models and data of this process.
        stop_requested: Asked after every step; each trial then keeps its last checkpoint.
        run_ended: As for `Controller`.

    Raises:
        ConfigError: `worker` asks for a Ray cluster that is not there, or that can't hold a worker.
        WorkerError: As for `Worker.run`.
    """
    config = sweep.definition.driver.worker
    if isinstance(config, RayWorkers):
        sweep.close()  # the controller's process opens it
        with open_cluster(config, folder=sweep.path):
            from lorasweep.sweep.workers.ray_workers import train_on_ray  # noqa: PLC0415 (needs Ray)

            return train_on_ray(sweep.path, config, stop_requested=stop_requested, run_ended=run_ended)
    try:
        return _train_here(sweep, benches, stop_requested=stop_requested, run_ended=run_ended)
    finally:
        sweep.close()


def _train_here(
    sweep: SweepFolder, benches: Benches, *, stop_requested: Callable[[], bool], run_ended: RunEnded
) -> bool:
    controller = Controller(sweep, run_ended=run_ended)
    controller.note_worker(device=name_device(), threads=torch.get_num_threads())
    controller.save("running")
    worker = Worker(
        sweep.path,
        sweep.definition,
        controller,
        metric=sweep.record.metric,
        benches=benches,
        stop_requested=stop_requested,
    )
    sweep.measure = lambda: benches.telemetry.sample().as_numbers()
    worker.run()
    return controller.finish()

"""Workers that Slurm starts: the batch file, what is wrong with a request, what a job does, which jobs there are."""

from lorasweep.sweep.slurm.batch import Batch
from lorasweep.sweep.slurm.check import check_ranks, check_slurm, is_slurm_here
from lorasweep.sweep.slurm.jobs import QueuedTask, SubmittedArray, note_array, read_arrays, read_queue
from lorasweep.sweep.slurm.launch import (
    Queue,
    cancel_command,
    cancel_waiting,
    describe_end,
    has_running_workers,
    last_errors,
    submit_missing,
)
from lorasweep.sweep.slurm.task import SlurmTask, job_time_left_s, own_job_id

__all__ = [
    "Batch",
    "Queue",
    "QueuedTask",
    "SlurmTask",
    "SubmittedArray",
    "cancel_command",
    "cancel_waiting",
    "check_ranks",
    "check_slurm",
    "describe_end",
    "has_running_workers",
    "is_slurm_here",
    "job_time_left_s",
    "last_errors",
    "note_array",
    "own_job_id",
    "read_arrays",
    "read_queue",
    "submit_missing",
]

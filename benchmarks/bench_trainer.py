"""What Lightning's Trainer costs in a step of a pack: processor time of one thread, by part.

    python benchmarks/bench_trainer.py [--slots 8] [--steps 40] [--rows 4]

A pack of LoRA trials of `tiny` trains by the code of a sweep (`train_runs`). Timers are around the step's own calls
(forward and backward pass, clipping, optimizer), around the loader, and around our callback. The rest is the Trainer:
its loop, its connectors, and the calls of hooks. The first steps are left out, and there is no evaluation.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import print_head, print_row
from torch.utils.data import dataloader

from lorasweep.config.compose import compose_run
from lorasweep.training.inputs import load_inputs
from lorasweep.training.module import TrainingModule
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.optim import SlotOptimizers
from lorasweep.training.run import train_runs
from lorasweep.training.run_writer import RunWriter

WARM_UP_STEPS = 5
OWN_HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


class Parts:
    """Seconds by part. A timed call inside another one counts for its own part alone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner: list[float] = []

    def wrap(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            began = time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                whole = time.process_time() - began
                self.seconds[part] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return timed

    def patch(self, owner: Any, name: str, part: str) -> None:
        setattr(owner, name, self.wrap(getattr(owner, name), part))


def patch_all(parts: Parts) -> None:
    """Puts timers around the calls of a step."""
    for owner, name in (
        (TrainingModule, "training_step"),
        (TrainingModule, "configure_gradient_clipping"),
        (torch.Tensor, "backward"),
        (SlotOptimizers, "zero_grad"),
    ):
        parts.patch(owner, name, "step")
    step = parts.wrap(SlotOptimizers.step, "step")

    def step_after_closure(optimizer: SlotOptimizers, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None  # with hooks of the Trainer, so outside of the timer
        step(optimizer)
        return loss

    SlotOptimizers.step = step_after_closure  # type: ignore[method-assign]
    for hook in OWN_HOOKS:
        parts.patch(TrainingModule, hook, "step")
        parts.patch(RunWriter, hook, "writer of folders and logs")
    parts.patch(dataloader._BaseDataLoaderIter, "__next__", "batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4, help="blocks of 128 tokens of each slot")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"model": "tiny", "data": "stdlib_docs", "method": "lora", "method.rank": 8}
    steps = {"trainer.max_steps": arguments.steps, "trainer.eval_every_steps": arguments.steps}
    config = compose_run({**settings, **steps, "trainer.batch_size": arguments.rows})
    parts, marks = Parts(), list[tuple[float, Counter[str]]]()
    patch_all(parts)

    def note_step() -> bool:
        marks.append((time.process_time(), parts.seconds.copy()))
        return len(marks) == arguments.steps - 1  # before the evaluation

    with tempfile.TemporaryDirectory() as folder:
        runs = [RunFolder(path=Path(folder) / f"run-{number}") for number in range(arguments.slots)]
        train_runs(
            [RunRequest(config=config, run_folder=run) for run in runs],
            inputs=load_inputs(config),
            checkpoint_file=Path(folder) / "pack.ckpt",
            on_evaluation=lambda evaluations: [None] * len(evaluations),
            on_end=lambda run, outcome: None,
            stop_requested=note_step,
        )
    (began, before), (ended, after) = marks[WARM_UP_STEPS], marks[-1]
    num, whole = len(marks) - WARM_UP_STEPS - 1, ended - began
    found = after - before
    print_head("part", "ms a step", "share, %")
    for part, seconds in {**found, "Lightning's Trainer": whole - sum(found.values())}.items():
        print_row(part, 1000 * seconds / num, 100 * seconds / whole)


if __name__ == "__main__":
    main()

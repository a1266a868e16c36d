"""Many runs at once on one frozen base: a LightningModule whose slots are trained, evaluated, freed and refilled.

A run in a slot is the run that `run.train_run` would train alone: same data order, initial values, dropout stream,
schedule and metrics. What differs is rounding, since kernels vary with shape, and the draws of what has no stream per
slot, dropout inside a fused attention kernel; the record then says so.

A pack goes from boundary to boundary; each follows an evaluation. A pack that is killed at any moment resumes at the
last boundary that was committed, with the same slots at the same steps, and repeats to the bit what came after it. That
holds because of the order in which a boundary is done:

1. Of every slot the rows, the kept weights and the record are written. A slot that diverged fails here.
2. The values of all slots that are left are reported in one call.
3. Every slot is settled: complete, paused, or it goes on. A run to pause gets its checkpoint first, since whoever hears
   that it is paused may resume it.
4. Free slots are refilled in slot order. Slots that stay empty are dropped.
5. The checkpoints of all slots are written.
6. The state file is replaced. This is the commit: until then the boundary before it holds, so nothing that a pack needs
   to resume there may be removed.
7. Older checkpoints, and those of runs that ended, are removed.

Shapes, batches and random streams after a boundary depend on the state file and the checkpoints alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import OptimConfig, RunConfig, ScheduleConfig
from lorasweep.data.batching import MicroBatch
from lorasweep.data.loaders import evaluation_loader
from lorasweep.data.split import Batch, Split, move_batch, repeat_batch
from lorasweep.data.tasks import Evaluation, Task
from lorasweep.errors import Diverged, OutOfMemory, first_line
from lorasweep.lora.packed import (
    compact_slots,
    fill_slot,
    inject_packed_lora,
    load_slot,
    save_slot,
    set_dropout_streams,
    set_row_lengths,
    slot_state,
    split_packed_parameters,
)
from lorasweep.methods import copy_sharing_weights, draw_head, train_head
from lorasweep.record import RunStatus
from lorasweep.training.batches import resolve_accumulate
from lorasweep.training.callbacks import RunStopped
from lorasweep.training.checkpoint import remove_checkpoints, remove_older_checkpoints
from lorasweep.training.environment import deterministic_algorithms, reset_peak_memory, resolve_device
from lorasweep.training.inputs import RunInputs
from lorasweep.training.optim import schedule_factor
from lorasweep.training.packs.optim import StackedAdamW
from lorasweep.training.packs.slots import Evaluated, Job, OnEvaluation, SlotRun, Supply
from lorasweep.training.packs.state import (
    PackState,
    SlotState,
    read_pack_state,
    read_shared_stream,
    restore_shared_stream,
    write_pack_state,
)
from lorasweep.training.quiet import quiet_lightning
from lorasweep.training.run import never_stop, status_after
from lorasweep.training.run_log import (
    Values,
    describe_pause,
    describe_stale,
    is_out_of_memory,
    is_stale,
)


def train_pack(
    jobs: Sequence[Job],
    *,
    inputs: RunInputs,
    slots: int,
    supply: Supply,
    on_evaluation: OnEvaluation,
    state_file: Path,
    stop_requested: Callable[[], bool] = never_stop,
) -> bool:
    """Trains jobs together, and what `supply` gives as slots become free, until none is left.

    A pack that was killed or interrupted leaves `state_file`. It resumes where it is given jobs in the order of the
    slots of that file, each with its step as `start_step`. It may then report, and tell of runs that ended, what it
    reported and told before; `supply` must give again what it gave since that boundary.

    Args:
        jobs: The first runs, one per slot; their model, data and trainer settings are the same.
        inputs: Base model and data.
        slots: Most slots of a pack of these runs. It decides the micro-batches of a step, so that a run has the same
            ones in each pack that it is in.
        supply: Asked for a run whenever a slot is free, unless the pack has at most half of `slots`: such a pack ends
            with the runs that it has, and the caller begins a full one.
        on_evaluation: Takes the evaluations of all slots at once and returns for each whether its run goes on. What it
            returns of a run at its last step, or that early stopping ends, has no effect.
        state_file: Where the pack keeps what it resumes from, see `pack_state`.
        stop_requested: Asked after every step whether to stop.

    Returns:
        Whether every run ended; False if it was stopped.

    Raises:
        OutOfMemory: The pack does not fit. As after any error that would come again, the state file is gone: its runs
            can go on from their newest checkpoints, in a smaller pack.
    """
    reset_peak_memory()
    module: PackModule | None = None
    try:
        with inputs.telemetry.phase("loading"):
            module = PackModule(
                jobs,
                inputs=inputs,
                slots=slots,
                supply=supply,
                on_evaluation=on_evaluation,
                state_file=state_file,
                stop_requested=stop_requested,
            )
            _fit(module, jobs[0].config, inputs)
    except (RunStopped, SIGTERMException):  # Lightning's own, where SIGTERM comes during an evaluation
        assert module is not None
        module.interrupt()
        return False
    except Exception as error:
        if status_after(error, state_file.parent) != "interrupted":  # not the disk's fault, nor this process's
            state_file.unlink(missing_ok=True)
            if module is not None:
                module.remove_checkpoints_of_ended()
        if is_out_of_memory(error):
            raise OutOfMemory(first_line(error)) from error
        raise
    return True


class PackModule(lightning.LightningModule):
    """A packed model, its stacked optimizer and the runs in its slots. A batch of the loader is only a tick."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        inputs: RunInputs,
        slots: int,
        supply: Supply,
        on_evaluation: OnEvaluation,
        state_file: Path,
        stop_requested: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.inputs = inputs
        self.slots = slots
        self.supply = supply
        self.on_evaluation = on_evaluation
        self.state_file = state_file
        self.stop_requested = stop_requested
        self.task = inputs.splits.task
        self.resumed = _matching_state(state_file, jobs)
        self.accumulate = resolve_accumulate(jobs[0].config.trainer, inputs.splits.train, slots=slots)
        self.runs = [self._open(job, slot=slot, slots=len(jobs)) for slot, job in enumerate(jobs)]
        self.model: nn.Module = copy_sharing_weights(inputs.base.model)
        generators = [torch.Generator().manual_seed(job.config.seeds.init) for job in jobs]
        self.start = functools.partial(draw_head, names=inputs.base.head)
        configs = [self._method(job) for job in jobs]
        coverages = inject_packed_lora(self.model, configs, generators=generators, start=self.start)
        self.model.train()
        self.optimizer = StackedAdamW(split_packed_parameters(self.model), [self._optim(job) for job in jobs])
        for slot, (run, coverage) in enumerate(zip(self.runs, coverages, strict=True)):
            self._begin(slot, run, trainable_params=coverage.trainable_params)
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        self.evaluations = self._new_evaluations()
        self.paused: list[Path] = []
        """Folders of runs that were paused at this boundary."""
        self.ended: list[Path] = []
        """Folders of runs that are complete or failed at this boundary."""
        self.micro = 0
        self.micro_losses: list[Tensor] = []
        self.shares_draws: bool | None = None
        self.settled_at = time.monotonic()

    def configure_optimizers(self) -> None:
        """Leaves the optimizer to `training_step`: Lightning's counts would be those of one run."""

    def on_train_start(self) -> None:
        """Sets torch's own stream, whatever was drawn while the model was built, and commits the first boundary."""
        if self.resumed is None:
            torch.manual_seed(self.runs[0].job.config.seeds.dropout)
        else:
            restore_shared_stream(self.resumed.shared_stream, self.device)
        self._commit()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One micro-batch of every slot; with the last one of a step, the step."""
        self.inputs.telemetry.switch("training")
        started = time.perf_counter()
        micros = [run.micro_batch(self.micro) for run in self.runs]
        rows = slot_batch(self.inputs.splits.train, micros, model=self.model)
        with self._watch_draws():
            shares = slot_losses(self.task, self.model, move_batch(rows, self.device), slots=len(micros))
        shares = shares / torch.tensor([micro.step_weight for micro in micros], device=shares.device)  # (slots,)
        self.manual_backward(shares.sum())
        self.micro_losses.append(shares.detach())
        self.micro += 1
        positions, tokens = rows["input_ids"].numel() // len(micros), 0
        for run, micro in zip(self.runs, micros, strict=True):
            tokens += run.note_batch(micro, positions=positions)
        self.inputs.telemetry.add_tokens(tokens)
        if self.micro == self.accumulate:
            self._step()
        share = (time.perf_counter() - started) / len(micros)
        for run in self.runs:
            run.train_s += share

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Asks after each step whether to stop.

        Raises:
            RunStopped: The pack is to end here.
        """
        if self.micro == 0 and self.stop_requested():
            raise RunStopped

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluates a batch in all slots at once."""
        slots = len(self.runs)
        rows = self.task.score(self.model, repeat_batch(batch, slots=slots))
        for slot, evaluation in enumerate(self.evaluations):
            evaluation.update(rows.of_slot(slot, slots=slots))

    def on_validation_start(self) -> None:
        """Evaluates rows of one length in all slots."""
        self.inputs.telemetry.switch("evaluating")
        set_row_lengths(self.model, None)

    def on_validation_model_train(self) -> None:
        """Switches dropout on again, in refilled slots too."""
        self.model.train()

    def on_validation_end(self) -> None:
        """Does what belongs to a boundary; the order is the module's docstring's."""
        computed = [evaluation.compute() for evaluation in self.evaluations]
        self.inputs.telemetry.switch("saving")
        metrics = [{name: float(value) for name, value in own.items()} for own in computed]
        self._share_time()
        living = [n for n, run in enumerate(self.runs) if self._log(n, run, metrics[n])]
        goes_on = self._report(living)
        freed = [n for n, run in enumerate(self.runs) if n not in goes_on or self._ends(n, run, goes_on=goes_on[n])]
        is_refilled = 2 * len(self.runs) > self.slots
        empty = [slot for slot in freed if not (is_refilled and self._refill(slot))]
        if len(empty) == len(self.runs):
            self.runs = []
            self.state_file.unlink(missing_ok=True)  # the commit: nothing is left to resume
            self._remove_checkpoints()
            self.trainer.should_stop = True
            return
        if freed:
            self._compact([slot for slot in range(len(self.runs)) if slot not in empty])
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        self.evaluations = self._new_evaluations()
        for slot, run in enumerate(self.runs):
            self._save_checkpoint(slot, run)
        self._commit()
        self._remove_checkpoints()
        self.settled_at = time.monotonic()

    def remove_checkpoints_of_ended(self) -> None:
        """Removes the checkpoints of runs that are complete or failed since the last commit."""
        for folder in self.ended:
            remove_checkpoints(folder)

    def interrupt(self) -> None:
        """Closes the runs as interrupted; the pack resumes from its last boundary."""
        self._share_time()
        for run in self.runs:
            run.close("interrupted", f"stopped after step {run.step} of {run.record.steps_planned}")

    @contextmanager
    def _watch_draws(self) -> Iterator[None]:
        """Notes at the first step whether torch's own stream was drawn from, so for all slots together."""
        if self.shares_draws is not None:
            yield
            return
        before = read_shared_stream(self.device)
        yield
        self.shares_draws = before != read_shared_stream(self.device)

    def _step(self) -> None:
        factors = []
        for run in self.runs:
            config = run.job.config
            assert isinstance(config.schedule, ScheduleConfig)
            factors.append(
                schedule_factor(config.schedule, run.step, max_steps=config.trainer.max_steps, lr=config.optim.lr)
            )
        self.optimizer.lr_factors = factors
        self.optimizer.clip_slots()
        self.optimizer.step()
        self.optimizer.zero_grad()
        by_slot = torch.stack(self.micro_losses, dim=1)  # (slots, micro-batches)
        for run, losses, factor in zip(self.runs, by_slot, factors, strict=True):
            run.step += 1
            run.log.note_step(run.step, [losses], run.job.config.optim.lr * factor)
        self.micro, self.micro_losses = 0, []

    def _log(self, slot: int, run: SlotRun, metrics: Values) -> bool:
        """Writes a slot's evaluation, and returns whether its run lives; one that diverged fails."""
        assert run.record.pack is not None
        run.record.pack["shared_draws"] = bool(self.shares_draws)
        try:
            run.note_evaluation(metrics, save=lambda folder: self._save(slot, folder))
        except Diverged as error:
            self._end(run, "failed", str(error))
            run.job.failed(error)
            return False
        return True

    def _report(self, living: Sequence[int]) -> dict[int, bool]:
        """Reports the evaluations of these slots in one call, and returns for each whether its run may go on."""
        if not living:
            return {}
        runs = [self.runs[slot] for slot in living]
        evaluated = [Evaluated(job=run.job, step=run.step, values=run.record.last) for run in runs]
        return dict(zip(living, self.on_evaluation(evaluated), strict=True))

    def _ends(self, slot: int, run: SlotRun, *, goes_on: bool) -> bool:
        """Closes a run that is complete or to be paused, and returns whether it was."""
        record = run.record
        if run.step >= record.steps_planned:
            self._end(run, "complete", None)
        elif is_stale(record, run.job.config.trainer):  # before pausing: it has no steps left to go on with
            self._end(run, "complete", describe_stale(record))
        elif not goes_on:
            self._save_checkpoint(slot, run)
            self._end(run, "paused", describe_pause(record))
        else:
            return False
        run.job.ended(record)
        return True

    def _end(self, run: SlotRun, status: RunStatus, reason: str | None) -> None:
        run.close(status, reason)
        (self.paused if status == "paused" else self.ended).append(run.job.place.folder)

    def _refill(self, slot: int) -> bool:
        job = self.supply()
        if job is None:
            return False
        run = self._open(job, slot=slot, slots=len(self.runs))
        generator = torch.Generator().manual_seed(job.config.seeds.init)
        filled = fill_slot(self.model, slot, self._method(job), generator=generator, start=self.start)
        if filled.changes_parameters:
            self.optimizer.follow(split_packed_parameters(self.model))
        self.optimizer.reset_slot(slot, self._optim(job))
        self.runs[slot] = run
        self._begin(slot, run, trainable_params=filled.coverage.trainable_params)
        return True

    def _open(self, job: Job, *, slot: int, slots: int) -> SlotRun:
        return SlotRun(job, inputs=self.inputs, slot=slot, slots=slots, accumulate=self.accumulate)

    def _begin(self, slot: int, run: SlotRun, *, trainable_params: int) -> None:
        run.record.trainable_params = trainable_params
        run.record.trainable_fraction = trainable_params / run.record.total_params
        if run.checkpoint is not None:
            load_slot(self.model, slot, run.checkpoint["adapter"])
            moments = {name: tuple(pair) for name, pair in run.checkpoint["moments"].items()}
            self.optimizer.load_slot(slot, self._by_name(moments), num_steps=run.step)
            run.checkpoint = None

    def _compact(self, keep: list[int]) -> None:
        """Drops the other slots, and ranks and layers that only runs before had: a resumed pack has none of them."""
        compact_slots(self.model, keep)
        self.optimizer.follow(split_packed_parameters(self.model), keep=keep)
        self.runs = [self.runs[slot] for slot in keep]

    def _save_checkpoint(self, slot: int, run: SlotRun) -> None:
        """Writes a slot's checkpoint, unless it is at the step from which it began or resumed."""
        if run.step == run.saved_step:
            return
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {names[p]: list(pair) for p, pair in self.optimizer.slot_moments(slot).items()}
        run.save_checkpoint({"adapter": slot_state(self.model, slot), "moments": moments})

    def _commit(self) -> None:
        slots = tuple(SlotState(folder_name=run.job.place.folder.name, step=run.step) for run in self.runs)
        stream = read_shared_stream(self.device)
        write_pack_state(self.state_file, PackState(slots=slots, shared_stream=stream))

    def _remove_checkpoints(self) -> None:
        """Removes the checkpoints that nothing needs since the commit."""
        for folder in [*(run.job.place.folder for run in self.runs), *self.paused]:
            remove_older_checkpoints(folder, kind="slot")
        self.remove_checkpoints_of_ended()
        self.paused, self.ended = [], []

    def _by_name(self, moments: dict[str, Any]) -> dict[nn.Parameter, Any]:
        return {p: moments[name] for name, p in self.model.named_parameters() if name in moments}

    def _save(self, slot: int, folder: Path) -> None:
        base = self.inputs.base
        save_slot(self.model, slot, folder, base_path=base.path, base_fingerprint=base.fingerprint)

    def _share_time(self) -> None:
        share = (time.monotonic() - self.settled_at) / max(len(self.runs), 1)
        for run in self.runs:
            run.wall_s += share

    def _method(self, job: Job) -> LoraConfig:
        assert isinstance(job.config.method, LoraConfig)
        return train_head(job.config.method, self.inputs.base.head)

    def _optim(self, job: Job) -> OptimConfig:
        assert isinstance(job.config.optim, OptimConfig)
        return job.config.optim

    def _new_evaluations(self) -> list[Evaluation]:
        return [Evaluation(self.task) for _ in self.runs]


class Ticks(IterableDataset[int]):
    """An endless loader: which examples a slot sees next is the slot's business."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class HeldOut(IterableDataset[Batch]):
    """The validation split in batches for as many slots as the pack has when an evaluation begins."""

    def __init__(self, module: PackModule, *, rows: int) -> None:
        """Takes the rows of a batch over all slots."""
        self.module = module
        self.rows = rows

    def __iter__(self) -> Iterator[Batch]:
        split, slots = self.module.inputs.splits.validation, len(self.module.runs)
        yield from evaluation_loader(split, batch_size=max(1, self.rows // slots))


def _matching_state(state_file: Path, jobs: Sequence[Job]) -> PackState | None:
    """The state of the pack that these jobs resume; None where they begin another one."""
    state = read_pack_state(state_file)
    if state is None:
        return None
    slots = [(slot.folder_name, slot.step) for slot in state.slots]
    return state if slots == [(job.place.folder.name, job.start_step) for job in jobs] else None


def slot_batch(split: Split, micros: Sequence[MicroBatch], *, model: nn.Module) -> Batch:
    """Returns a batch of the rows of all slots, slot-major, and tells the packed model how long each slot's are."""
    longest = [int(split.lengths[torch.tensor(micro.indices)].max()) for micro in micros]
    set_row_lengths(model, longest if len(set(longest)) > 1 else None)
    return split.batch([index for micro in micros for index in micro.indices], slots=len(micros))


def slot_losses(task: Task, model: nn.Module, batch: Batch, *, slots: int) -> Tensor:
    """Returns the sum of the losses of each slot's rows, in fp32, (slots,)."""
    return task.losses(model, batch).view(slots, -1).sum(1)


def _fit(module: PackModule, config: RunConfig, inputs: RunInputs) -> None:
    settings = config.trainer
    with quiet_lightning(), deterministic_algorithms(settings.deterministic):
        trainer = lightning.Trainer(
            accelerator=resolve_device(settings),
            devices=1,
            precision="32-true",  # the base is in its own dtype and LoRA casts by itself
            logger=False,
            max_epochs=1,
            val_check_interval=settings.eval_every_steps * module.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            inference_mode=False,  # slots are refilled while evaluating, and what is made then must train
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # A DataLoader draws a seed at every start: from this generator, not from torch's own, which slots may share.
        draws = torch.Generator().manual_seed(0)
        held_out = HeldOut(module, rows=settings.eval_batch_size)
        trainer.fit(
            module,
            DataLoader(Ticks(), batch_size=None, generator=draws),
            DataLoader(held_out, batch_size=None, generator=draws),
        )

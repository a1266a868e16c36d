"""Many runs at once on one frozen base: a packed model whose slots are trained, evaluated, freed and refilled.

A run in a slot is the run that `run.train_run` would train alone: same data order, initial values, dropout stream,
schedule and metrics. Two things differ: rounding, since kernels vary with shape, and random draws that have no stream
per slot, such as dropout inside a fused attention kernel; the record then says so.

A pack is a plain loop, not a `lightning.Trainer`: its runs have different steps, schedules and ends, of which a Trainer
knows one. Each evaluation ends in a boundary. A pack that is killed at any moment resumes at the last boundary that was
committed, with the same slots at the same steps, and repeats to the bit what came after it. That holds because of the
order of the actions at a boundary:

1. Of every slot the rows, the kept weights and the record are written. A slot that diverged fails here.
2. The values of all slots that are left are reported in one call.
3. Each run is found complete or paused, or it continues. A run to pause gets its checkpoint first, since whoever hears
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import OptimConfig, ScheduleConfig
from lorasweep.data.batching import EvaluationSampler, MicroBatch
from lorasweep.data.split import Batch, Split, move_batch, repeat_batch
from lorasweep.data.tasks import Evaluation, Task
from lorasweep.errors import Diverged
from lorasweep.lora import (
    compact_slots,
    fill_slot,
    inject_packed_lora,
    load_slot,
    lora_state,
    save_adapter,
    set_dropout_streams,
    slot_model,
    split_lora_parameters,
)
from lorasweep.lora.packed.inject import set_row_lengths
from lorasweep.methods import add_head_to_modules_to_save, copy_sharing_weights, draw_head
from lorasweep.record import RunStatus
from lorasweep.training.checkpoint import remove_checkpoints, remove_older_checkpoints
from lorasweep.training.environment import deterministic_algorithms, device_of, reset_peak_memory
from lorasweep.training.failures import convert_memory_errors, status_after
from lorasweep.training.inputs import RunInputs, resolve_accumulate
from lorasweep.training.optim import schedule_factor
from lorasweep.training.packs.optim import StackedAdamW
from lorasweep.training.packs.slots import NextRun, OnPackEvaluation, RunRequest, SlotEvaluation, SlotRun
from lorasweep.training.packs.state import (
    PackState,
    SlotState,
    read_pack_state,
    read_shared_stream,
    restore_shared_stream,
    write_pack_state,
)
from lorasweep.training.run import never_stop
from lorasweep.training.run_log import Values, end_at_evaluation


def train_pack(
    requests: Sequence[RunRequest],
    *,
    inputs: RunInputs,
    slots: int,
    next_run: NextRun,
    on_evaluation: OnPackEvaluation,
    state_file: Path,
    stop_requested: Callable[[], bool] = never_stop,
) -> bool:
    """Trains runs together, and those that `next_run` gives as slots become free, until none is left.

    A pack that was killed or interrupted leaves `state_file`. It resumes if it is given the runs of that file in the
    order of its slots, each with its step as `start_step`. It may then report evaluations and ends of runs again;
    `next_run` must give again the runs that it gave since the committed boundary.

    Args:
        requests: The first runs, one per slot. They have the same model, data and trainer settings.
        inputs: Base model and data.
        slots: Most slots of a pack of these runs. It decides the micro-batches of a step, so that a run has the same
            ones in every pack.
        next_run: Called for each free slot, unless the pack has at most half of `slots`: such a pack ends with the runs
            that it has, and the caller begins a full one.
        on_evaluation: Takes the evaluations of all slots at once and returns for each whether its run continues. Its
            answer has no effect on a run that is complete, by its last step or by early stopping.
        state_file: The file that says where the pack resumes, see `packs.state`.
        stop_requested: Called after every step; returns whether to stop.

    Returns:
        Whether every run ended; False if the pack was stopped.

    Raises:
        OutOfMemory: The pack does not fit. After this and any other error that would come again, the state file is
            gone: its runs can resume from their newest checkpoints, in a smaller pack.
    """
    reset_peak_memory()
    pack: PackTrainer | None = None
    settings = requests[0].config.trainer
    try:
        with (
            convert_memory_errors(),
            deterministic_algorithms(settings.deterministic),
            inputs.telemetry.phase("loading"),
        ):
            pack = PackTrainer(
                requests,
                inputs=inputs,
                slots=slots,
                next_run=next_run,
                on_evaluation=on_evaluation,
                state_file=state_file,
            )
            return pack.run(stop_requested)
    except Exception as error:
        if status_after(error, state_file.parent) != "interrupted":  # the fault of neither the disk nor this process
            state_file.unlink(missing_ok=True)
            if pack is not None:
                pack.remove_checkpoints_of_ended()
        raise
    finally:
        if pack is not None:
            pack.model.cpu()  # the base shares its weights with the model, and was there before


class PackTrainer:
    """A packed model, its stacked optimizer and the runs in its slots."""

    def __init__(
        self,
        requests: Sequence[RunRequest],
        *,
        inputs: RunInputs,
        slots: int,
        next_run: NextRun,
        on_evaluation: OnPackEvaluation,
        state_file: Path,
    ) -> None:
        """Builds the packed model and opens the runs, at their beginning or at their checkpoints."""
        settings = requests[0].config.trainer
        self.inputs = inputs
        self.slots = slots
        self.next_run = next_run
        self.on_evaluation = on_evaluation
        self.state_file = state_file
        self.settings = settings
        self.device = device_of(settings)
        self.task = inputs.splits.task
        resumed = _matching_state(state_file, requests)
        self.accumulate = resolve_accumulate(settings, inputs.splits.train, slots=slots)
        self.runs = [self._open(request, slot=slot, slots=len(requests)) for slot, request in enumerate(requests)]
        self.model: nn.Module = copy_sharing_weights(inputs.base.model)
        self.draw_head = functools.partial(draw_head, names=inputs.base.new_head_names)
        coverages = inject_packed_lora(
            self.model,
            [self._method(request) for request in requests],
            generators=[torch.Generator().manual_seed(request.config.seeds.init) for request in requests],
            prepare_copy=self.draw_head,
        )
        self.model.to(self.device).train()
        self.optimizer = StackedAdamW(split_lora_parameters(self.model), [_optim(request) for request in requests])
        for slot, coverage in enumerate(coverages):
            self._restore(slot, trainable_params=coverage.trainable_params)
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        # Torch's own stream is set last: it must not depend on the draws of loading and building.
        if resumed is None:
            torch.manual_seed(requests[0].config.seeds.dropout)
        else:
            restore_shared_stream(resumed.shared_stream, self.device)
        self.paused: list[Path] = []
        """Folders of runs that were paused since the last commit."""
        self.ended: list[Path] = []
        """Folders of runs that are complete or failed since the last commit."""
        self.shares_draws: bool | None = None
        """Whether a step draws from torch's own stream, so for all slots together; None before the first step."""
        self.boundary_at = time.monotonic()

    def run(self, stop_requested: Callable[[], bool]) -> bool:
        """Trains until every run has ended; returns False if the pack was stopped before."""
        self._commit()
        while self.runs:
            for _ in range(self.settings.eval_every_steps):
                self._train_step()
                if stop_requested():
                    self._interrupt()
                    return False
            self._end_interval(self._evaluate())
        return True

    def remove_checkpoints_of_ended(self) -> None:
        """Removes the checkpoints of runs that are complete or failed since the last commit."""
        for folder in self.ended:
            remove_checkpoints(folder)

    def _train_step(self) -> None:
        """Makes one optimizer step in every slot."""
        self.inputs.telemetry.switch("training")
        started = time.perf_counter()
        micro_losses = []
        tokens = 0
        shared = None if self.shares_draws is not None else read_shared_stream(self.device)
        # Every slot cuts its step into the same number of micro-batches, of the same sizes.
        for micros in zip(*(run.order.step(run.step) for run in self.runs), strict=True):
            batch = slot_batch(self.inputs.splits.train, micros, model=self.model)
            losses = slot_losses(self.task, self.model, move_batch(batch, self.device), slots=len(micros))
            # Each slot divides by its own weight, as alone. The sum over slots then gives each slot its own gradients.
            losses = losses / torch.tensor([micro.step_weight for micro in micros], device=losses.device)  # (slots,)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            micro_losses.append(losses.detach())
            positions = batch["input_ids"].numel() // len(micros)
            for run, micro in zip(self.runs, micros, strict=True):
                tokens += run.count_tokens(micro, positions=positions)
        if shared is not None:
            self.shares_draws = shared != read_shared_stream(self.device)
        self._step_optimizer(torch.stack(micro_losses, dim=1))
        self.inputs.telemetry.add_tokens(tokens)
        seconds = (time.perf_counter() - started) / len(self.runs)
        for run in self.runs:
            run.progress.train_s += seconds

    def _step_optimizer(self, losses: Tensor) -> None:
        """Steps each slot at its own learning rate, and logs its losses of each micro-batch, (slots, micro-batches)."""
        factors = []
        for run in self.runs:
            config = run.request.config
            assert isinstance(config.schedule, ScheduleConfig)
            factors.append(
                schedule_factor(config.schedule, run.step, max_steps=config.trainer.max_steps, lr=config.optim.lr)
            )
        self.optimizer.lr_factors = factors
        self.optimizer.clip_slots()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for run, own, factor in zip(self.runs, losses, factors, strict=True):
            run.step += 1
            run.log.note_step(run.step, own, run.request.config.optim.lr * factor)

    @torch.no_grad()
    def _evaluate(self) -> list[Values]:
        """Returns the metrics of each slot on the validation split."""
        self.inputs.telemetry.switch("evaluating")
        split, slots = self.inputs.splits.validation, len(self.runs)
        evaluations = [Evaluation(self.task) for _ in self.runs]
        # The batches depend on the slots that there are now: a pack that resumes does not know how many it had before.
        batches = EvaluationSampler(split, batch_size=max(1, self.settings.eval_batch_size // slots))
        set_row_lengths(self.model, None)  # every slot evaluates the same rows
        self.model.eval()
        for micro in batches:
            batch = repeat_batch(move_batch(split.batch(micro.indices), self.device), slots=slots)
            scores = self.task.score(self.model, batch)
            for slot, evaluation in enumerate(evaluations):
                evaluation.update(scores.of_slot(slot, slots=slots))
        computed = [evaluation.compute() for evaluation in evaluations]
        return [{name: float(value) for name, value in metrics.items()} for metrics in computed]

    @torch.no_grad()
    def _end_interval(self, metrics: Sequence[Values]) -> None:
        """Does the actions of a boundary. Their order is explained at the top of this file."""
        self.inputs.telemetry.switch("saving")
        self._share_time()
        alive = [slot for slot, run in enumerate(self.runs) if self._note_evaluation(slot, run, metrics[slot])]
        continues = self._report(alive)
        freed = [
            slot
            for slot, run in enumerate(self.runs)
            if slot not in continues or self._end_if_due(slot, run, pauses=not continues[slot])
        ]
        is_refilled = 2 * len(self.runs) > self.slots
        empty = [slot for slot in freed if not (is_refilled and self._refill(slot))]
        if len(empty) == len(self.runs):
            self.runs = []
            self.state_file.unlink(missing_ok=True)  # the commit: nothing is left to resume
            self._remove_checkpoints()
            return
        if freed:
            self._compact([slot for slot in range(len(self.runs)) if slot not in empty])
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        self.model.train()  # here and not before: layers of refilled slots begin in the mode of the model
        for slot, run in enumerate(self.runs):
            self._save_checkpoint(slot, run)
        self._commit()
        self._remove_checkpoints()
        self.boundary_at = time.monotonic()

    def _note_evaluation(self, slot: int, run: SlotRun, metrics: Values) -> bool:
        """Writes a slot's evaluation, and returns whether its run is alive: one that diverged fails."""
        assert run.record.pack is not None
        run.record.pack["shared_draws"] = bool(self.shares_draws)
        try:
            run.note_evaluation(metrics, save=lambda folder: self._save_weights(slot, folder))
        except Diverged as error:
            self._close(run, "failed", str(error))
            run.request.on_failure(error)
            return False
        return True

    def _report(self, slots: Sequence[int]) -> dict[int, bool]:
        """Reports the evaluations of these slots in one call, and returns for each whether its run continues."""
        if not slots:
            return {}
        runs = [self.runs[slot] for slot in slots]
        evaluations = [SlotEvaluation(request=run.request, step=run.step, values=run.record.last) for run in runs]
        return dict(zip(slots, self.on_evaluation(evaluations), strict=True))

    def _end_if_due(self, slot: int, run: SlotRun, *, pauses: bool) -> bool:
        """Closes a run that is complete or to be paused, and returns whether it was."""
        end = end_at_evaluation(run.record, run.request.config.trainer, pauses=pauses)
        if end is None:
            return False
        if end[0] == "paused":
            self._save_checkpoint(slot, run)
        self._close(run, *end)
        run.request.on_end(run.record)
        return True

    def _close(self, run: SlotRun, status: RunStatus, reason: str | None) -> None:
        run.close(status, reason)
        (self.paused if status == "paused" else self.ended).append(run.request.place.folder)

    def _interrupt(self) -> None:
        """Closes the runs as interrupted. The pack resumes from its last boundary."""
        self._share_time()
        for run in self.runs:
            run.close("interrupted", f"stopped after step {run.step} of {run.record.steps_planned}")

    def _refill(self, slot: int) -> bool:
        """Puts the next run into a slot; returns False if none is left."""
        request = self.next_run()
        if request is None:
            return False
        self.runs[slot] = self._open(request, slot=slot, slots=len(self.runs))
        generator = torch.Generator().manual_seed(request.config.seeds.init)
        coverage = fill_slot(self.model, slot, self._method(request), generator=generator, prepare_copy=self.draw_head)
        self.optimizer.replace_parameters(split_lora_parameters(self.model))
        self.optimizer.reset_slot(slot, _optim(request))
        self._restore(slot, trainable_params=coverage.trainable_params)
        return True

    def _open(self, request: RunRequest, *, slot: int, slots: int) -> SlotRun:
        return SlotRun(request, inputs=self.inputs, slot=slot, slots=slots, accumulate=self.accumulate)

    def _restore(self, slot: int, *, trainable_params: int) -> None:
        """Notes how much a slot's run trains, and loads the weights and moments of the checkpoint that it resumes."""
        run = self.runs[slot]
        run.record.trainable_params = trainable_params
        run.record.trainable_fraction = trainable_params / run.record.total_params
        if run.checkpoint:
            load_slot(self.model, slot, run.checkpoint["adapter"])
            moments = run.checkpoint["moments"]
            by_parameter = {p: moments[name] for name, p in self.model.named_parameters() if name in moments}
            self.optimizer.load_slot(slot, by_parameter, num_steps=run.step)
            run.checkpoint = {}

    def _compact(self, kept: list[int]) -> None:
        """Drops the other slots, and the ranks and layers of runs that are gone: a resumed pack has none of them."""
        compact_slots(self.model, kept)
        self.optimizer.replace_parameters(split_lora_parameters(self.model), kept_slots=kept)
        self.runs = [self.runs[slot] for slot in kept]

    def _save_checkpoint(self, slot: int, run: SlotRun) -> None:
        """Writes a slot's checkpoint, unless it has one of this step."""
        if run.step == run.saved_step:
            return
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {names[p]: list(pair) for p, pair in self.optimizer.slot_moments(slot).items()}
        run.save_checkpoint({"adapter": lora_state(slot_model(self.model, slot)), "moments": moments})

    def _save_weights(self, slot: int, folder: Path) -> None:
        base = self.inputs.base
        model = slot_model(self.model, slot)
        save_adapter(model, folder, base_path=base.path, base_fingerprint=base.fingerprint)

    def _commit(self) -> None:
        slots = tuple(SlotState(folder_name=run.request.place.folder.name, step=run.step) for run in self.runs)
        stream = read_shared_stream(self.device)
        write_pack_state(self.state_file, PackState(slots=slots, shared_stream=stream))

    def _remove_checkpoints(self) -> None:
        """Removes the checkpoints that nothing needs since the commit."""
        for folder in [*(run.request.place.folder for run in self.runs), *self.paused]:
            remove_older_checkpoints(folder, kind="slot")
        self.remove_checkpoints_of_ended()
        self.paused, self.ended = [], []

    def _share_time(self) -> None:
        """Divides the seconds since the last boundary among the runs."""
        share = (time.monotonic() - self.boundary_at) / len(self.runs)
        for run in self.runs:
            run.wall_s += share

    def _method(self, request: RunRequest) -> LoraConfig:
        assert isinstance(request.config.method, LoraConfig)
        return add_head_to_modules_to_save(request.config.method, self.inputs.base.new_head_names)


def _optim(request: RunRequest) -> OptimConfig:
    assert isinstance(request.config.optim, OptimConfig)
    return request.config.optim


def _matching_state(state_file: Path, requests: Sequence[RunRequest]) -> PackState | None:
    """Returns the state of the pack that these runs resume; None if they begin another one."""
    state = read_pack_state(state_file)
    if state is None:
        return None
    slots = [(slot.folder_name, slot.step) for slot in state.slots]
    wanted = [(request.place.folder.name, request.start_step) for request in requests]
    return state if slots == wanted else None


def slot_batch(split: Split, micros: Sequence[MicroBatch], *, model: nn.Module) -> Batch:
    """Returns a batch of the examples of all slots, slot-major, and tells the packed model each slot's length."""
    longest = [int(split.lengths[torch.tensor(micro.indices)].max()) for micro in micros]
    set_row_lengths(model, longest if len(set(longest)) > 1 else None)
    return split.batch([index for micro in micros for index in micro.indices], slots=len(micros))


def slot_losses(task: Task, model: nn.Module, batch: Batch, *, slots: int) -> Tensor:
    """Returns the sum of the losses of each slot's examples, in fp32, (slots,)."""
    return task.losses(model, batch).view(slots, -1).sum(1)

"""Trains several runs at once on one frozen base, in the slots of a packed model that are freed and refilled.

A run in a slot equals the run that `run.train_run` trains alone: data order, initial values, dropout stream, schedule
and metrics are the same. Two things differ. Sums are rounded differently, because kernels vary with shape. Random draws
that have no stream per slot, such as dropout inside a fused attention kernel, differ too; the record says so.

A pack is a plain loop, not a `lightning.Trainer`: a Trainer knows one schedule and one end, but each run has its own.
Each evaluation ends in a boundary. A killed pack resumes at the last committed boundary with the same slots at the same
steps, and then repeats every bit. This requires the following order of actions at a boundary:

1. Write the log rows, the weights and the record of every slot. A run that diverged fails here.
2. Report the values of all remaining slots in one call.
3. Decide for each run: it is complete, is paused, or continues. A paused run first gets its checkpoint, because another
   worker may resume it as soon as the pause is told.
4. Refill free slots in slot order. Drop slots that stay empty.
5. Write the checkpoints of all slots.
6. Replace the state file. This is the commit. Before it, the previous boundary is valid, so no file that a pack needs
   to resume there may be removed.
7. Remove older checkpoints, and the checkpoints of runs that ended.

Shapes, batches and random streams after a boundary depend only on the state file and the checkpoints.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import OptimConfig, RunConfig, ScheduleConfig
from lorasweep.data.batching import EvaluationSampler, MicroBatch
from lorasweep.data.split import Batch, Split, move_batch, repeat_batch
from lorasweep.data.tasks import Evaluation, Task
from lorasweep.errors import Diverged
from lorasweep.lora import (
    Coverage,
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
from lorasweep.lora.packed.inject import set_sequence_lengths
from lorasweep.methods import add_head_to_modules_to_save, copy_sharing_weights, draw_head
from lorasweep.record import RunStatus
from lorasweep.training.checkpoint import remove_checkpoints, remove_older_checkpoints
from lorasweep.training.environment import deterministic_algorithms, get_device, reset_peak_memory
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
from lorasweep.training.run_log import Metrics, find_run_end


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
    """Trains runs together, and the runs that `next_run` returns as slots become free, until no run is left.

    A pack that was killed or interrupted leaves `state_file`. To resume it, pass the runs of that file in slot order,
    each with its step as `start_step`. The pack may then report evaluations and ends of runs a second time, and
    `next_run` must return again the runs that it returned since the last commit.

    Args:
        requests: The first runs, one per slot. They have the same model, data and trainer settings.
        inputs: Base model and data.
        slots: Maximum number of slots in packs of these runs. It decides how a step is cut into micro-batches, so that
            a run has the same micro-batches in every pack.
        next_run: Called for each free slot while the pack has more than half of `slots`. A smaller pack is not
            refilled: it ends with its runs, and the caller begins a full one.
        on_evaluation: Takes the evaluations of all slots at once and returns for each whether its run continues. A run
            that is complete (last step or early stopping) ends whatever the answer is.
        state_file: The file from which the pack resumes, see `packs.state`.
        stop_requested: Called after every step; returns whether to stop.

    Returns:
        Whether every run ended; False if the pack was stopped.

    Raises:
        OutOfMemory: The pack does not fit. After this and any other error that would come again, the state file is
            removed: each run can resume from its newest checkpoint in a smaller pack.
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
                requests=requests,
                inputs=inputs,
                slots=slots,
                next_run=next_run,
                on_evaluation=on_evaluation,
                state_file=state_file,
            )
            return pack.run(stop_requested)
    except Exception as error:
        # A full disk or a dying process is not the pack's fault: it resumes as it was. Other errors would come again.
        if status_after(error, state_file.parent) != "interrupted":
            state_file.unlink(missing_ok=True)
            if pack is not None:
                pack.remove_old_checkpoints()
        raise
    finally:
        if pack is not None:
            pack.model.cpu()  # moves the base back too: it shares its weights with the packed model


@dataclass(kw_only=True, eq=False)
class PackTrainer:
    """A packed model, its stacked optimizer and the runs in its slots. The arguments are those of `train_pack`."""

    requests: InitVar[Sequence[RunRequest]]
    inputs: RunInputs
    slots: int
    next_run: NextRun
    on_evaluation: OnPackEvaluation
    state_file: Path

    def __post_init__(self, requests: Sequence[RunRequest]) -> None:
        inputs, self.settings = self.inputs, requests[0].config.trainer
        self.device = get_device(self.settings)
        self.task = inputs.splits.task
        self.accumulate = resolve_accumulate(self.settings, inputs.splits.train, slots=self.slots)
        self.runs = [self._open(request, slot=slot, slots=len(requests)) for slot, request in enumerate(requests)]
        self.model, coverages = build_pack([request.config for request in requests], inputs=inputs)
        self.optimizer = StackedAdamW(split_lora_parameters(self.model), [_optim(request) for request in requests])
        for slot, coverage in enumerate(coverages):
            self._restore(slot, trainable_params=coverage.trainable_params)
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        # Torch's global stream is set last, because loading and building draw from it.
        resumed = read_pack_state(self.state_file) if requests[0].start_step is not None else None
        if resumed is None:
            torch.manual_seed(requests[0].config.seeds.dropout)
        else:
            restore_shared_stream(resumed.shared_stream, self.device)
        self.closed_runs: list[SlotRun] = []
        """Runs that ended or were paused since the last commit."""
        self.shares_draws: bool | None = None
        """Whether a step draws from torch's global stream, for all slots together; None before the first step."""
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

    def remove_old_checkpoints(self) -> None:
        """Removes the checkpoints that no run needs after a commit."""
        for run in (*self.runs, *self.closed_runs):
            if run.record.status in ("running", "paused"):
                remove_older_checkpoints(run.folder, kind="slot")
            else:
                remove_checkpoints(run.folder)
        self.closed_runs = []

    def _train_step(self) -> None:
        self.inputs.telemetry.switch("training")
        started = time.perf_counter()
        micro_losses = []
        tokens = 0
        stream_before = None if self.shares_draws is not None else read_shared_stream(self.device)  # first step only
        # Every slot cuts its step into the same number of micro-batches, of the same sizes.
        for micros in zip(*(run.order.step(run.step) for run in self.runs), strict=True):
            batch = slot_batch(self.inputs.splits.train, micros, model=self.model)
            losses = slot_losses(self.task, self.model, move_batch(batch, self.device), slots=len(micros))
            # Each slot divides by its own weight, as a run alone does. No weight belongs to two slots, so the backward
            # pass of the sum over slots computes each slot's own gradients.
            losses = losses / torch.tensor([micro.step_weight for micro in micros], device=losses.device)  # (slots,)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            micro_losses.append(losses.detach())
            positions = batch["input_ids"].numel() // len(micros)
            for run, micro in zip(self.runs, micros, strict=True):
                tokens += run.count_tokens(micro, positions=positions)
        if stream_before is not None:
            self.shares_draws = stream_before != read_shared_stream(self.device)
        self._step_optimizer(torch.stack(micro_losses, dim=1))
        self.inputs.telemetry.add_tokens(tokens)
        seconds = (time.perf_counter() - started) / len(self.runs)
        for run in self.runs:
            run.progress.train_s += seconds

    def _step_optimizer(self, losses: Tensor) -> None:
        """Steps each slot at its own learning rate, and logs the losses, (slots, micro-batches)."""
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
        for run, run_losses, factor in zip(self.runs, losses, factors, strict=True):
            run.step += 1
            run.log.note_step(run.step, run_losses, run.request.config.optim.lr * factor)

    @torch.no_grad()
    def _evaluate(self) -> list[Metrics]:
        self.inputs.telemetry.switch("evaluating")
        split, slots = self.inputs.splits.validation, len(self.runs)
        evaluations = [Evaluation(self.task) for _ in self.runs]
        # The batch size depends on the present slots only: a resumed pack does not know how many it had before.
        batches = EvaluationSampler(split, batch_size=max(1, self.settings.eval_batch_size // slots))
        set_sequence_lengths(self.model, None)  # every slot evaluates the same rows
        self.model.eval()
        for micro in batches:
            batch = repeat_batch(move_batch(split.batch(micro.indices), self.device), slots=slots)
            scores = self.task.score(self.model, batch)
            for slot, evaluation in enumerate(evaluations):
                evaluation.update(scores.of_slot(slot, slots=slots))
        computed = [evaluation.compute() for evaluation in evaluations]
        return [{name: float(value) for name, value in metrics.items()} for metrics in computed]

    @torch.no_grad()
    def _end_interval(self, metrics: Sequence[Metrics]) -> None:
        """Does the actions of a boundary. The numbers are those of the list at the top of this file."""
        self.inputs.telemetry.switch("saving")
        self._share_time()
        # 1: A diverged run is no longer alive.
        alive = [slot for slot, run in enumerate(self.runs) if self._note_evaluation(slot, run, metrics[slot])]
        # 2: One call for all slots, so that trials are compared before any of them is paused.
        evaluations = [
            SlotEvaluation(request=run.request, step=run.step, metrics=run.record.last)
            for run in (self.runs[slot] for slot in alive)
        ]
        answers = self.on_evaluation(evaluations) if alive else []
        continues = dict(zip(alive, answers, strict=True))  # whether the run in a slot trains on
        # 3
        freed = [
            slot
            for slot, run in enumerate(self.runs)
            if slot not in continues or self._end_if_due(slot, run, should_pause=not continues[slot])
        ]
        # 4: A pack that shrank to half is not refilled: the caller begins a full one, which trains faster.
        is_refilled = 2 * len(self.runs) > self.slots
        empty = [slot for slot in freed if not (is_refilled and self._refill(slot))]
        if len(empty) == len(self.runs):
            self.runs = []
            self.state_file.unlink(missing_ok=True)  # 6: no run is left to resume
            self.remove_old_checkpoints()
            return
        if freed:
            self._compact([slot for slot in range(len(self.runs)) if slot not in empty])
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        self.model.train()  # after the refill, because the layers of refilled slots take over the model's mode
        # 5 to 7
        for slot, run in enumerate(self.runs):
            self._save_checkpoint(slot, run)
        self._commit()
        self.remove_old_checkpoints()
        self.boundary_at = time.monotonic()

    def _note_evaluation(self, slot: int, run: SlotRun, metrics: Metrics) -> bool:
        """Writes a slot's evaluation. Returns False if its run diverged, which ends the run."""
        assert run.record.pack is not None
        run.record.pack["shared_draws"] = bool(self.shares_draws)
        try:
            run.note_evaluation(metrics, save=lambda folder: self._save_weights(slot, folder))
        except Diverged as error:
            self._close(run, "failed", str(error))
            run.request.on_end(error)
            return False
        return True

    def _end_if_due(self, slot: int, run: SlotRun, *, should_pause: bool) -> bool:
        """Closes a run that is complete or to be paused, and returns whether it was."""
        end = find_run_end(run.record, run.request.config.trainer, should_pause=should_pause)
        if end is None:
            return False
        if end[0] == "paused":
            self._save_checkpoint(slot, run)
        self._close(run, *end)
        run.request.on_end(run.record)
        return True

    def _close(self, run: SlotRun, status: RunStatus, reason: str | None) -> None:
        run.close(status, reason)
        self.closed_runs.append(run)

    def _interrupt(self) -> None:
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
        method, prepare_copy = _slot_method(request.config, self.inputs), _draw_head(self.inputs)
        coverage = fill_slot(self.model, slot, method, generator=generator, prepare_copy=prepare_copy)
        self.optimizer.replace_parameters(split_lora_parameters(self.model))
        self.optimizer.reset_slot(slot, _optim(request))
        self._restore(slot, trainable_params=coverage.trainable_params)
        return True

    def _open(self, request: RunRequest, *, slot: int, slots: int) -> SlotRun:
        return SlotRun(request, inputs=self.inputs, slot=slot, slots=slots, accumulate=self.accumulate)

    def _restore(self, slot: int, *, trainable_params: int) -> None:
        """Notes a run's number of trained parameters, and loads weights and moments if it resumes a checkpoint."""
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
        """Keeps only these slots, and only the ranks and layers that they need, as a pack that resumes here has."""
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
        slots = tuple(SlotState(folder_name=run.folder.name, step=run.step) for run in self.runs)
        stream = read_shared_stream(self.device)
        write_pack_state(self.state_file, PackState(slots=slots, shared_stream=stream))

    def _share_time(self) -> None:
        """Divides the seconds since the last boundary among the runs."""
        share = (time.monotonic() - self.boundary_at) / len(self.runs)
        for run in self.runs:
            run.wall_s += share


def _optim(request: RunRequest) -> OptimConfig:
    assert isinstance(request.config.optim, OptimConfig)
    return request.config.optim


def build_pack(configs: Sequence[RunConfig], *, inputs: RunInputs) -> tuple[nn.Module, list[Coverage]]:
    """Returns a packed model with a slot for each run, ready to train, and what each slot adapts.

    The model shares the weights of the base, which moves to the runs' device with it.
    """
    model: nn.Module = copy_sharing_weights(inputs.base.model)
    coverages = inject_packed_lora(
        model,
        [_slot_method(config, inputs) for config in configs],
        generators=[torch.Generator().manual_seed(config.seeds.init) for config in configs],
        prepare_copy=_draw_head(inputs),
    )
    return model.to(get_device(configs[0].trainer)).train(), coverages


def _slot_method(config: RunConfig, inputs: RunInputs) -> LoraConfig:
    assert isinstance(config.method, LoraConfig)
    return add_head_to_modules_to_save(config.method, inputs.base.new_head_names)


def _draw_head(inputs: RunInputs) -> functools.partial[None]:
    return functools.partial(draw_head, names=inputs.base.new_head_names)


def slot_batch(split: Split, micros: Sequence[MicroBatch], *, model: nn.Module) -> Batch:
    """Returns a batch of the examples of all slots, slot-major, and tells the packed model each slot's length."""
    longest = [int(split.lengths[torch.tensor(micro.indices)].max()) for micro in micros]
    set_sequence_lengths(model, longest if len(set(longest)) > 1 else None)
    return split.batch([index for micro in micros for index in micro.indices], slots=len(micros))


def slot_losses(task: Task, model: nn.Module, batch: Batch, *, slots: int) -> Tensor:
    """Returns the sum of the losses of each slot's examples, in fp32, (slots,)."""
    return task.losses(model, batch).view(slots, -1).sum(1)

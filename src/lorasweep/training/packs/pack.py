"""Trains several runs together on one frozen base model. When a run ends, another run gets its slot.

A run in a slot equals its solo run with `run.train_alone`: data order, initial values, dropout stream, schedule and
metrics are the same. There are two differences. Sums are rounded differently, because kernels depend on the shape. And
some random numbers have no stream per slot, such as those of dropout inside a fused attention kernel. The record then
says so (`pack.shared_draws`).

A pack is a plain loop and not a `lightning.Trainer`, because each run has its own schedule and its own last step.

Each evaluation is a boundary. A killed pack resumes at the last committed boundary, and then computes the same bits as
if it had not been killed. This requires the following order of actions at a boundary:

1. Write the log rows, the weights and the record of every slot. A run that diverged fails here.
2. Report the evaluations of all remaining slots in one call.
3. Decide for each run: it is complete, is stopped, or continues. Score the best weights of a complete run.
4. Refill free slots in slot order, and drop slots that stay empty. If all were refilled, add slots for further runs.
5. Replace the pack's checkpoint, which has the states of all slots. This is the commit. A pack that is killed before it
   resumes from the previous boundary.

Shapes, batches and random streams after a boundary depend only on the checkpoint.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.batching import EvaluationSampler, MicroBatch
from lorasweep.data.rows import Batch, Rows, move_batch
from lorasweep.errors import Diverged
from lorasweep.lora import (
    Coverage,
    compact_slots,
    fill_slot,
    inject_packed_lora,
    save_adapter,
    set_dropout_streams,
    slot_model,
)
from lorasweep.lora.packed.inject import find_slots
from lorasweep.methods import bind, copy_sharing_weights, draw_head
from lorasweep.objectives.objective import read_metrics
from lorasweep.record import RunRecord, RunStatus
from lorasweep.training.checkpoint import (
    PackCheckpoint,
    read_rng_state,
    remove_checkpoints,
    restore_rng_state,
    split_pack,
    write_pack,
)
from lorasweep.training.environment import deterministic_algorithms, get_device
from lorasweep.training.evaluation import evaluate_slots
from lorasweep.training.finished_run import score_best_weights
from lorasweep.training.memory import convert_memory_errors, reset_peak_memory
from lorasweep.training.open_run import Metrics, RunEvaluation, RunRequest, find_run_end, status_after
from lorasweep.training.packs.slot_run import SlotOptimizer, SlotRun, step_slots
from lorasweep.training.prepare import checkpoint_activations, save_block_contexts
from lorasweep.training.progress import OnPhase, Phase, ignore_phase
from lorasweep.training.run import never_stop
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.step import compute_losses

OnPackEvaluation: TypeAlias = Callable[[Sequence[RunEvaluation]], Sequence[str | None]]
"""Takes the evaluations of all slots, and returns for each slot why its run must stop, or None."""


def train_pack(
    requests: Sequence[RunRequest],
    *,
    inputs: RunInputs,
    slots: int,
    next_run: Callable[[], RunRequest | None],
    on_evaluation: OnPackEvaluation,
    on_end: Callable[[Any, RunRecord | Diverged], None],
    checkpoint_file: Path,
    resumed: PackCheckpoint | None = None,
    stop_requested: Callable[[], bool] = never_stop,
    on_phase: OnPhase = ignore_phase,
) -> bool:
    """Trains runs together, and refills free slots with the runs of `next_run`, until no run is left.

    Returns False if the pack was stopped before. A killed or stopped pack leaves `checkpoint_file`. To resume the pack,
    pass this checkpoint as `resumed` and its runs in slot order. The resumed pack may report evaluations and ends of
    runs a second time. `next_run` must return once more the runs that it returned after the last commit.

    Args:
        requests: The first runs, one per slot. They have the same model, data and trainer settings.
        inputs: Base model and data.
        slots: Maximum number of slots in packs of these runs.
        next_run: Called at each evaluation until the pack has `slots` runs again or no run is left.
        on_evaluation: Called with the evaluations of all slots. A run that is complete ends as complete in any case.
        on_end: Called when a run ends, with its record, or with the error if it failed.
        checkpoint_file: The pack's checkpoint. The folders of the runs are in one folder.
        resumed: The checkpoint of the pack to resume. None: each run resumes from its state in an earlier pack, if any.
        stop_requested: Called before the first and after every step. Returns whether to stop the pack.
        on_phase: Called when a phase begins.

    Raises:
        OutOfMemory: The pack does not fit into memory. After this error, and any other error that would happen again,
            each run gets its part of the checkpoint. It can then resume in a smaller pack.
    """
    reset_peak_memory()
    pack: PackTrainer | None = None
    try:
        with convert_memory_errors(), deterministic_algorithms(requests[0].config.trainer.deterministic):
            pack = PackTrainer(
                requests=requests,
                resumed=resumed,
                inputs=inputs,
                slots=slots,
                next_run=next_run,
                on_evaluation=on_evaluation,
                on_end=on_end,
                checkpoint_file=checkpoint_file,
                on_phase=on_phase,
            )
            return pack.run(stop_requested)
    except Exception as error:
        # After a full disk or a killed process, the same pack can resume. Other errors would happen again.
        if status_after(error) != "interrupted":
            split_pack(checkpoint_file, runs=requests[0].run_folder.path.parent)
        raise
    finally:
        if pack is not None:
            pack.model.cpu()  # the packed model shares the base's weights, so this also moves the base back


@dataclass(kw_only=True, eq=False)
class PackTrainer:
    """A packed model, and the runs in its slots with their optimizers. `train_pack` describes the arguments."""

    requests: InitVar[Sequence[RunRequest]]
    resumed: InitVar[PackCheckpoint | None]
    inputs: RunInputs
    slots: int
    next_run: Callable[[], RunRequest | None]
    on_evaluation: OnPackEvaluation
    on_end: Callable[[Any, RunRecord | Diverged], None]
    checkpoint_file: Path
    on_phase: OnPhase

    def __post_init__(self, requests: Sequence[RunRequest], resumed: PackCheckpoint | None) -> None:
        inputs, self.settings = self.inputs, requests[0].config.trainer
        self.device = get_device(self.settings)
        states = [None] * len(requests) if resumed is None else list(resumed.runs.values())
        self.runs = [
            SlotRun(request, inputs=inputs, slot=slot, slots=len(requests), state=state)
            for slot, (request, state) in enumerate(zip(requests, states, strict=True))
        ]
        self.model, coverages = build_pack(self.configs, inputs=inputs)
        for slot, coverage in enumerate(coverages):
            self._prepare_run(slot, trainable_params=coverage.trainable_params)
        self._arrange(range(len(self.runs)))
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        # torch's global stream is set last, because building the model draws from it.
        if resumed is None:
            torch.manual_seed(requests[0].config.seeds.dropout)
        else:
            restore_rng_state(resumed.rng_state, self.device)
        self.has_shared_draws: bool | None = None
        """Whether a step draws from torch's global stream, which all slots share; None before the first step."""
        self.last_boundary_s = time.monotonic()

    @property
    def configs(self) -> list[RunConfig]:
        return [run.config for run in self.runs]

    def run(self, stop_requested: Callable[[], bool]) -> bool:
        """Trains until every run has ended. Returns False if the pack was stopped before."""
        self._commit()  # so that a pack that is killed before its first boundary can resume
        if stop_requested():  # building the pack may have taken minutes
            self._interrupt()
            return False
        while self.runs:
            for _ in range(self.settings.eval_every_steps):
                self._train_step()
                if stop_requested():
                    self._interrupt()
                    return False
            started = time.perf_counter()
            if self.device.type == "cuda":  # what the GPU still computes belongs to the time of training
                torch.cuda.synchronize(self.device)
            self._share_training_time(started)
            self._process_boundary(self._evaluate())
        return True

    def _begin_phase(self, phase: Phase) -> None:
        first = self.runs[0]
        self.on_phase(phase, first.step, first.record.steps_planned)

    def _train_step(self) -> None:
        """Trains one step of each slot."""
        self._begin_phase("training")
        started = time.perf_counter()
        micro_losses = []
        # shared draws are detected in the first step only
        rng_state_before = read_rng_state(self.device) if self.has_shared_draws is None else None
        # All slots have the same number of micro-batches, of the same sizes.
        slots = find_slots(self.model)
        with slots.stacks.share():
            for micros in zip(*(run.sampler.get_step(run.step) for run in self.runs), strict=True):
                batch = move_batch(build_pack_batch(self.inputs.data.train, micros), self.device)
                losses = compute_losses(self.model, batch, inputs=self.inputs, configs=self.configs, slots=slots)
                # no parameter belongs to two slots, so the gradient of the sum is each slot's gradient
                losses.sum().backward()  # type: ignore[no-untyped-call]
                micro_losses.append(losses.detach())
                for run, micro in zip(self.runs, micros, strict=True):
                    run.add_tokens(micro)
        if rng_state_before is not None:
            self.has_shared_draws = rng_state_before != read_rng_state(self.device)
        rates = step_slots([run.optimizer for run in self.runs])
        for run, run_losses, lr in zip(self.runs, torch.stack(micro_losses, dim=1), rates, strict=True):
            run.step += 1
            run.note_step(run.step, run_losses, lr)
        self._share_training_time(started)

    def _share_training_time(self, started: float) -> None:
        seconds = (time.perf_counter() - started) / len(self.runs)
        for run in self.runs:
            run.progress.train_s += seconds

    @torch.no_grad()
    def _evaluate(self) -> list[Metrics]:
        self._begin_phase("evaluating")
        data, slots = self.inputs.data, find_slots(self.model)
        # The batch size depends only on the number of current slots. A resumed pack does not know earlier numbers.
        batch_size = max(1, self.settings.eval_batch_size // len(self.runs))
        batches = EvaluationSampler(data.validation, batch_size=batch_size, fraction=self.configs[0].eval_fraction)
        with slots.stacks.share(is_training=False):
            evaluations = evaluate_slots(
                self.model, data.validation, batches, objective=data.objective, configs=self.configs
            )
        return read_metrics([evaluation.compute() for evaluation in evaluations])

    @torch.no_grad()
    def _process_boundary(self, metrics: Sequence[Metrics]) -> None:
        """Does the actions of a boundary, numbered as in the list at the top of this file."""
        self._begin_phase("saving")
        self._share_time()
        # 1: a diverged run has no result to report
        alive = [slot for slot, run in enumerate(self.runs) if self._note_evaluation(slot, run, metrics[slot])]
        # 2
        evaluations = [RunEvaluation(self.runs[slot].request, self.runs[slot].step, metrics[slot]) for slot in alive]
        answers = self.on_evaluation(evaluations) if alive else []
        stop_reasons = dict(zip(alive, answers, strict=True))
        # 3
        freed = [
            slot
            for slot, run in enumerate(self.runs)
            if slot not in stop_reasons or self._end_if_due(run, stop_reason=stop_reasons[slot])
        ]
        # 4
        empty = [slot for slot in freed if not self._refill(slot)]
        if len(empty) == len(self.runs):
            self.runs = []
            self.checkpoint_file.unlink(missing_ok=True)  # 5: there is no run to resume
            return
        num_before = len(self.runs)
        # an empty slot means that no run is left
        while not empty and len(self.runs) < self.slots and self._refill(len(self.runs)):
            pass
        if freed or len(self.runs) > num_before:
            self._arrange([slot for slot in range(len(self.runs)) if slot not in empty])
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        # after the refill, because new layers get the model's mode, which is still `eval`
        _set_training_mode(self.model, self.settings)
        # 5
        self._commit()
        self.last_boundary_s = time.monotonic()

    def _note_evaluation(self, slot: int, run: SlotRun, metrics: Metrics) -> bool:
        """Writes the evaluation of a slot. If its run diverged, ends the run and returns False."""
        base, model = self.inputs.base, slot_model(self.model, slot)
        save = functools.partial(save_adapter, model, base_path=base.path)
        assert run.record.pack is not None
        run.record.pack["shared_draws"] = bool(self.has_shared_draws)
        try:
            run.note_evaluation(metrics, save=save)
        except Diverged as error:
            self._end(run, "failed", str(error), error=error)
            return False
        return True

    def _end_if_due(self, run: SlotRun, *, stop_reason: str | None) -> bool:
        """Ends a run if it is complete or must stop, and returns whether it did."""
        end = find_run_end(run.record, run.config.trainer, stop_reason=stop_reason)
        if end is None:
            return False
        status, reason = end
        if status == "complete":
            began = time.monotonic()
            try:
                score_best_weights(run)
            except Diverged as error:
                self._end(run, "failed", str(error), error=error)
                return True
            run.wall_s += time.monotonic() - began  # for this run alone, as outside of packs
        self._end(run, status, reason)
        return True

    def _end(self, run: SlotRun, status: RunStatus, reason: str | None, *, error: Diverged | None = None) -> None:
        record = run.close(status, reason)
        self.on_end(run.request, error or record)

    def _interrupt(self) -> None:
        self._share_time()
        for run in self.runs:
            run.close("interrupted", f"stopped after step {run.step} of {run.record.steps_planned}")

    def _refill(self, slot: int) -> bool:
        """Puts the next run into a slot, or into a new slot after the last. Returns False if no run is left."""
        request = self.next_run()
        if request is None:
            return False
        run = SlotRun(request, inputs=self.inputs, slot=slot, slots=max(len(self.runs), slot + 1))
        self.runs[slot : slot + 1] = [run]
        generator = torch.Generator().manual_seed(request.config.seeds.init)
        method, prepare_copy = _get_slot_config(request.config, self.inputs), _build_head_init(self.inputs)
        coverage = fill_slot(self.model, slot, method, generator=generator, prepare_copy=prepare_copy)
        self._prepare_run(slot, trainable_params=coverage.trainable_params)
        return True

    def _prepare_run(self, slot: int, *, trainable_params: int) -> None:
        """Records a run's number of trained parameters, builds its optimizer, and loads its checkpoint, if any."""
        run, model = self.runs[slot], slot_model(self.model, slot)
        run.note_trained(trainable_params)
        run.optimizer = SlotOptimizer(model, run.config)
        if run.resume_state:
            model.load_state_dict(run.resume_state["trained"], strict=False)  # the checkpoint lacks the base
            run.optimizer.load_state(run.resume_state["optimizer"])
            run.resume_state = {}

    def _arrange(self, kept: Iterable[int]) -> None:
        """Drops all other slots, and sorts the kept ones by rank, because neighbours of similar rank train faster."""
        order = sorted(kept, key=lambda slot: _get_slot_config(self.configs[slot], self.inputs).rank)
        compact_slots(self.model, order)
        self.runs = [self.runs[slot] for slot in order]

    def _commit(self) -> None:
        states = {run.folder.name: run.state(slot_model(self.model, slot)) for slot, run in enumerate(self.runs)}
        write_pack(self.checkpoint_file, PackCheckpoint(runs=states, rng_state=read_rng_state(self.device)))
        for run in self.runs:
            remove_checkpoints(run.folder)  # the run's state in an earlier pack, which broke up

    def _share_time(self) -> None:
        """Adds an equal share of the seconds since the last boundary to each run."""
        share = (time.monotonic() - self.last_boundary_s) / len(self.runs)
        for run in self.runs:
            run.wall_s += share


def build_pack(configs: Sequence[RunConfig], *, inputs: RunInputs) -> tuple[nn.Module, list[Coverage]]:
    """Returns a packed model with a slot for each run, ready to train, and the layers that each slot adapts.

    The model shares the base's weights, so the base moves to the runs' device too.
    """
    model: nn.Module = copy_sharing_weights(inputs.base.model).to(get_device(configs[0].trainer))
    coverages = inject_packed_lora(
        model,
        [_get_slot_config(config, inputs) for config in configs],
        generators=[torch.Generator().manual_seed(config.seeds.init) for config in configs],
        prepare_copy=_build_head_init(inputs),
    )
    _set_training_mode(model, configs[0].trainer)
    return model, coverages


def _set_training_mode(model: nn.Module, settings: TrainerConfig) -> None:
    model.train()
    if settings.activation_checkpointing:
        checkpoint_activations(model, save_block_contexts(find_slots(model)))


def _get_slot_config(config: RunConfig, inputs: RunInputs) -> LoraConfig:
    return bind(config.method).get_slot_config(inputs.base.new_head_names)


def _build_head_init(inputs: RunInputs) -> functools.partial[None]:
    return functools.partial(draw_head, names=inputs.base.new_head_names)


def build_pack_batch(split: Rows, micros: Sequence[MicroBatch]) -> Batch:
    """Returns a slot-major batch of all slots' examples, padded to the longest slot.

    At one step all slots have one length. A run that joined later is at another step.
    """
    lengths = [micro.length for micro in micros]
    batch = split.batch([index for micro in micros for index in micro.indices], length=max(lengths))
    if len(set(lengths)) > 1:
        batch["slot_lengths"] = torch.tensor(lengths)
    return {**batch, "step_weight": torch.tensor([micro.step_weight for micro in micros])}

"""Many runs at once on one frozen base: a LightningModule whose slots are trained, evaluated, freed and refilled.

A run in a slot is the run that `run.train_run` would train alone: same data order, initial values, dropout stream,
schedule and metrics. What differs is rounding, since kernels vary with shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.data.module import TextDataModule
from lorasweep.data.tasks import LanguageModelMetrics
from lorasweep.errors import Diverged, OutOfMemory
from lorasweep.lora.packed import (
    compact_slots,
    fill_slot,
    inject_packed_lora,
    load_slot,
    save_slot,
    set_dropout_streams,
    slot_state,
    split_packed_parameters,
)
from lorasweep.methods import copy_sharing_weights
from lorasweep.training.callbacks import RunStopped
from lorasweep.training.environment import reset_peak_memory, resolve_device
from lorasweep.training.optim import schedule_factor
from lorasweep.training.pack_optim import StackedAdamW
from lorasweep.training.run import never_stop, quiet_lightning
from lorasweep.training.run_log import Values, Workbench, is_out_of_memory
from lorasweep.training.slots import Job, SlotRun, Supply


def train_pack(
    jobs: Sequence[Job],
    *,
    bench: Workbench,
    supply: Supply,
    stop_requested: Callable[[], bool] = never_stop,
) -> bool:
    """Trains jobs together, and what `supply` gives as slots become free, until none is left.

    Args:
        jobs: The first runs, one per slot; their model, data and trainer settings are the same.
        bench: Base model and data.
        supply: Asked for a run whenever a slot is free.
        stop_requested: Asked after every step whether to stop; runs then go on from their last evaluation.

    Returns:
        Whether every run ended; False if it was stopped.

    Raises:
        OutOfMemory: The pack does not fit. Its runs can go on from their last evaluation, in a smaller one.
    """
    reset_peak_memory()
    module: PackModule | None = None
    try:
        module = PackModule(jobs, bench=bench, supply=supply, stop_requested=stop_requested)
        _fit(module, jobs[0].config, bench)
    except RunStopped:
        assert module is not None
        module.interrupt()
        return False
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(str(error).splitlines()[0]) from error
        raise
    return True


class PackModule(lightning.LightningModule):
    """A packed model, its stacked optimizer and the runs in its slots. A batch of the loader is only a tick."""

    def __init__(
        self, jobs: Sequence[Job], *, bench: Workbench, supply: Supply, stop_requested: Callable[[], bool]
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bench = bench
        self.supply = supply
        self.stop_requested = stop_requested
        self.settings = jobs[0].config.trainer
        self.runs = [SlotRun(job, bench=bench, slot=n, slots=len(jobs)) for n, job in enumerate(jobs)]
        self.model: nn.Module = copy_sharing_weights(bench.base.model)
        generators = [torch.Generator().manual_seed(job.config.seeds.init) for job in jobs]
        coverages = inject_packed_lora(self.model, [_method(job) for job in jobs], generators=generators)
        self.model.train()
        self.optimizer = StackedAdamW(split_packed_parameters(self.model), [job.config.optim for job in jobs])
        for slot, (run, coverage) in enumerate(zip(self.runs, coverages, strict=True)):
            self._begin(slot, run, trainable_params=coverage.trainable_params)
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        self.metrics = [self._new_metric() for _ in self.runs]
        self.micro = 0
        self.micro_losses: list[Tensor] = []
        self.settled_at = time.monotonic()

    def configure_optimizers(self) -> None:
        """Leaves the optimizer to `training_step`: Lightning's counts would be those of one run."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One micro-batch of every slot; with the last one of a step, the step."""
        started = time.perf_counter()
        indices = [index for run in self.runs for index in run.micro_batch(self.micro)]
        blocks = self.bench.parts.train.tokens[torch.tensor(indices)].to(self.device)  # (slots · batch, block + 1)
        losses = slot_losses(self.model, blocks, slots=len(self.runs)).mean(dim=1)  # (slots,)
        self.manual_backward((losses / self.settings.accumulate).sum())
        self.micro_losses.append(losses.detach())
        self.micro += 1
        for run in self.runs:
            run.tokens_trained += blocks[:, 1:].numel() // len(self.runs)
        if self.micro == self.settings.accumulate:
            self._step()
        share = (time.perf_counter() - started) / len(self.runs)
        for run in self.runs:
            run.train_s += share

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Asks after each step whether to stop.

        Raises:
            RunStopped: The pack is to end here.
        """
        if self.micro == 0 and self.stop_requested():
            raise RunStopped

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Evaluates a batch in all slots at once."""
        blocks = torch.cat([batch["input_ids"], batch["targets"][:, -1:]], dim=1).repeat(len(self.runs), 1)
        losses = slot_losses(self.model, blocks, slots=len(self.runs))
        for metric, nats in zip(self.metrics, losses.sum(dim=1), strict=True):
            metric.update(nats=nats, tokens=losses.shape[1])

    def on_validation_model_train(self) -> None:
        """Switches dropout on again, in refilled slots too."""
        self.model.train()

    def on_validation_end(self) -> None:
        """Settles every slot: logs, keeps, prunes, ends, refills; then compacts what stays empty."""
        values = [{name: float(value) for name, value in metric.compute().items()} for metric in self.metrics]
        self._share_time()
        freed = [n for n, run in enumerate(self.runs) if not self._goes_on(n, run, values[n])]
        empty = [slot for slot in freed if not self._refill(slot)]
        if len(empty) == len(self.runs):
            self.runs = []
            self.trainer.should_stop = True
            return
        if empty:
            self._compact([slot for slot in range(len(self.runs)) if slot not in empty])
        set_dropout_streams(self.model, [run.stream for run in self.runs])
        self.metrics = [self._new_metric() for _ in self.runs]
        self._save_checkpoints()
        self.settled_at = time.monotonic()

    def interrupt(self) -> None:
        """Closes the runs as interrupted; each goes on from its last evaluation."""
        self._share_time()
        for run in self.runs:
            run.close("interrupted", f"stopped after step {run.step} of {run.record.steps_planned}")

    def _step(self) -> None:
        factors = []
        for run in self.runs:
            config = run.job.config
            factors.append(schedule_factor(config.schedule, run.step, max_steps=config.trainer.max_steps))
        self.optimizer.lr_factors = factors
        self.optimizer.clip_slots()
        self.optimizer.step()
        self.optimizer.zero_grad()
        by_slot = torch.stack(self.micro_losses, dim=1)  # (slots, micro-batches)
        for run, losses, factor in zip(self.runs, by_slot, factors, strict=True):
            run.step += 1
            run.log.note_step(run.step, [losses], run.job.config.optim.lr * factor)
        self.micro, self.micro_losses = 0, []

    def _goes_on(self, slot: int, run: SlotRun, values: Values) -> bool:
        """Logs a slot's evaluation and returns whether its run has steps left; if not, it is closed."""
        record = run.record
        try:
            run.flush()
            value = run.log.note_evaluation(run.step, values, save=lambda folder: self._save(slot, folder))
        except Diverged as error:
            run.close("failed", str(error))
            run.job.failed(error)
            return False
        for name, number in values.items():
            run.writer.add_scalar(f"validation/{name}", number, run.step)
        prune = run.job.should_stop(run.step, value)
        if run.step < record.steps_planned and not prune:
            return True
        status = "complete" if run.step >= record.steps_planned else "pruned"
        run.close(status, None if status == "complete" else f"pruned at step {run.step} of {record.steps_planned}")
        run.job.ended(record)
        return False

    def _refill(self, slot: int) -> bool:
        job = self.supply()
        if job is None:
            return False
        run = SlotRun(job, bench=self.bench, slot=slot, slots=len(self.runs))
        generator = torch.Generator().manual_seed(job.config.seeds.init)
        filled = fill_slot(self.model, slot, _method(job), generator=generator)
        if filled.changes_parameters:
            self.optimizer.follow(split_packed_parameters(self.model))
        self.optimizer.reset_slot(slot, job.config.optim)
        self.runs[slot] = run
        self._begin(slot, run, trainable_params=filled.coverage.trainable_params)
        return True

    def _begin(self, slot: int, run: SlotRun, *, trainable_params: int) -> None:
        run.record.trainable_params = trainable_params
        run.record.trainable_fraction = trainable_params / run.record.total_params
        if run.checkpoint is not None:
            load_slot(self.model, slot, run.checkpoint["adapter"])
            moments = {name: tuple(pair) for name, pair in run.checkpoint["moments"].items()}
            self.optimizer.load_slot(slot, self._by_name(moments), num_steps=run.step)
            run.checkpoint = None

    def _compact(self, keep: list[int]) -> None:
        compact_slots(self.model, keep)
        self.optimizer.follow(split_packed_parameters(self.model), keep=keep)
        self.runs = [self.runs[slot] for slot in keep]

    def _save_checkpoints(self) -> None:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for slot, run in enumerate(self.runs):
            moments = {names[p]: list(pair) for p, pair in self.optimizer.slot_moments(slot).items()}
            run.save_checkpoint({"adapter": slot_state(self.model, slot), "moments": moments})

    def _by_name(self, moments: dict[str, Any]) -> dict[nn.Parameter, Any]:
        return {p: moments[name] for name, p in self.model.named_parameters() if name in moments}

    def _save(self, slot: int, folder: Path) -> None:
        base = self.bench.base
        save_slot(self.model, slot, folder, base_path=base.path, base_fingerprint=base.fingerprint)

    def _share_time(self) -> None:
        share = (time.monotonic() - self.settled_at) / max(len(self.runs), 1)
        for run in self.runs:
            run.wall_s += share

    def _new_metric(self) -> LanguageModelMetrics:
        return LanguageModelMetrics(bytes_per_token=self.bench.parts.validation.bytes_per_token).to(self.device)


class Ticks(IterableDataset[int]):
    """An endless loader: which examples a slot sees next is the slot's business."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


def slot_losses(model: nn.Module, blocks: Tensor, *, slots: int) -> Tensor:
    """Returns the cross-entropy in nats of every token after the first of each block, in fp32, (slots, tokens)."""
    inputs, targets = blocks[:, :-1], blocks[:, 1:]
    logits = model(input_ids=inputs).logits  # (slots · batch, block, vocabulary)
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(slots, -1)


def _fit(module: PackModule, config: RunConfig, bench: Workbench) -> None:
    settings = config.trainer
    data = TextDataModule(
        bench.parts,
        batch_size=settings.batch_size,
        accumulate=1,
        eval_batch_size=max(1, settings.eval_batch_size // len(module.runs)),
        num_steps=1,
        seed=0,
    )
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator=resolve_device(settings),
            devices=1,
            precision="32-true",  # the base is in its own dtype and LoRA casts by itself
            logger=False,
            max_epochs=1,
            val_check_interval=settings.eval_every_steps * settings.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            inference_mode=False,  # slots are refilled while evaluating, and what is made then must train
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(Ticks(), batch_size=None), data.val_dataloader())


def _method(job: Job) -> LoraConfig:
    assert isinstance(job.config.method, LoraConfig)
    return job.config.method

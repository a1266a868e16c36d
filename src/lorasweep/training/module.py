"""The LightningModule of one run, or of several runs in the slots of a pack: model, losses, metrics and checkpoint.

It works under any `lightning.Trainer`. What only `lorasweep` needs, such as the folders of runs, is in `run.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorasweep.config.build import as_settings
from lorasweep.config.run import RunConfig
from lorasweep.data.rows import Batch, repeat_batch
from lorasweep.errors import ConfigError, RecordError
from lorasweep.lora import Slots
from lorasweep.lora.dropout import DropoutMasks, FunctionalDropout, drops_in_functions
from lorasweep.objectives.objective import Evaluation, read_metrics
from lorasweep.training.checkpoint import read_rng_state, restore_rng_state
from lorasweep.training.data_module import DataModule
from lorasweep.training.environment import fork_random_streams
from lorasweep.training.fsdp import average_gradients, copy_trained_weights, shard_model
from lorasweep.training.inputs import SHARED_INPUTS, RunSettings, read_settings
from lorasweep.training.optim import SlotOptimizers, configure_optimizers, configure_slot_optimizers
from lorasweep.training.prepare import check_run, prepare_model, prepare_slots
from lorasweep.training.progress import TrainingProgress
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.step import SlotNumbers, compute_losses


class TrainingModule(lightning.LightningModule):
    """The model of one run, or of a pack with a slot for each run, for any `lightning.Trainer`.

    Attributes:
        configs: The settings of each slot's run. The first ones have the model, data and trainer of all.
        model: The model that trains. `configure_model` creates it.
        slots: The slots of `model`; None if the method does not pack. Then `model` has the parameters itself.
        progress_by_slot: Trained tokens of all processes and training time so far, of each slot.
        step_losses: The last step's loss of each slot, summed over micro-batches and processes, (slots,).
        metrics: The metrics of the last evaluation on validation data, by slot.
        kept_slots: The slots that the next checkpoint has; None: all of them.
    """

    model: nn.Module
    slots: Slots | None

    def __init__(
        self,
        config: RunSettings,
        *,
        others: Sequence[RunConfig] = (),
        inputs: RunInputs | None = None,
        accumulate: int | None = None,
    ) -> None:
        """Loads the base model and the data, unless `inputs` are given.

        Args:
            config: The arguments of `lorasweep train`, or the mapping in a checkpoint. In a user's own Trainer, the
                Trainer's steps, devices and precision replace the settings `trainer.*`.
            others: The settings of further runs, which train in slots beside the first. They differ in their method,
                optimizer, schedule and seeds.
            inputs: The base model, whose weights are never written, and the data.
            accumulate: Micro-batches into which the data cuts each batch. None: `trainer.accumulate`.

        Raises:
            ConfigError: A setting is wrong or names code, or model or data can't be loaded.
        """
        super().__init__()
        self.config = read_settings(config)
        in_own_trainer = inputs is None
        # In `lorasweep`, the writer of the run's folder writes to the loggers of each slot. None: to those of a Trainer
        # that has some.
        self._logger_choice = None if in_own_trainer else False
        self.inputs = inputs = inputs or SHARED_INPUTS.load(self.config)
        if in_own_trainer:
            self.config = replace(self.config, trainer=replace(self.config.trainer, precision=inputs.precision))
            check_run(self.config, inputs.base)
        self.configs = [self.config, *others]
        self.base, self.objective = inputs.base, inputs.data.objective
        self.accumulate = accumulate or self.config.trainer.accumulate
        self._evaluations = [Evaluation(self.objective) for _ in self.configs]
        self.evaluations = nn.ModuleList(self._evaluations)  # Lightning moves them to the device
        # in `lorasweep train`, `start_loggers` has already logged the settings
        self.save_hyperparameters({"config": as_settings(self.config)}, logger=in_own_trainer)
        self.masks = DropoutMasks([one.seeds.dropout for one in self.configs])
        self.progress_by_slot = [TrainingProgress() for _ in self.configs]
        self.step_losses = torch.zeros(len(self.configs))
        self.metrics: list[dict[str, float]] = []
        self.slots = None
        self.kept_slots: Sequence[int] | None = None
        self._numbers = SlotNumbers(self.configs, self.objective)
        self._drops_in_functions = drops_in_functions(self.base.model)
        self._micro_losses: list[Tensor] = []
        self._micro_tokens: list[Tensor] = []
        self._step_began = 0.0
        self.strict_loading = False  # a checkpoint has only the trained parameters

    @property
    def progress(self) -> TrainingProgress:
        """The progress of the only run, or of the first slot."""
        return self.progress_by_slot[0]

    @property
    def num_slots(self) -> int:
        return len(self.configs)

    def configure_model(self) -> None:
        """Prepares the model at the first call. With `ModelParallelStrategy`, each process keeps its shard."""
        if "model" in self._modules:
            return
        with torch.device("cpu"):  # Lightning makes the GPU the default device here, but initial values are CPU draws
            if self.config.method.packs:
                try:
                    model, self.slots = prepare_slots(self.configs, self.base)
                    self.masks, self.slot_weights = self.slots.masks, self.slots.weights
                except ValueError:  # some runs can't train in a slot, such as one that trains tied modules in full
                    if self.num_slots > 1:
                        raise
            if self.slots is None:
                model = prepare_model(self.config, self.base, masks=self.masks)
        if self._device_mesh is not None:
            mesh = self._device_mesh["data_parallel"]
            shard_model(model, mesh, keep_trained_whole=self.config.method.has_rank)
        self.model = model

    def setup(self, stage: str) -> None:
        data = self._data_module()
        for key in ("model", "data"):
            if data is not None and getattr(data.config, key) != getattr(self.config, key):
                raise ConfigError(
                    f"`{key}` must be the same in TrainingModule and DataModule. Give both the same settings."
                )

    def _data_module(self) -> DataModule | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, DataModule) else None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)

    def whole_models(self) -> list[nn.Module]:
        """Returns the model of each run, with whole weights on the first process. All processes must call it."""
        if self.slots is not None:
            return list(self.slots.models)
        if self._device_mesh is None:
            return [self.model]
        copy = None
        if self.global_rank == 0:
            with fork_random_streams(self.device):  # `prepare_model` sets the seed, and training continues
                copy = prepare_model(self.config, self.base)
        copy_trained_weights(self.model, copy)
        return [copy or self.model]

    def count_trained(self) -> list[int]:
        """Returns the number of trained parameters of each run."""
        if self.slots is not None:
            return [coverage.trainable_params for coverage in self.slots.coverages]
        return [sum(p.numel() for p in self.parameters() if p.requires_grad)]

    def configure_optimizers(self) -> Any:
        configs, steps = self.configs, self.trainer.max_steps
        if steps > 0:  # otherwise the Trainer has no `max_steps`, and the schedule has the length `trainer.max_steps`
            configs = [replace(one, trainer=replace(one.trainer, max_steps=steps)) for one in configs]
        if self.slots is not None:
            return configure_slot_optimizers(configs, self.slots)
        return configure_optimizers(configs[0], self.model)

    def read_rates(self) -> list[float]:
        """Returns the learning rate of each slot."""
        [optimizer] = self.trainer.optimizers
        return optimizer.rates if isinstance(optimizer, SlotOptimizers) else [float(optimizer.param_groups[0]["lr"])]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._step_began = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.masks.begin(self.trainer.global_step, len(self._micro_losses), self.global_rank)
        # a compiled model keeps torch's functional dropout
        is_replaced = self._drops_in_functions and not self.config.trainer.compile
        context: AbstractContextManager[Any] = FunctionalDropout(self.masks.drop) if is_replaced else nullcontext()
        with context:
            shares = compute_losses(self.model, self._numbers.add_to(batch), objective=self.objective)
        self._micro_losses.append(shares.detach())
        self._micro_tokens.append(batch["num_tokens"])
        # Each share is already divided by the weight of the whole step, so shares must be added up. Lightning averages
        # over micro-batches, and its strategies average over processes, which this factor reverses. No parameter
        # belongs to two slots, so the gradient of the sum is each slot's gradient.
        return shares.sum() * (self.accumulate * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sums losses and tokens of the step over its micro-batches and over processes, and logs them."""
        if self._device_mesh is not None:
            average_gradients(self)  # before they are clipped
        losses, tokens = torch.stack(self._micro_losses).sum(0), torch.stack(self._micro_tokens).sum(0)
        self._micro_losses, self._micro_tokens = [], []
        if self.trainer.world_size > 1:
            # one message for all values, in float64, which represents counts exactly
            values = torch.cat([losses.double(), tokens.to(losses.device, torch.float64)])
            totals = self.trainer.strategy.reduce(values, reduce_op="sum")  # waits for the other processes
            losses, tokens = totals[: len(losses)], totals[len(losses) :].long()
        for progress, number in zip(self.progress_by_slot, tokens.tolist(), strict=True):
            progress.tokens += number
        self.step_losses = losses
        if self.num_slots == 1:
            # Lightning reads the values of a progress bar from the GPU, even if there is no bar
            self._log("train/loss", losses[0].float(), prog_bar=self.trainer.progress_bar_callback is not None)
            # tensors, because Lightning would copy a number to the GPU, and wait for it
            self._log("train/lr", torch.tensor(self.read_rates()[0]))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        seconds = (time.perf_counter() - self._step_began) / self.num_slots
        for progress in self.progress_by_slot:
            progress.train_s += seconds
        if self.num_slots == 1:
            self._log("train/tokens_per_s", torch.tensor(self.progress.tokens_per_s), prog_bar=True)

    def _log(self, name: str, value: Tensor, *, prog_bar: bool = False) -> None:
        self.log(name, value, prog_bar=prog_bar, logger=self._logger_choice)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each slot to the Trainer's `gradient_clip_val`; without one, to its `optim.clip_norm`."""
        limits = [one.optim.clip_norm if gradient_clip_val is None else gradient_clip_val for one in self.configs]
        if self.slots is not None and gradient_clip_algorithm in (None, "norm"):
            self.slots.weights.clip_gradients(limits)
        else:
            self.clip_gradients(optimizer, gradient_clip_val=limits[0], gradient_clip_algorithm=gradient_clip_algorithm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # If there are fewer examples than processes, some processes get an example that must not count.
        end = None if batch["num_tokens"].any() else 0
        repeated = repeat_batch({name: x for name, x in batch.items() if name not in LOADER_KEYS}, slots=self.num_slots)
        scores = self.objective.score(self.model, self._numbers.add_to(repeated))
        for slot, evaluation in enumerate(self._evaluations):
            evaluation.update(scores.select_slot(slot, slots=self.num_slots).map(lambda values: values[:end]))

    def on_validation_epoch_end(self) -> None:
        self.metrics = self._end_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        # the metric bits per byte needs the bytes of the test text, not of the validation text
        if (data := self._data_module()) is not None:
            self._set_objective(self.objective.for_split(data.splits.test()))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")
        self._set_objective(self.objective)

    def _set_objective(self, objective: Any) -> None:
        for evaluation in self._evaluations:
            evaluation.objective = objective

    def _end_evaluation(self, split: str) -> list[dict[str, float]]:
        """Returns the metrics of an evaluation by slot. Logs them for callbacks, in a pack as `SPLIT/NAME/SLOT`."""
        values = [evaluation.compute() for evaluation in self._evaluations]
        for evaluation in self._evaluations:
            evaluation.reset()
        named = {
            f"{split}/{name}" if self.num_slots == 1 else f"{split}/{name}/{slot}": value
            for slot, metrics in enumerate(values)
            for name, value in metrics.items()
        }
        # The values are equal on all processes. Lightning demands a reduction, and `max` leaves equal values unchanged.
        self.log_dict(named, sync_dist=True, reduce_fx="max", logger=self._logger_choice)
        return read_metrics(values)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained parameters of the kept slots without the base, and the random state of every process."""
        kept = range(self.num_slots) if self.kept_slots is None else self.kept_slots
        if self.slots is not None:
            checkpoint["state_dict"] = {
                f"slots.{number}.{name}": value.clone()
                for number, slot in enumerate(kept)
                for name, value in self.slots.weights.views(slot).items()
            }
            for state in checkpoint.get("optimizer_states", []):
                state["slots"] = [state["slots"][slot] for slot in kept]
        else:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        streams = [read_rng_state(self.trainer.strategy.root_device)] * self.trainer.world_size
        if len(streams) > 1:
            dist.all_gather_object(streams, streams[0])
        checkpoint["base"] = self.base.fingerprint
        checkpoint["progress"] = [dict(vars(self.progress_by_slot[slot])) for slot in kept]
        # fused kernels draw their masks from torch's stream, on every process
        checkpoint["torch_streams"] = streams

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["base"] != self.base.fingerprint:
            raise RecordError(
                f"the base model must be the one that the checkpoint was trained on (fingerprint "
                f"{checkpoint['base']!r}), but {self.base.path!r} has {self.base.fingerprint!r}."
            )
        self.progress_by_slot = [TrainingProgress(**progress) for progress in checkpoint["progress"]]
        streams = checkpoint["torch_streams"]
        if self._trainer is not None and self.global_rank < len(streams):  # the checkpoint may have fewer processes
            restore_rng_state(streams[self.global_rank], self.trainer.strategy.root_device)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002
        # Not strict, because a checkpoint never has the base's weights.
        trained: dict[str, Tensor] = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if self.slots is not None:
            by_slot = enumerate(map(self.slots.weights.views, range(self.num_slots)))
            trained = {f"slots.{slot}.{name}": view for slot, views in by_slot for name, view in views.items()}
        wrong = sorted(trained.keys() ^ state_dict.keys())
        wrong += [name for name, value in state_dict.items() if name in trained and value.shape != trained[name].shape]
        if wrong:
            raise RecordError(
                f"a checkpoint must have exactly the parameters that these settings train, but {wrong[0]!r} differs."
            )
        with torch.no_grad():
            for name, value in state_dict.items():
                trained[name].copy_(value)
        return type(super().load_state_dict({}, strict=False))([], [])


LOADER_KEYS = ("step_weight", "num_tokens")
"""Keys of a batch that are numbers of a slot and not of its rows."""

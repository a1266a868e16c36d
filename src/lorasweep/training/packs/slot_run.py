"""One run in a slot of a pack, with its step, random stream, batches, optimizer, log and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import MicroBatch, StepBatchSampler
from lorasweep.errors import RecordError
from lorasweep.methods import METHODS, ParameterGroup
from lorasweep.record import RunStatus, read_run
from lorasweep.training.checkpoint import find_checkpoint, save_checkpoint
from lorasweep.training.environment import get_device
from lorasweep.training.inputs import describe_batching
from lorasweep.training.loggers import finish_loggers, start_loggers
from lorasweep.training.optim import build_optimizer, build_schedule
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.run_log import Metrics, RunLog, RunRequest, open_record


class SlotRun:
    """A run in a slot of a pack.

    Attributes:
        step: Optimizer steps done.
        saved_step: Step of the newest checkpoint; 0 if there is no checkpoint.
        sampler: The run's micro-batches by step, in the same order as in a solo run.
        stream: Random stream of the run's dropout.
        optimizer: Optimizer and schedule. The pack sets it when the run gets its slot.
        log: Writes the run's folder. `log.progress` has the run's share of the pack's training time.
        wall_s: The run's share of the pack's wall-clock time since the run joined or resumed.
        resume_state: Content of the checkpoint to resume from; empty without a checkpoint.
    """

    optimizer: SlotOptimizer

    def __init__(
        self, request: RunRequest, *, inputs: RunInputs, slot: int, slots: int, start_step: int | None = None
    ) -> None:
        """Opens the run's folder. It will train in `slot` of `slots`.

        `start_step` is the step of the checkpoint to load, in a resumed pack. None loads the newest checkpoint, if any.
        """
        config, folder = request.config, request.run_folder.path
        self.request = request
        self.folder = folder
        self.inputs = inputs
        pack: dict[str, Any] = {"slot": slot, "slots": slots}
        # In a resumed pack, the record keeps the slot that the run first had. Dropped slots may have changed its index.
        if start_step is not None:
            with suppress(RecordError):
                pack = read_run(folder).pack or pack
        found = find_checkpoint(folder, kind="slot", step=start_step)
        self.resume_state = found.state
        self.step = self.saved_step = found.step
        self.wall_s = 0.0
        self.record = open_record(config, request.run_folder, inputs, found=found)
        self.record.pack = pack
        self.record.batching = describe_batching(inputs, config.trainer, accumulate=config.trainer.accumulate)
        self.log = RunLog(self.record, folder, found=found)
        self.loggers = start_loggers(config, folder)
        # Dropout masks come from a stream of this slot, so that they do not depend on the other slots. The stream has
        # the seed of a solo run, is saved in the checkpoint, and must be on the device of the batches.
        self.stream = torch.Generator(get_device(config.trainer)).manual_seed(config.seeds.dropout)
        if found.state:
            self.stream.set_state(found.state["stream"])
        self.sampler = StepBatchSampler(
            inputs.data.train,
            batch_size=config.trainer.batch_size,
            num_steps=config.trainer.max_steps,
            seed=config.seeds.data_order,
            accumulate=config.trainer.accumulate,
        )

    def add_tokens(self, micro: MicroBatch, *, positions: int) -> int:
        """Adds a micro-batch to the progress, and returns its number of tokens. `positions` includes padding."""
        tokens = int(self.inputs.splits.train.lengths[torch.tensor(micro.indices)].sum())
        self.log.progress.tokens += tokens
        self.log.progress.positions += positions
        return tokens

    def note_evaluation(self, values: Metrics, *, save: Callable[[Path], None]) -> None:
        """Writes this evaluation, and the steps since the last evaluation, to the run's log and loggers.

        Raises:
            Diverged: A loss or the score is NaN or infinite.
        """
        for row in self.log.flush():
            metrics = {f"train/{name}": row[name] for name in ("loss", "lr", "tokens_per_s")}
            metrics["train/padding_fraction"] = self.log.progress.padding_fraction
            for logger in self.loggers:
                logger.log_metrics(metrics, step=row["step"])
        self.log.write_evaluation(self.step, values, save=save)
        for logger in self.loggers:
            logger.log_metrics({f"validation/{name}": value for name, value in values.items()}, step=self.step)
            logger.save()

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint from which the run can resume in any pack. Earlier checkpoints are kept."""
        content = {**state, "progress": dict(vars(self.log.progress)), "stream": self.stream.get_state()}
        save_checkpoint(self.folder, kind="slot", step=self.step, save=lambda path: torch.save(content, path))
        self.saved_step = self.step

    def close(self, status: RunStatus, reason: str | None) -> None:
        """Writes the final record of this run and closes its loggers.

        The checkpoints are kept until the pack's next commit. A pack that is killed before this commit resumes from the
        commit before it, and needs the run's checkpoint again.
        """
        self.log.close(status, reason, wall_s=self.wall_s)
        for logger in self.loggers:
            logger.finalize("failed" if status == "failed" else "success")
        finish_loggers(self.loggers)


class SlotOptimizer:
    """Clips and steps the parameters of a slot's solo model.

    A hundred small matrices per slot would take longer to step than to train. So parameters with the same settings
    become one vector (`flatten_parameters`), which `torch.optim.AdamW` steps in one call.

    *Differs* from the solo run: a parameter that never gets a gradient has a zero gradient here, so it is changed by
    weight decay. In both runs it has no effect on the model's outputs.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        groups = METHODS["lora"].trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b)
        flat = []
        for group in groups:
            matrices, vectors = [p for p in group.params if p.ndim >= 2], [p for p in group.params if p.ndim < 2]
            # `build_optimizer` lets matrices decay, but no vectors, so the matrices keep two dimensions
            shapes = (matrices, (1, -1)), (vectors, (-1,))
            params = [flatten_parameters(parameters, shape=shape) for parameters, shape in shapes if parameters]
            flat.append(ParameterGroup(name=group.name, params=tuple(params), lr_factor=group.lr_factor))
        self.parameters = [parameter for group in flat for parameter in group.params]
        self.optimizer = build_optimizer(config.optim, flat)
        self.schedule = build_schedule(config, self.optimizer)
        self.clip_norm = config.optim.clip_norm

    def step(self) -> float:
        """Makes one step, sets the gradients to zero, and returns the step's learning rate."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        # The gradients must not become None: those of the small parameters are views of these tensors.
        self.optimizer.zero_grad(set_to_none=False)
        return lr

    def state(self) -> dict[str, Any]:
        """Returns the state from which a run with the same settings resumes. It shares memory with the optimizer."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def flatten_parameters(parameters: Sequence[nn.Parameter], *, shape: tuple[int, ...]) -> nn.Parameter:
    """Joins parameters into one. The given parameters become views of it, and their gradients views of its gradient.

    The gradients start as zeros. Backward passes add to them in place, as long as no gradient is set to None.

    Args:
        parameters: Parameters of any shapes and one dtype.
        shape: (-1,) or (1, -1).
    """
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    flat_grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, value, grad in zip(parameters, torch.split(flat, sizes), torch.split(flat_grad, sizes), strict=True):
        parameter.data, parameter.grad = value.view_as(parameter), grad.view_as(parameter)
    joined = nn.Parameter(flat.view(shape))
    joined.grad = flat_grad.view(shape)
    return joined

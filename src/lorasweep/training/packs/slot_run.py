"""One run in a slot of a pack, with its step, random stream, batches, optimizer and log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import MicroBatch, StepBatchSampler
from lorasweep.errors import RecordError
from lorasweep.lora import split_lora_parameters
from lorasweep.methods import bind
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.checkpoint import SLOT_CHECKPOINT, get_step, read_checkpoint
from lorasweep.training.environment import get_device
from lorasweep.training.open_run import Metrics, OpenRun, RunRequest
from lorasweep.training.optim import build_optimizer, build_schedule
from lorasweep.training.run_inputs import RunInputs


class SlotRun(OpenRun):
    """A run in a slot of a pack.

    Attributes:
        step: Optimizer steps done.
        sampler: The run's micro-batches by step, in the same order as in a solo run.
        stream: Random stream of the run's dropout.
        optimizer: Optimizer and schedule. The pack sets it when the run gets its slot.
        wall_s: The run's share of the pack's wall-clock time since the run joined or resumed. `progress` has the run's
            share of the training time.
        resume_state: State to resume from; empty if the run begins.
    """

    optimizer: SlotOptimizer
    wall_s: float

    def __init__(
        self,
        request: RunRequest,
        *,
        inputs: RunInputs,
        slot: int,
        slots: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the run's folder. It will train in `slot` of `slots`.

        `state` is the run's state in the checkpoint of a resumed pack. None: its state in an earlier pack, if any.
        """
        config, folder = request.config, request.run_folder.path
        pack: dict[str, Any] = {"slot": slot, "slots": slots}
        # In a resumed pack, the record keeps the slot that the run first had. Dropped slots may have changed its index.
        if state is not None:
            with suppress(RecordError):
                pack = read_run(folder).pack or pack
        else:
            state = read_checkpoint(folder / SLOT_CHECKPOINT)
        super().__init__(config, request.run_folder, inputs, state=state, pack=pack)
        self.request, self.resume_state, self.step, self.wall_s = request, state, get_step(state), 0.0
        self.start_loggers()
        # Dropout masks come from a stream of this slot, so that they do not depend on the other slots. The stream has
        # the seed of a solo run, is saved in the checkpoint, and must be on the device of the batches.
        self.stream = torch.Generator(get_device(config.trainer)).manual_seed(config.seeds.dropout)
        if state:
            self.stream.set_state(state["stream"])
        self.sampler = StepBatchSampler(
            inputs.data.train,
            batch_size=config.trainer.batch_size,
            num_steps=config.trainer.max_steps,
            seed=config.seeds.data_order,
            group_by_length=config.data.groups_by_length,
            accumulate=config.trainer.accumulate,
        )

    def add_tokens(self, micro: MicroBatch) -> None:
        """Adds the tokens of a micro-batch to the progress."""
        self.progress.tokens += int(self.inputs.splits.train.lengths.numpy()[micro.indices].sum())

    def note_evaluation(self, values: Metrics, *, save: Callable[[Path], None]) -> None:
        """Writes this evaluation, and the steps since the last evaluation, to the run's log and loggers.

        Raises:
            Diverged: A loss or the score is NaN or infinite.
        """
        for row in self.flush():
            metrics = {f"train/{name}": row[name] for name in ("loss", "lr", "tokens_per_s")}
            for logger in self.loggers:
                logger.log_metrics(metrics, step=row["step"])
        self.write_evaluation(self.step, values, save=save)
        for logger in self.loggers:
            logger.log_metrics({f"validation/{name}": value for name, value in values.items()}, step=self.step)
            logger.save()

    def state(self, model: nn.Module) -> dict[str, Any]:
        """Returns the state from which the run can resume in any pack; empty before its first step.

        `model` is the run's solo model, with which the state shares memory.
        """
        if not self.step:
            return {}
        return {
            "global_step": self.step,
            "trained": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state(),
            "progress": dict(vars(self.progress)),
            "stream": self.stream.get_state(),
        }

    def close(self, status: RunStatus, reason: str | None) -> RunRecord:
        for logger in self.loggers:  # a Trainer does it for a run alone
            logger.finalize("failed" if status == "failed" else "success")
        return super().close(status, reason)


class SlotOptimizer:
    """Optimizer and schedule of a slot's solo model. `step_slots` steps those of all slots.

    A hundred small matrices per slot would take longer to step than to train. So parameters with the same settings
    become one vector, which `torch.optim.AdamW` steps in one call.

    *Differs* from the solo run: a parameter that never gets a gradient has a zero gradient here, so it is changed by
    weight decay. In both runs it has no effect on the model's outputs.

    Attributes:
        gradient: The gradients of everything that the slot trains, as one vector.
        clip_norm: Maximum norm of `gradient`; None does not clip.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        parts = [
            replace(group, params=params)
            for group in bind(config.method).trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b)
            for is_matrix in (True, False)
            if (params := tuple(p for p in group.params if (p.ndim >= 2) == is_matrix))
        ]
        parameters = [parameter for part in parts for parameter in part.params]
        values, self.gradient = flatten_parameters(parameters, transposed=split_lora_parameters(model)[1])
        sizes = [sum(parameter.numel() for parameter in part.params) for part in parts]
        flat = []
        for part, value, grad in zip(parts, torch.split(values, sizes), torch.split(self.gradient, sizes), strict=True):
            # `build_optimizer` lets matrices decay, but no vectors, so the matrices keep two dimensions
            shape = (1, -1) if part.params[0].ndim >= 2 else (-1,)
            joined = nn.Parameter(value.view(shape))
            joined.grad = grad.view(shape)
            flat.append(replace(part, params=(joined,)))
        self.optimizer = build_optimizer(config.optim, flat)
        self.schedule = build_schedule(config, self.optimizer)
        self.clip_norm = config.optim.clip_norm

    def state(self) -> dict[str, Any]:
        """Returns the state from which a run with the same settings resumes. It shares memory with the optimizer."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def step_slots(optimizers: Sequence[SlotOptimizer]) -> list[float]:
    """Makes one step of each slot, sets all gradients to zero, and returns each slot's learning rate of this step."""
    rates = [float(slot.optimizer.param_groups[0]["lr"]) for slot in optimizers]
    if clipped := {slot: slot.clip_norm for slot in optimizers if slot.clip_norm is not None}:
        # as `nn.utils.clip_grad_norm_`, but for all slots at once, and dividing where that function multiplies
        divisors = torch._foreach_norm([slot.gradient for slot in clipped])
        torch._foreach_add_(divisors, 1e-6)
        torch._foreach_div_(divisors, list(clipped.values()))  # numbers: a tensor of them would be a copy to the GPU
        torch._foreach_clamp_min_(divisors, 1.0)
        for slot, divisor in zip(clipped, divisors, strict=True):
            # fused AdamW divides in its own kernel
            setattr(slot.optimizer, "grad_scale", divisor)  # noqa: B010 (no attribute that mypy knows)
    for slot in optimizers:
        slot.optimizer.step()
        slot.schedule.step()
    # The gradients must not become None: those of the small parameters are views of these tensors.
    torch._foreach_zero_([slot.gradient for slot in optimizers])
    return rates


def flatten_parameters(
    parameters: Sequence[nn.Parameter], *, transposed: Collection[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Joins parameters into one vector, and returns it and its gradient, which starts as zeros.

    The given parameters become views of the vector, and their gradients views of its gradient. Backward passes add to
    them in place, as long as no gradient is set to None. Matrices in `transposed` are stored like the stacks of a pack
    (`lora.packed.stacks`), so that copies between both have equal strides.
    """
    ids = {id(parameter) for parameter in transposed}
    stored = [p.detach().mT if id(p) in ids else p.detach() for p in parameters]
    flat = torch.cat([value.flatten() for value in stored])
    flat_grad = torch.zeros_like(flat)
    sizes = [value.numel() for value in stored]
    for p, before, *views in zip(
        parameters, stored, torch.split(flat, sizes), torch.split(flat_grad, sizes), strict=True
    ):
        value, grad = (view.view_as(before) for view in views)
        p.data, p.grad = (value.mT, grad.mT) if id(p) in ids else (value, grad)
    return flat, flat_grad

"""Decides which arms' trials can train together as a pack.

Trials share a pack if they differ only in settings that each slot has for itself: `optim`, `schedule`, `logger`, seeds,
and the settings of `method=lora` that can be stacked. Model, data and trainer settings must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorasweep.config.components import Component
from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.packed.inject import why_not_packable
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.warnings import count_tokens

SLOT_GROUPS = ("method", "optim", "schedule", "logger", "seed", "seeds")
"""Groups of settings that each slot of a pack has for itself."""
SOLO_SETTINGS: Mapping[str, tuple[Callable[[RunConfig], bool], str]] = {
    "trainer.compile": (lambda config: config.trainer.compile, ""),
    "trainer.activation_checkpointing": (lambda config: config.trainer.activation_checkpointing, ""),
    "trainer.devices": (lambda config: config.trainer.wants_processes, ""),
    "optim.ema_decay": (lambda config: config.optim.ema_decay is not None, ""),
    "optim._target_": (lambda config: isinstance(config.optim, Component), ", because all slots train with AdamW"),
    "schedule._target_": (
        lambda config: isinstance(config.schedule, Component),
        ", because slots support only the named schedules",
    ),
    "callbacks": (lambda config: bool(config.callbacks), ", because a callback would see several runs as one"),
    "trainer.profiler": (
        lambda config: config.trainer.profiler is not None,
        ", because a step belongs to several runs",
    ),
}
"""Settings that a pack does not support. For each: whether a run uses the setting, and the end of the message."""


@dataclass(frozen=True, kw_only=True)
class ArmPacking:
    """Whether the trials of one arm can share packs."""

    key: tuple[Any, ...] | None
    """Trials of arms with equal keys share packs; None means that each trial runs alone."""
    reason: str
    """A sentence that says why trials share packs or run alone."""
    largest: RunConfig
    """The arm's run with the highest rank, on which memory and time are measured."""


def plan_packing(definition: Definition) -> dict[str, ArmPacking]:
    """Returns for each arm whether its trials can share packs.

    Raises:
        ConfigError: `worker.pack_size` asks for packs of an arm whose trials run alone, or for more slots than trials.
    """
    plans = {arm.name: _plan_arm(arm) for arm in definition.arms}
    packable = [arm for arm in definition.arms if plans[arm.name].key is not None]
    for arm in definition.arms:
        size, plan = arm.sweep_config.worker.pack_size, plans[arm.name]
        if size == "auto" or size == 1:
            continue
        # a size for the whole sweep applies to the arms that can be packed; the others run alone without an error
        is_for_this_arm = arm.sweep_config.worker != definition.sweep_config.worker
        if plan.key is None and (is_for_this_arm or not packable):
            raise ConfigError(
                f"`worker.pack_size` must be 1 or auto for arm `{arm.name}`, but got {size!r}: {plan.reason}"
            )
        num_trials = sum(other.trials for other in packable if plans[other.name].key == plan.key)
        if plan.key is not None and size > num_trials:
            raise ConfigError(
                f"`worker.pack_size <= {num_trials}` must hold, the number of trials that can share a pack with arm "
                f"`{arm.name}`, but got {size!r}."
            )
    return plans


def rank_arms_by_duration(definition: Definition) -> dict[str, int]:
    """Returns for each arm its place, 0 first, in the order in which workers take trials of equally advanced arms.

    What keeps a worker busy for longest comes first, so that short work is left for workers that become free at the
    end (longest processing time first, Graham 1969). That is a pack; then runs alone, by the computations of a run.
    """
    plans = plan_packing(definition)

    def sort_key(arm: Arm) -> tuple[bool, float]:
        is_packed = plans[arm.name].key is not None and arm.sweep_config.worker.pack_size != 1
        return not is_packed, -max(map(_count_passes, arm.corners))

    return {arm.name: place for place, arm in enumerate(sorted(definition.arms, key=sort_key))}


def _count_passes(config: RunConfig) -> int:
    """Returns the cost of a run, in forward passes of one token.

    A backward pass costs one for the gradients of activations, and another one for those of all weights.
    """
    return count_tokens(config) * {"head": 1, "full": 3, "intrinsic": 3}.get(config.method.name, 2)


def explain_solo_arms(definition: Definition) -> list[str]:
    """Returns a sentence for each LoRA arm whose trials run alone because of a setting that the user could change."""
    plans = plan_packing(definition)
    return [
        f"`{arm.name}`: {plans[arm.name].reason}"
        for arm in definition.arms
        if plans[arm.name].key is None
        and isinstance(plans[arm.name].largest.method, LoraConfig)
        and arm.sweep_config.worker.pack_size != 1
        and arm.trials > 1
    ]


def _plan_arm(arm: Arm) -> ArmPacking:
    config = arm.corners[0]
    reason = _why_alone(arm)
    return ArmPacking(
        key=(config.model, config.data, config.trainer) if reason is None else None,
        reason=reason or "its trials share packs on one frozen base.",
        largest=max(arm.corners, key=lambda config: getattr(config.method, "rank", 0)),
    )


def _why_alone(arm: Arm) -> str | None:
    """Returns a sentence that says why the arm's trials must run alone; None if they can share packs."""
    for key in arm.space:
        if key.split(".")[0] not in SLOT_GROUPS:
            return f"`{key}` is swept, but all slots of a pack must have the same value. So its trials run alone."
    for config in arm.corners:
        if not isinstance(config.method, LoraConfig):
            return f"`method={config.method.name}` has no slots on a frozen base, so its trials run alone."
        if config.model.factory is not None:
            return "`model.factory` may mix the examples of a batch, which a pack shares, so its trials run alone."
        if why := why_not_packable(config.method):
            return why
        for key, (is_used, cause) in SOLO_SETTINGS.items():
            if is_used(config):
                return f"`{key}` is not supported in packs{cause}. So its trials run alone."
        if config.trainer.max_steps % config.trainer.eval_every_steps:
            return (
                "`trainer.max_steps` is not a multiple of `trainer.eval_every_steps`, but slots are refilled at "
                "evaluations. So its trials run alone."
            )
    return None

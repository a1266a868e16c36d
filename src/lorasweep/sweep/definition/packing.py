"""Which trials can train together, and how many: the sweep's side of packs.

Trials share a pack when their settings differ only in what a slot may own: those of `method=lora` that can be stacked,
`optim`, `schedule`, `logger` and seeds. Model, data and trainer settings must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import OptimConfig, RunConfig
from lorasweep.config.targets import Component
from lorasweep.errors import ConfigError
from lorasweep.lora.packed import why_not_packable
from lorasweep.sweep.definition.arms import Arm, Definition

SLOT_GROUPS = ("method", "optim", "schedule", "logger", "seed", "seeds")
SOLO_SETTINGS: Mapping[str, Callable[[RunConfig], bool]] = {
    "trainer.compile": lambda config: config.trainer.compile,
    "trainer.activation_checkpointing": lambda config: config.trainer.activation_checkpointing,
    "trainer.devices": lambda config: config.trainer.wants_processes,
    "optim.layer_decay": lambda config: config.optim.layer_decay != 1,
    "optim.ema_decay": lambda config: config.optim.ema_decay is not None,
    "optim._target_": lambda config: isinstance(config.optim, Component),
    "schedule._target_": lambda config: isinstance(config.schedule, Component),
    "callbacks": lambda config: bool(config.callbacks),
    "trainer.profiler": lambda config: config.trainer.profiler is not None,
}
"""What a pack can't do for one slot, by key."""
SOLO_CAUSES: Mapping[str, str] = {
    "optim._target_": ", whose slots all train by AdamW",
    "schedule._target_": ", whose slots have the schedules that have a name",
    "callbacks": ", where a callback would see several runs as one",
    "trainer.profiler": ", whose steps belong to several runs",
}
"""Why a key does not go with packs, for the sentence that says so."""


@dataclass(frozen=True, kw_only=True)
class ArmPacking:
    """How the trials of one arm are run."""

    key: tuple[Any, ...] | None
    """Arms with the same key share packs; None means that each trial runs alone."""
    reason: str
    """Why so, in a sentence."""
    largest: RunConfig
    """The arm's run with the highest rank, for measuring."""


def plan_packing(definition: Definition) -> dict[str, ArmPacking]:
    """Returns for each arm whether its trials can share a pack.

    Raises:
        ConfigError: An arm that can't be packed asks for it by itself, or a pack is larger than its trials.
    """
    plans = {arm.name: _plan_arm(arm) for arm in definition.arms}
    packable = [arm for arm in definition.arms if plans[arm.name].key is not None]
    for arm in definition.arms:
        size = arm.driver.worker.pack_size
        if size == "auto" or size == 1:
            continue
        asks_itself = arm.driver.worker != definition.driver.worker
        if plans[arm.name].key is None and (asks_itself or not packable):
            raise ConfigError(
                f"`worker.pack_size` must be 1 or auto for arm `{arm.name}`, but got {size!r}: {plans[arm.name].reason}"
            )
        together = sum(other.trials for other in packable if plans[other.name].key == plans[arm.name].key)
        if plans[arm.name].key is not None and size > together:
            raise ConfigError(
                f"`worker.pack_size <= {together}` must hold, the number of trials that can share a pack with arm "
                f"`{arm.name}`, but got {size!r}."
            )
    return plans


def packing_notes(definition: Definition) -> list[str]:
    """Returns why trials of LoRA run alone that nobody asked to: what a user could change."""
    plans = plan_packing(definition)
    return [
        f"`{arm.name}`: {plans[arm.name].reason}"
        for arm in definition.arms
        if plans[arm.name].key is None
        and isinstance(plans[arm.name].largest.method, LoraConfig)
        and arm.driver.worker.pack_size != 1
        and arm.trials > 1
    ]


def _plan_arm(arm: Arm) -> ArmPacking:
    corners = list(arm.corners())
    largest = max(corners, key=lambda config: getattr(config.method, "rank", 0))
    reason = _why_alone(arm, corners)
    if reason is not None:
        return ArmPacking(key=None, reason=reason, largest=largest)
    config = corners[0]
    key = (config.model, config.data, config.trainer)
    return ArmPacking(key=key, reason="its trials share packs on one frozen base.", largest=largest)


def _why_alone(arm: Arm, corners: list[RunConfig]) -> str | None:
    foreign = [key for key in arm.space if key.split(".")[0] not in SLOT_GROUPS]
    if foreign:
        return f"`{foreign[0]}` is swept, which all slots of a pack must share, so its trials run alone."
    for config in corners:
        if not isinstance(config.method, LoraConfig):
            return f"`method={config.method.name}` has no slots on a frozen base, so its trials run alone."
        if config.model.factory is not None:
            return "`model.factory` may mix the rows of a batch, which a pack shares, so its trials run alone."
        why = why_not_packable(config.method)
        if why is not None:
            return why
        for key, differs in SOLO_SETTINGS.items():
            if differs(config):
                return f"`{key}` does not go with packs{SOLO_CAUSES.get(key, '')}, so its trials run alone."
        if config.trainer.max_steps % config.trainer.eval_every_steps:
            return (
                "`trainer.max_steps` is not a multiple of `trainer.eval_every_steps`, where slots are refilled, "
                "so its trials run alone."
            )
        if isinstance(config.optim, OptimConfig) and config.optim.eps == 0:
            return "`optim.eps` is 0, which padded parts of a pack can't have, so its trials run alone."
    return None

"""Decides which arms' trials can train together as a pack, and says which base each arm trains on.

Trials share a pack if they differ only in settings that each slot has for itself: `optim`, `schedule`, `logger`, seeds,
the settings of `method=lora`, and those that the objective names. Model, data and trainer settings must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.wording import join_words

SLOT_GROUPS = ("method", "optim", "schedule", "logger", "seed", "seeds")
"""Groups of settings that each slot of a pack has for itself."""


@dataclass(frozen=True, kw_only=True)
class ArmPacking:
    """Whether the trials of one arm can share packs."""

    key: tuple[Any, ...] | None
    """Trials of arms with equal keys share packs; None means that each trial runs alone."""
    reason: str
    """Sentences that say what keeps the trials from sharing packs, and which setting would change that. Empty if they
    share packs."""
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
        # the size applies to the arms that can be packed; the others run alone without an error
        if plan.key is None and not packable:
            raise ConfigError(
                f"`worker.pack_size` must be 1 or auto for arm `{arm.name}`, but got {size!r}: {plan.reason}"
            )
        num_trials = sum(other.trials for other in packable if plans[other.name].key == plan.key)
        if plan.key is not None and size > num_trials:
            raise ConfigError(
                f"`worker.pack_size <= {num_trials}` must hold, because only {num_trials} trials can share a pack "
                f"with arm `{arm.name}`, but got {size!r}."
            )
    return plans


def _plan_arm(arm: Arm) -> ArmPacking:
    config, objective, own = arm.base, arm.base.objective, [*SLOT_GROUPS]
    own += [f"objective.{name}" for name in objective.slot_keys]
    obstacles = [
        f"`{key}` is swept, but all slots of a pack must have the same value. Write an arm for each value, and "
        "the trials of each arm share packs."
        for key in arm.space
        if not {key, key.split(".")[0]} & {*own}
    ]
    capabilities = [corner.capabilities.packs for corner in arm.corner_configs]
    obstacles += [sentence for sentence in capabilities if sentence is not True]
    return ArmPacking(
        key=None if obstacles else (config.model, config.data, objective.shared, config.trainer),
        reason=" ".join(dict.fromkeys(obstacles)),
        largest=max(arm.corner_configs, key=lambda config: getattr(config.method, "rank", 0)),
    )


def explain_solo_arms(definition: Definition) -> list[str]:
    """Returns a note for each LoRA arm whose trials run alone because of a setting that the user could change."""
    plans = plan_packing(definition)
    return [
        f"`{arm.name}`: its trials run alone. {plans[arm.name].reason}"
        for arm in definition.arms
        if plans[arm.name].key is None
        and plans[arm.name].largest.method.adapter_kind is not None
        and arm.sweep_config.worker.pack_size != 1
        and arm.trials > 1
    ]


def explain_bases(definition: Definition) -> list[str]:
    """Returns a note on the bases of all arms; none if no arm has a quantised base."""
    by_kind: dict[str, list[str]] = {}
    for arm in definition.arms:
        for kind in dict.fromkeys(config.model.quantization for config in arm.corner_configs):
            by_kind.setdefault(kind, []).append(f"`{arm.name}`")
    if by_kind.keys() <= {"none"}:
        return []
    listed = "; ".join(f"{join_words(names)} {kind}" for kind, names in by_kind.items())
    note = f"`model.quantization` of each arm: {listed}."
    if "none" in by_kind:
        note += " A difference between arms on different bases is also an effect of the quantisation."
    return [note]

"""Decides which arms' trials can train together as a pack, and says which base each arm trains on.

Trials share a pack if they differ only in settings that each slot has for itself: `optim`, `schedule`, `logger`, seeds,
and the settings of `method=lora` that can be stacked. Model, data and trainer settings must be equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lorasweep.config.components import Component
from lorasweep.config.method import LoraConfig, PeftConfig
from lorasweep.config.run import METHODS_ON_QUANTISED_BASE, RunConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.packed.inject import why_not_packable
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.warnings import count_tokens
from lorasweep.wording import join_words

SLOT_GROUPS = ("method", "optim", "schedule", "logger", "seed", "seeds")
"""Groups of settings that each slot of a pack has for itself."""
SOLO_SETTINGS: Mapping[str, tuple[Callable[[RunConfig], bool], str, str]] = {
    "trainer.compile": (lambda config: config.trainer.compile, "", "trainer.compile=false"),
    "trainer.activation_checkpointing": (
        lambda config: config.trainer.activation_checkpointing,
        "",
        "trainer.activation_checkpointing=false",
    ),
    "trainer.devices": (lambda config: config.trainer.needs_process_group, "", "trainer.devices=1"),
    "optim._target_": (
        lambda config: isinstance(config.optim, Component),
        ", because all slots train with AdamW",
        "optim=adamw",
    ),
    "schedule._target_": (
        lambda config: isinstance(config.schedule, Component),
        ", because slots support only the named schedules",
        "schedule=cosine",
    ),
    "callbacks": (
        lambda config: bool(config.callbacks),
        ", because a callback would see several runs as one",
        "callbacks=none",
    ),
    "trainer.profiler": (
        lambda config: config.trainer.profiler is not None,
        ", because a step belongs to several runs",
        "trainer.profiler=null",
    ),
}
"""Settings that a pack does not support. For each: whether a run uses the setting, the end of the message, and an
override that removes the obstacle."""


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
        # a size for the whole sweep applies to the arms that can be packed; the others run alone without an error
        is_for_this_arm = arm.sweep_config.worker != definition.sweep_config.worker
        if plan.key is None and (is_for_this_arm or not packable):
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


def rank_arms_by_duration(definition: Definition) -> dict[str, int]:
    """Returns for each arm its place, 0 first, in the order in which workers take trials of equally advanced arms.

    The longest work comes first, so that short work is left for workers that become free at the end (longest processing
    time first, Graham 1969). A pack takes longest. Runs alone follow, those with the most computations first.
    """
    plans = plan_packing(definition)

    def sort_key(arm: Arm) -> tuple[bool, float]:
        is_packed = plans[arm.name].key is not None and arm.sweep_config.worker.pack_size != 1
        return not is_packed, -max(map(_count_passes, arm.corner_configs))

    return {arm.name: place for place, arm in enumerate(sorted(definition.arms, key=sort_key))}


def _count_passes(config: RunConfig) -> int:
    """Returns the cost of a run, in forward passes of one token.

    A backward pass costs one for the gradients of activations, and another one for those of all weights.
    """
    return count_tokens(config) * {"head": 1, "full": 3, "intrinsic": 3}.get(config.method.name, 2)


def explain_solo_arms(definition: Definition) -> list[str]:
    """Returns a note for each LoRA arm whose trials run alone because of a setting that the user could change."""
    plans = plan_packing(definition)
    return [
        f"`{arm.name}`: its trials run alone. {plans[arm.name].reason}"
        for arm in definition.arms
        if plans[arm.name].key is None
        and isinstance(plans[arm.name].largest.method, LoraConfig | PeftConfig)
        and arm.sweep_config.worker.pack_size != 1
        and arm.trials > 1
    ]


def explain_packing(definition: Definition) -> list[str]:
    """Returns notes that say which arms share packs, and what keeps other trials and arms from sharing them."""
    plans = plan_packing(definition)
    by_key: dict[Any, list[str]] = {}
    alone: dict[str, list[str]] = {}
    for arm in definition.arms:
        plan = plans[arm.name]
        if plan.key is not None and arm.sweep_config.worker.pack_size == 1:
            reason = "`worker.pack_size` is 1. `worker.pack_size=auto` lets them share packs."
            alone.setdefault(reason, []).append(arm.name)
        elif plan.key is not None:
            by_key.setdefault(plan.key, []).append(arm.name)
        elif arm.trials > 1:
            alone.setdefault(plan.reason, []).append(arm.name)
    notes = [f"{quote_names(names)}: trials share packs on one frozen base." for names in by_key.values()]
    for first, second in itertools.pairwise(by_key.values()):
        different = join_words(_list_differences(plans[first[0]].largest, plans[second[0]].largest))
        notes.append(f"{quote_names(first)} share no packs with {quote_names(second)}: {different} must be equal.")
    return [*notes, *(f"{quote_names(names)}: trials run alone. {reason}" for reason, names in alone.items())]


def explain_bases(definition: Definition) -> list[str]:
    """Returns a note on the bases of all arms; none if no arm has a quantised base."""
    by_kind: dict[str, list[Arm]] = {}
    for arm in definition.arms:
        for kind in dict.fromkeys(config.model.quantization for config in arm.corner_configs):
            by_kind.setdefault(kind, []).append(arm)
    unquantised = by_kind.pop("none", [])
    if not by_kind:
        return []
    parts = [f"{quote_names([arm.name for arm in arms])}: the base in {kind}" for kind, arms in by_kind.items()]
    if unquantised:
        parts.append(f"{quote_names([arm.name for arm in unquantised])}: the unquantised base")
    note = f"`model.quantization` decides the base of each arm. {'; '.join(parts)}."
    if trained := [arm for arm in unquantised if arm.corner_configs[0].method.name not in METHODS_ON_QUANTISED_BASE]:
        verb = "train" if len(trained) > 1 else "trains"
        names = quote_names([arm.name for arm in trained])
        note += f" {names} {verb} weights of the base, which is not possible in few bits."
    if unquantised:
        note += " A difference between arms on different bases is also an effect of the quantisation."
    return [note]


def quote_names(names: Sequence[str]) -> str:
    return join_words([f"`{name}`" for name in names])


def _list_differences(first: RunConfig, second: RunConfig) -> list[str]:
    """Returns the settings that two runs must share to be in one pack, and that differ."""
    return [
        f"`{group}.{field.name}`"
        for group in ("model", "data", "trainer")
        for field in fields(getattr(first, group))
        if getattr(getattr(first, group), field.name) != getattr(getattr(second, group), field.name, None)
    ]


def _plan_arm(arm: Arm) -> ArmPacking:
    config = arm.corner_configs[0]
    obstacles = _list_obstacles(arm)
    return ArmPacking(
        key=None if obstacles else (config.model, config.data, config.trainer),
        reason=" ".join(obstacles),
        largest=max(arm.corner_configs, key=lambda config: getattr(config.method, "rank", 0)),
    )


def _list_obstacles(arm: Arm) -> list[str]:
    """Returns a sentence for each setting that keeps the arm's trials from sharing packs."""
    obstacles = [
        f"`{key}` is swept, but all slots of a pack must have the same value. Write an arm for each value, and "
        "the trials of each arm share packs."
        for key in arm.space
        if key.split(".")[0] not in SLOT_GROUPS
    ]
    for config in arm.corner_configs:
        obstacles += _list_run_obstacles(config)
    return list(dict.fromkeys(obstacles))


def _list_run_obstacles(config: RunConfig) -> Iterator[str]:
    method, trainer = config.method, config.trainer
    if isinstance(method, PeftConfig):
        yield "`method=peft` trains one adapter at a time through PEFT; only `method=lora` shares packs."
        return
    if not isinstance(method, LoraConfig):
        yield f"`method={method.name}` trains alone; only `method=lora` shares packs."
        return  # no other setting would change that
    if config.model.factory is not None:
        yield "`model.factory` may mix the examples of a batch, which a pack shares. A model of `model.path` does not."
    if why := why_not_packable(method):
        yield f"{why}{_suggest_method(method)}"
    for key, (is_used, cause, override) in SOLO_SETTINGS.items():
        if is_used(config):
            yield f"`{key}` is not supported in packs{cause}. Set `{override}`."
    if trainer.max_steps % trainer.eval_every_steps:
        multiple = math.ceil(trainer.max_steps / trainer.eval_every_steps) * trainer.eval_every_steps
        up_to = min(trainer.eval_every_steps, trainer.max_steps // 2)  # at least one evaluation before the last step
        divisor = max((n for n in range(1, up_to + 1) if trainer.max_steps % n == 0), default=0)
        # fewer steps between evaluations keep the number of steps, but evaluations take time
        instead = f" or `trainer.eval_every_steps={divisor}`" if 2 * divisor > trainer.eval_every_steps else ""
        yield (
            "`trainer.max_steps` is not a multiple of `trainer.eval_every_steps`, but slots are refilled at "
            f"evaluations. Set `trainer.max_steps={multiple}`{instead}."
        )


def _suggest_method(method: LoraConfig) -> str:
    """Returns ` Set ...` with the settings of LoRA whose defaults let trials share packs."""
    defaults = {name: getattr(LoraConfig(), name) for name in ("variant", "init", "bias")}
    needed = {
        name: default
        for name, default in defaults.items()
        if why_not_packable(replace(method, **{**defaults, name: getattr(method, name)}))
    }
    return f" Set {join_words([f'`method.{name}={default}`' for name, default in needed.items()])}."

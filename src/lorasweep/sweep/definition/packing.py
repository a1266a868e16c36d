"""Which arms' trials train together as a pack (`Arm.packing`), and which base each arm trains on."""

from __future__ import annotations

import math
from typing import Any

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.wording import join_words


def check_packing(definition: Definition) -> None:
    """Raises ConfigError if `worker.pack_size` asks for packs where trials run alone, or for more slots than trials."""
    packable = [arm for arm in definition.arms if arm.packing.key is not None]
    for arm in definition.arms:
        size, plan = arm.sweep_config.worker.pack_size, arm.packing
        if size == "auto" or size == 1:
            continue
        # the size applies to the arms that can be packed; the others run alone without an error
        if plan.key is None and not packable:
            raise ConfigError(
                f"`worker.pack_size` must be 1 or auto for arm `{arm.name}`, but got {size!r}: {plan.reason}"
            )
        num_trials = sum(other.trials for other in definition.arms if other.packing.key == arm.packing.key)
        if plan.key is not None and size > num_trials:
            raise ConfigError(
                f"`worker.pack_size <= {num_trials}` must hold, because only {num_trials} trials can share a pack "
                f"with arm `{arm.name}`, but got {size!r}."
            )


def group_arms(definition: Definition) -> list[list[Arm]]:
    """Returns the arms in groups: arms whose trials share packs, and each other arm alone."""
    groups: dict[Any, list[Arm]] = {}
    for arm in definition.arms:
        is_packed = arm.packing.key is not None and arm.sweep_config.worker.pack_size != 1
        groups.setdefault(arm.packing.key if is_packed else arm.name, []).append(arm)
    return [*groups.values()]


def choose_pack_sizes(num_trials: int, *, slots: int, num_workers: int) -> list[int]:
    """Returns the sizes of the packs in which trials train: as few as fit, equally many for each worker, of even sizes.

    Nine trials with four slots are 3 + 3 + 3, and 3 + 2 + 2 + 2 for two workers. If the sizes can't be equal, the first
    packs have one trial more.
    """
    num_packs = min(num_trials, num_workers * math.ceil(num_trials / slots / num_workers))
    return [num_trials // num_packs + (number < num_trials % num_packs) for number in range(num_packs)]


def explain_solo_arms(definition: Definition) -> list[str]:
    """Returns a note for each LoRA arm whose trials run alone because of a setting that the user could change."""
    return [
        f"`{arm.name}`: its trials run alone. {arm.packing.reason}"
        for arm in definition.arms
        if arm.packing.key is None
        and arm.packing.largest.method.adapter_kind is not None
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

"""Says which base each arm trains on: the quantised one, or the unquantised one of the same files."""

from __future__ import annotations

from lorasweep.config.run import METHODS_ON_QUANTISED_BASE
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.packing import quote_names


def explain_bases(definition: Definition) -> list[str]:
    """Returns a note on the bases of all arms; none if no arm has a quantised base."""
    by_kind: dict[str, list[Arm]] = {}
    for arm in definition.arms:
        for kind in dict.fromkeys(config.model.quantization for config in arm.corners):
            by_kind.setdefault(kind, []).append(arm)
    unquantised = by_kind.pop("none", [])
    if not by_kind:
        return []
    parts = [f"{quote_names([arm.name for arm in arms])}: the base in {kind}" for kind, arms in by_kind.items()]
    if unquantised:
        parts.append(f"{quote_names([arm.name for arm in unquantised])}: the unquantised base")
    note = f"`model.quantization` decides the base of each arm. {'; '.join(parts)}."
    if trained := [arm for arm in unquantised if arm.corners[0].method.name not in METHODS_ON_QUANTISED_BASE]:
        verb = "train" if len(trained) > 1 else "trains"
        names = quote_names([arm.name for arm in trained])
        note += f" {names} {verb} weights of the base, which is not possible in few bits."
    if unquantised:
        note += " A difference between arms on different bases is also an effect of the quantisation."
    return [note]

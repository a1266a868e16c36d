"""Tab completion of overrides: keys, and the options of groups."""

from __future__ import annotations

from lorasweep.config.compose import (
    compose_values,
    dotted_keys,
    group_names,
    group_options,
    hydra_session,
)


def complete_override(prefix: str) -> list[str]:
    """Returns the overrides that begin with a prefix: a key with `=`, or after a group's `=` its options."""
    key, has_value, _ = prefix.partition("=")
    if not has_value:
        return [f"{name}=" for name in _keys() if name.startswith(key)]
    if key not in {*group_names("train"), *group_names("sweep")}:
        return []
    with hydra_session():
        return [f"{key}={option}" for option in group_options(key) if f"{key}={option}".startswith(prefix)]


def _keys() -> list[str]:
    """Returns every dotted key of a run and of a sweep with the default options."""
    keys: set[str] = set()
    for primary in ("train", "sweep"):
        keys.update(group_names(primary))
        keys.update(dotted_keys(compose_values(primary, {}, require_all=False)))
    return sorted(keys)

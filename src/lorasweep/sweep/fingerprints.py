"""Digests of everything that a sweep's runs read. They stay the same from its start, on every machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from lorasweep.models.load import list_model_files
from lorasweep.record import compute_sha256
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.sweep_file import name_in_errors
from lorasweep.training.inputs import InputsCache
from lorasweep.training.run_inputs import require_same_fingerprints


def compute_fingerprints(
    definition: Definition,
    inputs_cache: InputsCache,
    *,
    recorded: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> dict[str, dict[str, str]]:
    """Returns the digests by arm and by setting: those of `RunInputs.fingerprints`, and of all test data.

    A model counts by its files, because the fingerprint of its weights depends on the precision of the machine. Raises
    ConfigError if one of the `recorded` digests, with which the sweep began, is another one now.
    """
    digest = functools.cache(compute_sha256)  # arms share a model, and 1 GB takes a second
    found = {}
    for arm in definition.arms:
        inputs = inputs_cache.load(arm.base)
        values = inputs.fingerprints(arm.base)
        if inputs.base.folder is not None:
            del values["model.path"]
            values |= {f"model.path/{file.name}": digest(file)[:16] for file in list_model_files(inputs.base.folder)}
        if definition.sweep_config.confirm.seeds:
            values["data.test"] = inputs.splits.test().fingerprint
            others = {name: inputs_cache.load_splits(data, arm.base) for name, data in definition.retained.items()}
            values |= {f"retain.data.{name}": splits.test().fingerprint for name, splits in others.items()}
        with name_in_errors(f"arm `{arm.name}`"):
            require_same_fingerprints(recorded.get(arm.name, {}), values, config=arm.base, kind="sweep")
        found[arm.name] = values
    return found

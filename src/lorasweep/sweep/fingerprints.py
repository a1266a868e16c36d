"""Digests of everything that a sweep's runs read. They stay the same from its start, on every machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from lorasweep.models.load import list_model_files
from lorasweep.record import compute_sha256
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.sweep_file import name_in_errors
from lorasweep.training.inputs import InputsCache
from lorasweep.training.run_inputs import require_same_fingerprints

Fingerprints = Mapping[str, Mapping[str, str]]


def compute_fingerprints(definition: Definition, inputs_cache: InputsCache) -> dict[str, dict[str, str]]:
    """Returns the digests by arm and by setting: those of `RunInputs.fingerprints`, and of all test data.

    A model counts by its files, because the fingerprint of its weights depends on the precision of the machine.
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
        found[arm.name] = values
    return found


def check_fingerprints(recorded: Fingerprints, now: Fingerprints) -> None:
    """Raises ConfigError if the runs of a sweep would read something else than the runs before them."""
    for arm, values in recorded.items():
        with name_in_errors(f"arm `{arm}`"):
            require_same_fingerprints(values, now[arm], kind="sweep")

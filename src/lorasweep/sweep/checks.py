"""What is checked of a sweep before anything is written: each arm against its base model and data."""

from __future__ import annotations

from collections.abc import Mapping

from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.controller.rules import build_rule
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.packing import plan_packing
from lorasweep.sweep.definition.seeds import draw_seeds
from lorasweep.training.inputs import InputsCache
from lorasweep.training.prepare import check_run
from lorasweep.training.restore import require_trusted_code


def check_definition(definition: Definition, inputs_cache: InputsCache) -> dict[str, RunConfig]:
    """Checks every arm against its base model, before anything is written; returns one composed run per arm.

    Raises:
        ConfigError: A rank, target or other setting does not fit the model, a rung or the sampler does not fit the arm,
            or the search leaves no seed fresh.
    """
    for arm in definition.arms:
        for config in arm.corners():
            require_trusted_code(config)
    plan_packing(definition)
    draw_seeds(definition)
    configs: dict[str, RunConfig] = {}
    for arm in definition.arms:
        try:
            build_rule(arm)
            if arm.space:
                propose(arm, [], number=0, direction="minimize")
            for config in arm.corners():
                check_run(config, inputs_cache.of(config).base)
                configs.setdefault(arm.name, config)
                if definition.driver.confirm.seeds:
                    _read_test_data(config, inputs_cache)
        except ConfigError as error:
            raise ConfigError(f"arm `{arm.name}`: {error}") from error
    return configs


def _read_test_data(config: RunConfig, inputs_cache: InputsCache) -> None:
    """Reads the test data before hours of training, not after."""
    try:
        inputs_cache.of(config).splits.test()
    except ConfigError as error:
        raise ConfigError(f"{error} Or leave the confirm stage out with `confirm.seeds=0`.") from error


def sweep_metric(configs: Mapping[str, RunConfig], inputs_cache: InputsCache) -> str:
    """Returns what every arm is scored by; `data.metric: auto` depends on the data.

    Raises:
        ConfigError: The arms have different metrics.
    """
    metrics = sorted({inputs_cache.of(config).splits.metric for config in configs.values()})
    if len(metrics) > 1:
        raise ConfigError(f"all arms must have one `data.metric`, but got {', '.join(metrics)}.")
    return metrics[0]


def data_notes(configs: Mapping[str, RunConfig], inputs_cache: InputsCache) -> list[str]:
    """Returns what there is to say on the data of the arms and the attention that was chosen, each sentence once."""
    return list(dict.fromkeys(note for config in configs.values() for note in inputs_cache.of(config).notes))

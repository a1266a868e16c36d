"""Settings in the forms in which `TrainingModule` and `DataModule` take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lorasweep.config.build import build
from lorasweep.config.run import RunConfig
from lorasweep.config.trust import require_trusted
from lorasweep.training.restore import require_trusted_code

Settings: TypeAlias = RunConfig | Sequence[str] | Mapping[str, Any]
"""Settings of a run: a `RunConfig`, the words of `lorasweep train` (`["method.rank=8"]`), or a checkpoint's mapping."""


def read_settings(given: Settings, *, trust: bool = False) -> RunConfig:
    """Returns the settings of a run.

    Args:
        given: Settings in one of three forms. Nested mappings come from a checkpoint, which may be anyone's.
        trust: Whether code and pickles that nested mappings name may be run.

    Raises:
        ConfigError: A key or value is wrong, or `trust` is wanted.
    """
    if isinstance(given, RunConfig):
        return given
    if isinstance(given, Mapping):
        require_trusted(given)
        config = build(RunConfig, given)
        require_trusted_code(config, trust=trust, option="trust=True")
        return config
    from lorasweep.config.command_line import parse_overrides  # noqa: PLC0415 (Hydra is slow to start)
    from lorasweep.config.compose import compose_run  # noqa: PLC0415 (Hydra is slow to start)

    return compose_run(parse_overrides(given))

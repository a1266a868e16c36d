"""Trials that train the same function in other words, so that a reader does not count one result twice.

What is detected: settings that are equal once composed, and, where nothing depends on the size of the numbers in B,
settings that Adam makes equal. With B' = B / c and α' = c · α the change α B A is the same; B's gradient grows by c, of
which Adam's step is free, so B' stays B / c where its learning rate is that of B over c. That holds for B = 0 at the
start, no weight decay and no clipping (whose norm would weigh B's gradient anew), up to rounding and `optim.eps`.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from lorasweep.config.build import as_settings
from lorasweep.config.method import LoraConfig
from lorasweep.config.run import OptimConfig, RunConfig

DIGITS = 9
"""Numbers that agree to so many digits are one: 0.1 · 3 is not 0.3 in floating point."""


def describe_function(config: RunConfig) -> str:
    """Returns the same text for settings that train the same function, step by step, and another one for others."""
    settings = as_settings(config)
    del settings["seed"], settings["logger"]  # what the seed decides stands in `seeds`
    settings["trainer"] = {k: v for k, v in settings["trainer"].items() if k not in ("progress", "profiler")}
    if isinstance(config.method, LoraConfig):
        _canonize(settings, config, config.method)
    return repr(_rounded(settings))


def name_function(config: RunConfig) -> str:
    """Returns a short name of what `describe_function` describes."""
    return hashlib.sha256(describe_function(config).encode()).hexdigest()[:16]


def is_scale_free(config: RunConfig) -> bool:
    """Whether a run is the same when α grows by a factor and the learning rate of B shrinks by it."""
    starts_at_zero = isinstance(config.method, LoraConfig) and config.method.init in ("default", "gaussian")
    optim = config.optim
    return starts_at_zero and isinstance(optim, OptimConfig) and optim.weight_decay == 0 and optim.clip_norm is None


def _canonize(settings: dict[str, Any], config: RunConfig, method: LoraConfig) -> None:
    """Writes α as the factor on the change where one rank holds, and what α and B's rate share as their product."""
    own = settings["method"]
    ratio = config.optim.lr_ratio_b if is_scale_free(config) else 1.0
    if is_scale_free(config):
        settings["optim"]["lr_ratio_b"] = None
    power = 1.0
    if not method.rank_pattern:  # α/r and α/√r are one factor
        power = method.rank if method.scaling == "alpha_over_rank" else math.sqrt(method.rank)
        own["scaling"] = None
    own["alpha"] = method.alpha * ratio / power
    own["alpha_pattern"] = {name: alpha * ratio / power for name, alpha in method.alpha_pattern.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value

"""How the best learning rate moves with the length of runs and the batch size, as measured in docs/transfer.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorasweep.config.run import STEPS_KEY


@dataclass(frozen=True)
class Power:
    """The power p of `best rate ~ setting ** p`, with its 95 % interval."""

    value: float
    low: float
    high: float


BATCH_KEY = "trainer.batch_size"
POWERS: Mapping[str, Mapping[str, Power]] = {
    "lora": {STEPS_KEY: Power(0.06, -0.10, 0.21), BATCH_KEY: Power(0.49, 0.33, 0.65)},
}
"""By method and setting."""


def scale_rate(rate: float, method: str, ratios: Mapping[str, float]) -> tuple[float, float, float]:
    """Returns the learning rate for other settings, with the 95 % interval that follows from the powers.

    Args:
        rate: The learning rate for the old settings.
        method: Name of the method.
        ratios: By setting, its new value over its old one. Settings without a known power change nothing.
    """
    known = {key: ratio for key, ratio in ratios.items() if key in POWERS.get(method, {})}
    powers = POWERS.get(method, {})
    shift = sum(powers[key].value * math.log(ratio) for key, ratio in known.items())
    error = math.hypot(
        *((powers[key].high - powers[key].low) / 2 * math.log(ratio) for key, ratio in known.items()), 0.0
    )
    return tuple(rate * math.exp(shift + sign * error) for sign in (0, -1, 1))  # type: ignore[return-value]

"""How the best learning rate depends on the number of steps and the batch size, as measured in docs/transfer.md."""

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
POWERS: Mapping[str, Power] = {STEPS_KEY: Power(-0.20, -0.44, 0.04), BATCH_KEY: Power(0.49, 0.26, 0.72)}
"""The powers of LoRA's best learning rate, by setting."""


def find_powers(method: str) -> Mapping[str, Power]:
    """Returns the known powers of a method."""
    return POWERS if method == "lora" else {}


def scale_rate(rate: float, method: str, ratios: Mapping[str, float]) -> tuple[float, float, float]:
    """Returns the learning rate for other settings, and the ends of the 95 % interval that follows from the powers.

    Args:
        rate: The learning rate for the old settings.
        method: Name of the method.
        ratios: By setting, its new value over its old one. Settings without a known power change nothing.
    """
    moves = [(power, math.log(ratios[key])) for key, power in find_powers(method).items() if key in ratios]
    shift = sum(power.value * move for power, move in moves)
    error = math.hypot(*((power.high - power.low) / 2 * move for power, move in moves))
    return rate * math.exp(shift), rate * math.exp(shift - error), rate * math.exp(shift + error)

"""Predicts the learning rate for changed settings from a sweep, and tests the prediction (`lorasweep transfer`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.config.compose import compose_run, layer_settings
from lorasweep.config.run import LR, STEPS_KEY
from lorasweep.errors import ConfigError
from lorasweep.report.evidence.questions import NEGATIVE_VERDICTS
from lorasweep.report.recommend import find_recommended, list_overrides
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.sweep.controller.encoding import BATCH_KEY, find_powers, scale_rate
from lorasweep.sweep.controller.predictions import RATE_DIGITS
from lorasweep.sweep.definition.arms import SWEEP_GROUPS
from lorasweep.wording import format_score, join_words

PREDICTED = "predicted"
NEIGHBOURS = {"half": 0.5, "twice": 2.0}
"""The other arms of the test, with their learning rates as multiples of the predicted rate."""
TEST_SETTINGS = {"confirm.seeds": 3, "confirm.pairs": [[PREDICTED, name] for name in NEIGHBOURS]}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A predicted learning rate, and the sweep that tests it."""

    rate: float
    low: float
    high: float
    """Ends of its 95 % interval. It contains the error of the powers, but not that of the sweep's rate."""
    source_rate: float
    """The learning rate that the sweep recommends."""
    unknown: tuple[str, ...]
    """Changed settings without a measured effect on the rate."""
    content: Mapping[str, Any]
    """The content of a sweep file: the predicted rate, half of it and twice of it."""

    def describe(self) -> str:
        found = (
            f"learning rate {self.rate:.3g} [{self.low:.3g}, {self.high:.3g}], "
            f"from {self.source_rate:.3g} of the sweep."
        )
        if self.unknown:
            found += f" The effect of {join_words([f'`{key}`' for key in self.unknown])} on it is not known."
        return found


def plan_transfer(source: Path, changes: Mapping[str, Any]) -> Transfer:
    """Changes the recommended settings of a sweep. Returns their predicted learning rate and a sweep that tests it.

    Args:
        source: The folder of a complete sweep, or `SWEEP/ARM`.
        changes: New values by dotted key: settings of the run, or of the sweep that tests the prediction.

    Raises:
        ConfigError: Nothing that changes a run is given, the rate is given, or the sweep has no margin.
        RecordError: The sweep is not complete, or recommends nothing.
    """
    folder, data, arm, trial = find_recommended(source, key="SWEEP")
    settings = list_overrides(arm, trial)
    for_sweep = {key: value for key, value in changes.items() if key.split(".")[0] in SWEEP_GROUPS}
    changed = {key: value for key, value in changes.items() if key not in for_sweep}
    if not changed or LR in changed:
        raise ConfigError(
            f"a setting of the run other than `{LR}` must be changed, such as `{STEPS_KEY}=800`, but got "
            f"{join_words(list(changed)) or 'none'}."
        )
    if (margin := data.evidence.margin) is None:
        raise ConfigError(f"the sweep must have a margin that is known, but {str(folder)!r} has none.")
    old, new = compose_run(settings), compose_run(layer_settings(settings, changed))
    ratios = {
        STEPS_KEY: new.trainer.max_steps / old.trainer.max_steps,
        BATCH_KEY: new.trainer.batch_size / old.trainer.batch_size,
    }
    method = old.method.name
    rate, low, high = scale_rate(old.optim.lr, method, ratios)
    rates = {PREDICTED: rate, **{name: factor * rate for name, factor in NEIGHBOURS.items()}}
    shared = {key: value for key, value in layer_settings(settings, changed).items() if key != LR}
    return Transfer(
        rate=rate,
        low=low,
        high=high,
        source_rate=old.optim.lr,
        unknown=tuple(key for key in changed if key not in find_powers(method)),
        content={
            "name": "transfer",
            "settings": {**shared, **TEST_SETTINGS, "confirm.margin": margin, **for_sweep},
            "arms": {name: {"settings": {LR: float(f"{each:.{RATE_DIGITS}g}")}} for name, each in rates.items()},
        },
    )


def judge_transfer(folder: Path) -> tuple[str, str]:
    """Returns what the test shows, a hit, a miss, or that it is open, and the arm to use."""
    evidence = load_sweep_data(folder).evidence
    answers = {answer.reference: answer for answer in evidence.list_answers("pair")}
    if missing := [name for name in NEIGHBOURS if name not in answers]:
        return f"open: {join_words([f'`{name}`' for name in missing])} has no score.", PREDICTED
    means = {name: mean.value for name, mean in evidence.means.items()}
    scores = ", ".join(f"`{name}` {format_score(mean, beside=means.values())}" for name, mean in means.items())
    said = join_words([f"{answer.verdict} against `{name}`" for name, answer in answers.items()])
    said = f"the predicted rate is {said} ({scores})."
    if worse := [name for name, answer in answers.items() if answer.verdict in NEGATIVE_VERDICTS]:
        return f"miss: {said} Take `{worse[0]}`, or search again.", worse[0]
    if all(answer.is_settled for answer in answers.values()):
        return f"hit: {said}", PREDICTED
    return f"open: {said} More `confirm.seeds` may settle it.", PREDICTED

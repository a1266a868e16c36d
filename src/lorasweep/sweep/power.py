"""Predicts which difference between LoRA and full fine-tuning a sweep's test data and seeds can settle.

The prediction is the product's own test (`report.evidence`) on spreads that `benchmarks/bench_power.py` measures on
recorded runs: for accuracy and for running text. How much single examples differ under other metrics is not known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lorasweep.config.data import SplitSettings
from lorasweep.config.sweep import parse_margin
from lorasweep.data.split import BlockSplit, LabelledSplit, Splits
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.report.evidence.estimates import UNBOUNDED, Estimate
from lorasweep.report.evidence.questions import GROUP_FACTORS, POWER_SCORE, compute_level
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.confirm import list_questions

TEST_PERCENTS = (15, 20, 25, 30)
"""Percentages of the training data that are tried for the test split, beside the present one."""
MIN_SHRINKAGE = 1.1
"""Smallest factor by which a larger test split must reduce the settled difference to be worth its training data."""


class Spread(NamedTuple):
    """Standard deviations of LoRA's score minus full fine-tuning's, by source."""

    seeds: float
    groups: float
    """Groups of test examples."""
    interaction: float
    """One seed on one group, beyond the sum of both."""
    search: float
    """Better settings that the search may have missed."""

    def estimate(self, *, num_seeds: int, num_groups: float) -> Estimate:
        """Returns the expected estimate of a true difference of 0."""
        both = self.interaction**2 / (num_seeds * num_groups)
        return Estimate(
            value=0.0,
            seeds=tuple(range(num_seeds)),
            values=(0.0,) * num_seeds,
            seeds_variance=self.seeds**2 / num_seeds + both,
            groups_variance=self.groups**2 / num_groups + both,
            interaction_variance=both,
            search_variance=self.search**2,
            num_groups=max(2, round(num_groups)),
            bounds=UNBOUNDED,
        )


TEXT_SPREADS: Sequence[Spread] = (Spread(0.008, 0.082, 0.076, 0.012), Spread(0.023, 0.138, 0.131, 0.020))
"""Spreads on `stdlib_docs` and `stdlib_code`, as fractions of full fine-tuning's gain."""


def assume_accuracy(constant: float) -> tuple[float, Spread]:
    """Returns full fine-tuning's gain and the spread, from the accuracy of always giving the most frequent label.

    Assumes that full fine-tuning halves the errors of that answer; on movie_snippets it left 42 %. There, the variance
    of an example was 0.38 for each error of full fine-tuning, and 0.027 for the mean over seeds.
    """
    gain = errors = (1 - constant) / 2
    return gain, Spread(0.062 * gain, (0.027 * errors) ** 0.5, (0.38 * errors) ** 0.5, 0.005 * gain)


class Power(NamedTuple):
    """The test data and seeds of a sweep, with the assumed spreads and the margin."""

    groups: str
    """The number of groups of test examples, such as `1,000 test examples`."""
    num_groups: float
    """The number of groups of equal size that would be as informative as these groups."""
    num_seeds: int
    level: float
    unit: str
    """The unit of spreads and margin, in hundredths, with the assumption behind it."""
    spreads: Sequence[Spread]
    margin: float
    """0 if it is not known in this unit."""
    percents: dict[str, int]
    """The percentages of the training data that are split off; without `test` if more would not give more groups."""

    def find_differences(self, *, factor: float = 1.0) -> list[float]:
        """Returns for each spread the difference that the sweep settles with a probability of 80 %.

        `factor` multiplies the number of groups. The difference is half of the test's interval, plus `POWER_SCORE`
        standard errors.
        """
        differences = []
        for spread in self.spreads:
            estimate = spread.estimate(num_seeds=self.num_seeds, num_groups=factor * self.num_groups)
            _, high = estimate.find_interval(1 - 2 * self.level) or UNBOUNDED
            differences.append(high + POWER_SCORE * estimate.error)
        return differences

    def choose_percent(self, *, num_train: int, min_train: float) -> int | None:
        """Returns the smallest percentage for the test split that settles the margin; None if there is no choice.

        If none settles it, the seeds limit what can be settled. Then the result is the smallest percentage that settles
        nearly as small a difference as the best one. At least `min_train` of the `num_train` training examples stay.
        """
        rest = 100 - sum(self.percents.values())
        if (now := self.percents.get("test")) is None:
            return None
        possible = [percent for percent in TEST_PERCENTS if num_train * (rest + now - percent) / rest >= min_train]
        settled = {percent: self.find_differences(factor=percent / now)[-1] for percent in (now, *possible)}
        wanted = max(self.margin, MIN_SHRINKAGE * min(settled.values()))
        return next(percent for percent, difference in settled.items() if difference <= wanted)

    def describe(self) -> str:
        """Returns sentences on the settled difference, the margin, and what would help."""
        differences, margin, now = self.find_differences(), self.margin, self.percents.get("test")
        shown = " to ".join(f"{100 * difference:.1f}" for difference in differences)
        text = (
            f"With {self.groups} and {self.num_seeds} seeds, a difference between LoRA and full fine-tuning is settled "
            f"in 4 of 5 sweeps if it is {shown} {self.unit}."
        )
        if not margin or differences[-1] <= margin:
            return f"{text} The margin is {100 * margin:.1f}." if margin else text
        factors = {f"`data.test_fraction={percent / 100:g}`": percent / now for percent in TEST_PERCENTS if now}
        factors |= {f"{factor:g} times as much test data": factor for factor in GROUP_FACTORS}
        remedies = [name for name, factor in factors.items() if self.find_differences(factor=factor)[-1] <= margin]
        remedies.append(
            f"a margin {math.ceil(10 * differences[-1] / margin) / 10:g} times as large, but no larger test split,"
        )
        return f"{text} The margin is {100 * margin:.1f}, so the first question may stay open: {remedies[0]} would do."


def assess_power(definition: Definition, splits: Splits) -> Power | None:
    """Returns what a sweep can settle; None if it has no full fine-tuning, or if its metric's spread is not known."""
    questions, looks = list_questions(definition), definition.sweep_config.confirm.list_looks()
    if not any(question.name == "as_good_as_full" for question in questions) or max(looks, default=0) < 2:
        return None
    test, data = splits.test(), definition.arms[0].base.data
    margin, sizes = parse_margin(definition.sweep_config.confirm.margin), list(Counter(test.groups).values())
    percents = data.split_percents if isinstance(data, SplitSettings) else {}
    if isinstance(test, LabelledSplit) and splits.metric == "accuracy":
        gain, spread = assume_accuracy(splits.score_constant_answer(test)["accuracy"])
        spreads: Sequence[Spread] = [spread]
        size = margin.value * (gain if margin.is_share_of_gain else 1.0)
        name = "examples" if len(sizes) == len(test) else "groups"
        unit = "points of accuracy (if full halves the errors of the majority class)"
    elif isinstance(test, BlockSplit) and splits.metric in NextTokens.metrics:
        spreads, name, unit = TEXT_SPREADS, "documents", "% of full's gain (two recorded tasks)"
        size = margin.value if margin.is_share_of_gain else 0.0  # the gain is not known
        if not set(test.groups).isdisjoint(splits.train.groups):  # the test split has the ends of all documents
            percents.pop("test", None)
    else:
        return None
    return Power(
        groups=f"{len(sizes):,} test {name}",
        num_groups=sum(sizes) ** 2 / sum(size**2 for size in sizes),
        num_seeds=max(looks),
        level=compute_level(questions, looks),
        unit=unit,
        spreads=spreads,
        margin=size,
        percents=percents,
    )


def describe_power(definition: Definition, splits: Splits) -> list[str]:
    """Returns the sentences on what the test data and seeds can settle; empty if nothing can be said."""
    groups = set(splits.test().groups) if definition.sweep_config.confirm.list_looks() else set()
    if len(groups) == 1:
        return [
            f"All test examples ({len(splits.test())}) are in one group ({groups.pop()!r}), which says nothing about "
            "other groups: verdicts will hold for this group alone. Give test data of at least 20 documents, prompts "
            "or groups."
        ]
    if power := assess_power(definition, splits):
        return [power.describe()]
    if not (groups and any(question.name == "as_good_as_full" for question in list_questions(definition))):
        return []
    chosen = definition.sweep_config.confirm.metric
    return [
        f"Which difference {len(groups):,} groups of test examples settle is not known before the first look: only for "
        "accuracy and running text it was measured how much examples differ, not for "
        f"`{splits.metric if chosen == 'auto' else chosen}` of these data."
    ]

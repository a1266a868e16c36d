"""A plan's prediction is what the product's own test settles, and more test data is advised only where it helps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.objectives.test_objectives import make_splits

from lorasweep.config.sweep import parse_margin
from lorasweep.objectives.labels import Classification
from lorasweep.record import Question
from lorasweep.report.evidence.estimates import ConfirmScores
from lorasweep.report.evidence.questions import MarginScale, answer_questions, compute_level
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.overrides import SweepOverrides
from lorasweep.sweep.power import Power, Spread, assess_power, assume_accuracy, describe_power

LOOKS = (10,)
QUESTION = Question(name="as_good_as_full", arm="lora", key=None, subjects=["lora"], reference="full")


def make_power(*spreads, num_groups=1000, margin=0.0125, percents=None):
    return Power(
        groups=f"{num_groups:,} test examples",
        num_groups=num_groups,
        num_seeds=LOOKS[-1],
        level=compute_level([QUESTION], LOOKS),
        unit="points",
        spreads=spreads,
        margin=margin,
        percents={"validation": 10, "test": 10} if percents is None else percents,
    )


def test_the_settled_difference_shrinks_with_the_root_of_the_test_data_down_to_the_part_of_the_seeds():
    (one,) = make_power(Spread(0.0, 0.1, 0.3, 0.0)).find_differences()
    (four,) = make_power(Spread(0.0, 0.1, 0.3, 0.0)).find_differences(factor=4)
    # Student's t with 999 and 9 degrees of freedom has nearly the tails of that with 3,999 and 9
    assert four == pytest.approx(one / 2, rel=0.01)
    (few,) = make_power(Spread(0.02, 0.1, 0.3, 0.0), num_groups=10**4).find_differences()
    (many,) = make_power(Spread(0.02, 0.1, 0.3, 0.0), num_groups=10**8).find_differences()
    (seeds,) = make_power(Spread(0.02, 0.0, 0.0, 0.0)).find_differences()
    assert few > many == pytest.approx(seeds, rel=0.01)


@pytest.mark.parametrize(
    "spread",
    [
        Spread(0.0, 0.1, 0.3, 0.0),
        Spread(0.03, 0.05, 0.1, 0.0),
        Spread(0.01, 0.08, 0.2, 0.005),
    ],
)
def test_a_difference_of_this_size_is_settled_in_four_of_five_simulated_sweeps(spread):
    rng, repeats, num_groups, settled = np.random.default_rng(3), 400, 150, 0
    (difference,) = make_power(spread, num_groups=num_groups).find_differences()
    # the margin is too small for a verdict within it
    scale = MarginScale(margin=parse_margin(1e-9), sign=1, base=None, full="full")
    for _ in range(repeats):
        missed = rng.normal(0, spread.search)
        table = (
            difference + missed + rng.normal(0, spread.seeds, (LOOKS[-1], 1)) + rng.normal(0, spread.groups, num_groups)
        )
        table = table + rng.normal(0, spread.interaction, (LOOKS[-1], num_groups))
        hard = rng.normal(0, 1, num_groups)
        scores = ConfirmScores(
            values={"lora": dict(enumerate(hard + table)), "full": dict.fromkeys(range(LOOKS[-1]), hard)},
            shares=np.full(num_groups, 1 / num_groups),
            num_examples=num_groups,
            problems=(),
            search_errors={"lora": spread.search},
        )
        (answer,) = answer_questions([QUESTION], scores, scale, looks=LOOKS)
        settled += answer.verdict == "worse"
    # three standard errors of a share of 400 are 0.06; 0.84 is the normal score, and the errors are estimated
    assert settled / repeats == pytest.approx(0.8, abs=0.08)


def test_what_would_settle_the_margin_is_named_and_the_smallest_share_that_does_is_chosen():
    spread = Spread(0.002, 0.02, 0.3, 0.0)
    power = make_power(spread, num_groups=300)
    assert power.choose_percent(num_train=8000, min_train=320) == 20
    assert "may stay open: `data.test_fraction=0.2` would do" in power.describe()
    assert "may stay open: 2 times as much test data would do" in power._replace(percents={}).describe()
    assert power._replace(percents={}).choose_percent(num_train=8000, min_train=320) is None
    assert power._replace(num_groups=8000).choose_percent(num_train=8000, min_train=320) == 10
    assert power._replace(num_groups=8000).describe().endswith("The margin is 1.2.")
    noisy = make_power(Spread(0.05, 0.02, 0.3, 0.0))
    assert noisy.choose_percent(num_train=8000, min_train=320) == 10  # the seeds decide
    assert "a margin 4 times as large, but no larger test split, would do." in noisy.describe()
    assert "margin" not in make_power(spread, margin=0.0).describe()


def test_training_keeps_its_minimum():
    power = make_power(Spread(0.0, 0.1, 0.3, 0.0), num_groups=60)
    assert power.choose_percent(num_train=480, min_train=320) == 25  # 480 · 65 / 80 = 390 stay
    assert power.choose_percent(num_train=480, min_train=400) == 20
    assert power.choose_percent(num_train=300, min_train=320) == 10


def test_the_gain_in_accuracy_is_half_of_the_errors_of_the_most_frequent_label(content, write_file):
    content["settings"]["confirm.seeds"] = 5
    definition = read_definition(write_file(content))
    labels = [0, 1, 1, 1] * 50
    splits = make_splits(Classification(num_classes=2), labels, labels, torch.int64)
    rows = tuple(map(str, range(len(labels))))
    splits.validation.__dict__["groups"] = rows
    splits = SimpleNamespace(
        **{name: getattr(splits, name) for name in ("score_constant_answer", "validation", "train")},
        metric="accuracy",
        test=lambda: splits.validation,
    )
    power = assess_power(definition, splits)
    assert (power.groups, power.num_groups, power.num_seeds) == ("200 test examples", 200, 5)
    assert power.margin == pytest.approx(0.05 * 0.125)
    assert power.spreads == [assume_accuracy(0.75)[1]]
    splits.metric = "f1"
    (said,) = describe_power(definition, splits)
    assert "200 groups of test examples" in said
    assert "not for `f1` of these data" in said
    splits.metric = "accuracy"
    absolute = read_definition(write_file(content), SweepOverrides.parse(["confirm.margin=0.02"]))
    assert assess_power(absolute, splits).margin == 0.02
    assert assess_power(read_definition(write_file(content), SweepOverrides.parse(["confirm.seeds=1"])), splits) is None
    assert assess_power(read_definition(write_file(content), SweepOverrides.parse(["arms.full=null"])), splits) is None
    splits.validation.__dict__["groups"] = ("book",) * len(labels)
    assert "in one group ('book')" in describe_power(definition, splits)[0]

"""Scores from examples: the metrics of all of them together, and those of the constant answer."""

import dataclasses
import math

import pytest
import torch
import torchmetrics
from scipy import stats
from tests.data.conftest import make_ragged
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torchmetrics.functional import auroc
from torchmetrics.functional.classification import binary_average_precision

from lorasweep.config.data import MetricComponent, ScoreMetric
from lorasweep.data.rows import IGNORED, Rows, repeat_batch
from lorasweep.errors import ConfigError
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.objectives.objective import Evaluation, ExampleScores, build_own_metric
from lorasweep.tasks.splits import DataSplits
from lorasweep.tasks.table.objective import Classification, Regression


class SquaredGap(torchmetrics.Metric):
    """A user's own metric: the mean squared distance of probability and label."""

    higher_is_better = False

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds, target):
        self.total += (preds - one_hot(target, preds.shape[-1])).square().sum()
        self.count += len(target)

    def compute(self):
        return self.scale * self.total / self.count


class Table(nn.Module):
    """A model whose logits are rows of a table."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids):
        return self.logits[input_ids]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_metric(target, direction="auto", **arguments):
    return build_own_metric(MetricComponent(target=target, arguments=arguments, direction=direction))


def evaluate(objective, logits, targets):
    """Returns the metrics after batches of different sizes, which must not be averaged."""
    evaluation = Evaluation(objective)
    for rows in (torch.arange(0, 5), torch.arange(5, len(targets))):
        evaluation.update(objective.score(Table(logits), {"input_ids": rows, "targets": targets[rows]}))
    return {name: value.item() for name, value in evaluation.compute().items()}


def f1_of(predicted, target, label):
    hits = ((predicted == label) & (target == label)).sum()
    return (2 * hits / ((predicted == label).sum() + (target == label).sum())).item()


CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 0, 2, 0, 1])
BINARY = CLASSES.clamp(max=1)
NUMBERS = draw(12, seed=1)
TEXT = torch.randint(8, (12, 6), generator=torch.Generator().manual_seed(2))
TEXT[0, 2:] = IGNORED
TEXT[7] = IGNORED
CASES = {
    "text": (NextTokens(bytes_per_token=4.5), draw(12, 6, 8), TEXT),
    "two classes": (Classification(num_classes=2), draw(12, 2), BINARY),
    "three classes": (Classification(num_classes=3), draw(12, 3), CLASSES),
    "numbers": (Regression(), draw(12, 1), NUMBERS),
}


def expect(kind, logits, targets):
    """Returns the metrics by other ways than those of the objectives."""
    if kind == "numbers":
        predicted = logits[:, 0]
        mse = (predicted - targets).square().mean().item()
        pearson, spearman = (correlate(predicted, targets).statistic for correlate in (stats.pearsonr, stats.spearmanr))
        return {"pearson": pearson, "spearman": spearman, "mse": mse, "loss": mse}
    if kind == "text":
        loss = cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=IGNORED).item()
        return {"bits_per_byte": loss / math.log(2) / 4.5, "loss": loss, "perplexity": math.exp(loss)}
    predicted, classes = logits.argmax(-1), logits.shape[1]
    f1 = [f1_of(predicted, targets, label) for label in range(classes)]
    expected = {
        "accuracy": (predicted == targets).double().mean().item(),
        "f1": f1[1] if classes == 2 else sum(f1) / classes,
        "loss": cross_entropy(logits, targets).item(),
    }
    # of two classes it is Pearson's correlation of the two columns
    return expected | ({"matthews": stats.pearsonr(predicted, targets).statistic} if classes == 2 else {})


@pytest.mark.parametrize("kind", CASES)
def test_metrics_are_those_of_all_examples_together(kind):
    objective, logits, targets = CASES[kind]
    found, expected = evaluate(objective, logits, targets), expect(kind, logits, targets)
    assert list(found) == list(objective.metrics)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)  # torchmetrics: fp32


def test_a_constant_guess_correlates_with_nothing():
    assert evaluate(Regression(), torch.ones(12, 1), NUMBERS)["pearson"] == 0
    assert evaluate(Regression(), torch.ones(12, 1), NUMBERS)["spearman"] == 0
    assert evaluate(Classification(num_classes=2), torch.tensor([[1.0, 0.0]] * 12), BINARY)["matthews"] == 0


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("text", "loss"), ("text", "bits_per_byte"), ("three classes", "accuracy"), ("three classes", "loss")],
)
def test_weighted_mean_over_examples_is_the_metric(kind, metric):
    objective, logits, targets = CASES[kind]
    scores = objective.score(Table(logits), {"input_ids": torch.arange(12), "targets": targets})
    values, weights = objective.per_example(metric, scores)
    assert ((values * weights).sum() / weights.sum()).item() == pytest.approx(objective.compute(scores)[metric].item())


def test_training_losses_count_only_scored_tokens_and_weigh_classes_as_torch_does():
    objective, logits, targets = CASES["text"]
    losses = objective.losses(Table(logits), {"input_ids": torch.arange(12), "targets": targets})
    assert losses[7] == 0
    expected = cross_entropy(logits[0, :2], targets[0, :2], reduction="sum")
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-6)  # fp32 sums of two
    objective, logits, targets = CASES["three classes"]
    weight = torch.tensor([0.5, 2.0, 1.0])
    batch = {"input_ids": torch.arange(12), "targets": targets, "weights": weight[targets]}
    found = objective.losses(Table(logits), batch).sum() / weight[targets].sum()
    torch.testing.assert_close(found, cross_entropy(logits, targets, weight=weight))


def test_a_batch_repeated_for_slots_scores_the_same_in_each():
    objective, logits, targets = CASES["text"]
    batch = {"input_ids": torch.arange(12), "targets": targets}
    scores, alone = (objective.score(Table(logits), each) for each in (repeat_batch(batch, slots=3), batch))
    for slot in range(3):
        torch.testing.assert_close(scores.select_slot(slot, slots=3).loss, alone.loss)
        assert torch.equal(scores.select_slot(slot, slots=3).items, alone.items)


def test_sum_of_many_examples_keeps_its_digits_and_nan_is_not_hidden():
    objective = NextTokens(bytes_per_token=1.0)
    scores = ExampleScores(loss=torch.tensor([2.0**24, 1.0] * 3), items=torch.ones(6))  # fp32 sums would drop the ones
    assert objective.compute(scores)["loss"].item() == 3 * (2**24 + 1) / 6
    scores = ExampleScores(loss=torch.tensor([1.0, math.nan]), items=torch.ones(2))
    assert all(value.isnan() for value in objective.compute(scores).values())


OWN_METRICS = [
    (
        ("three classes", "torchmetrics.AUROC", {"task": "multiclass", "num_classes": 3}),
        lambda logits, targets: auroc(logits.softmax(-1), targets, task="multiclass", num_classes=3),
    ),
    (
        ("two classes", "torchmetrics.classification.BinaryAveragePrecision", {}),
        lambda logits, targets: binary_average_precision(logits.softmax(-1)[:, 1], targets),
    ),
    (
        ("numbers", "torchmetrics.MeanAbsoluteError", {}),
        lambda logits, targets: (logits[:, 0] - targets).abs().mean(),
    ),
    (
        ("three classes", f"{__name__}.SquaredGap", {"scale": 0.5}),
        lambda logits, targets: 0.5 * (logits.softmax(-1) - one_hot(targets, 3)).square().sum(-1).mean(),
    ),
]


@pytest.mark.parametrize(("case", "expected"), OWN_METRICS)
def test_a_metric_by_its_class_is_that_of_all_examples_together(case, expected):
    kind, target, arguments = case
    objective, logits, targets = CASES[kind]
    own = build_metric(target, **arguments)
    found = evaluate(dataclasses.replace(objective, own_metric=own), logits, targets)
    assert found[own.score.name] == pytest.approx(expected(logits, targets).item(), rel=1e-6)  # fp32 sums
    assert "loss" in found


def test_the_direction_of_a_metric_comes_from_its_class_or_the_settings():
    error = build_metric("torchmetrics.classification.MulticlassCalibrationError", num_classes=3)
    assert error.score.direction == "minimize"
    assert build_metric("torchmetrics.F1Score", task="multiclass", num_classes=3).score.direction == "maximize"
    assert build_metric("torchmetrics.PearsonCorrCoef", direction="maximize").score.direction == "maximize"


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("torch.nn.Linear", {}),
        ("torchmetrics.MetricCollection", {}),
        ("torchmetrics.PearsonCorrCoef", {}),  # its direction is not known
        ("torchmetrics.classification.MulticlassF1Score", {"num_classes": 5}),
        ("torchmetrics.classification.MulticlassF1Score", {"num_classes": 3, "average": "none"}),
        ("torchmetrics.classification.BinaryF1Score", {}),
    ],
)
def test_a_metric_that_can_not_score_is_refused(target, arguments):
    with pytest.raises(ConfigError, match=r"`data\.metric"):
        evaluate(Classification(num_classes=3, own_metric=build_metric(target, **arguments)), draw(12, 3), CLASSES)


def make_splits(objective, train, validation, dtype):
    """Splits of labels alone."""
    found = [
        Rows(
            name=name,
            fingerprint="0",
            sequences={"input_ids": make_ragged([[1]] * len(labels))},
            columns={"targets": torch.tensor(labels, dtype=dtype)},
            weights=torch.ones(len(labels)),
            facts={},
        )
        for name, labels in (("train", train), ("validation", validation))
    ]
    name, direction = next(iter(objective.metrics.items()))
    metric = ScoreMetric(name=name, direction=direction)
    return DataSplits(
        train=found[0], validation=found[1], objective=objective, score_metric=metric, test=lambda: found[1]
    )


def score_constant(objective, train, validation, dtype=torch.int64):
    splits = make_splits(objective, train, validation, dtype)
    return splits.score_constant_answer(splits.validation)


@pytest.mark.parametrize("train", [[0, 2, 2, 1, 2, 0], [1, 0, 1, 0], [2, 2, 2]])
def test_most_frequent_class_of_train_is_the_constant_answer(train):
    validation = [2, 0, 0, 1, 2, 2, 1]
    found = score_constant(Classification(num_classes=3), train, validation)
    most_frequent = max(range(3), key=train.count)  # of equally frequent ones the first
    assert found["accuracy"] == pytest.approx(validation.count(most_frequent) / 7)
    assert found["matthews"] == 0
    shares = [(train.count(label) + 1) / (len(train) + 3) for label in range(3)]
    # fp32 logits: 1e-6
    assert found["loss"] == pytest.approx(-sum(math.log(shares[label]) for label in validation) / 7, rel=1e-6)


@pytest.mark.parametrize("count", [3, 1000])
def test_the_mean_as_constant_answer_has_the_squared_error_around_it_and_no_correlation(count):
    train, validation = [0.1 * n for n in range(count)], [0.3, 0.7, 2.0]
    mean = sum(train) / count
    found = score_constant(Regression(), train, validation, torch.float32)
    assert found["mse"] == pytest.approx(sum((x - mean) ** 2 for x in validation) / 3, rel=1e-5)  # fp32
    assert (found["pearson"], found["spearman"]) == (0, 0)

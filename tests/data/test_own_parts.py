"""A metric and a loss by `_target_`: they compute what torchmetrics and torch would, or are refused before training."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.functional import cross_entropy, huber_loss, multi_margin_loss, one_hot
from torchmetrics.functional import auroc
from torchmetrics.functional.classification import binary_average_precision

from lorasweep.config.components import instantiate
from lorasweep.config.data import MetricComponent
from lorasweep.data.own_metric import build_own_metric
from lorasweep.data.split import IGNORED
from lorasweep.data.tasks import Classification, Evaluation, LanguageModelling, Regression
from lorasweep.errors import ConfigError
from lorasweep.training.packs.pack import compute_slot_losses


class SquaredGap(torchmetrics.Metric):
    """The user's own: the mean squared distance of probability and label."""

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


class Focal(nn.Module):
    """The user's own: the focal loss (arXiv 1708.02002), which counts easy items less."""

    def forward(self, logits, targets):
        losses = cross_entropy(logits, targets, reduction="none")
        return (1 - (-losses).exp()) * losses


class Table(nn.Module):
    """A model whose logits are rows of a table."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids):
        return self.logits[input_ids]


def build_metric(target, **settings):
    direction = settings.pop("direction", "auto")
    return build_own_metric(MetricComponent(target=target, arguments=settings, direction=direction))


def build_loss(target, **settings):
    return instantiate(MetricComponent(target=target, arguments=settings), key="data.loss", expected=nn.Module)


def evaluate(task, logits, targets):
    """Returns the metrics after batches of different sizes."""
    evaluation = Evaluation(task)
    for rows in (torch.arange(0, 5), torch.arange(5, len(targets))):
        evaluation.update(task.score(Table(logits), {"input_ids": rows, "targets": targets[rows]}))
    return {name: value.item() for name, value in evaluation.compute().items()}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 0, 2, 0, 1])
TEXT_TARGETS = torch.randint(8, (12, 6), generator=torch.Generator().manual_seed(2))
TEXT_TARGETS[0, 2:] = IGNORED
TEXT_TARGETS[7] = IGNORED
METRICS = {
    "ranking": (
        ("torchmetrics.AUROC", {"task": "multiclass", "num_classes": 3}),
        lambda own: Classification(num_classes=3, own_metric=own),
        (draw(12, 3), CLASSES),
        lambda logits, targets: auroc(logits.softmax(-1), targets, task="multiclass", num_classes=3),
    ),
    "binary": (
        ("torchmetrics.classification.BinaryAveragePrecision", {}),
        lambda own: Classification(num_classes=2, own_metric=own),
        (draw(12, 2), CLASSES.clamp(max=1)),
        lambda logits, targets: binary_average_precision(logits.softmax(-1)[:, 1], targets),
    ),
    "numbers": (
        ("torchmetrics.MeanAbsoluteError", {}),
        lambda own: Regression(own_metric=own),
        (draw(12, 1), draw(12, seed=1)),
        lambda logits, targets: (logits[:, 0] - targets).abs().mean(),
    ),
    "text": (
        ("torchmetrics.classification.MulticlassAccuracy", {"num_classes": 8, "average": "micro"}),
        lambda own: LanguageModelling(bytes_per_token=None, own_metric=own),
        (draw(12, 6, 8), TEXT_TARGETS),
        lambda logits, targets: (logits.argmax(-1) == targets)[targets != IGNORED].double().mean(),
    ),
    "own": (
        (f"{__name__}.SquaredGap", {"scale": 0.5}),
        lambda own: Classification(num_classes=3, own_metric=own),
        (draw(12, 3), CLASSES),
        lambda logits, targets: 0.5 * (logits.softmax(-1) - one_hot(targets, 3)).square().sum(-1).mean(),
    ),
}


@pytest.mark.parametrize("case", METRICS)
def test_a_metric_is_that_of_all_examples_together(case):
    (target, arguments), make_task, (logits, targets), expected = METRICS[case]
    own = build_metric(target, **arguments)
    found = evaluate(make_task(own), logits, targets)
    assert found[own.score.name] == pytest.approx(expected(logits, targets).item(), rel=1e-6)  # fp32 sums
    assert "loss" in found


def test_the_direction_of_a_metric_comes_from_its_class_or_the_settings():
    assert (
        build_metric("torchmetrics.classification.MulticlassCalibrationError", num_classes=3).score.direction
        == "minimize"
    )
    assert build_metric("torchmetrics.F1Score", task="multiclass", num_classes=3).score.direction == "maximize"
    assert build_metric("torchmetrics.PearsonCorrCoef", direction="maximize").score.direction == "maximize"
    with pytest.raises(ConfigError, match=r"`data\.metric\.direction` must be minimize or maximize"):
        build_metric("torchmetrics.PearsonCorrCoef")


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("torch.nn.Linear", {}),
        ("torchmetrics.MetricCollection", {}),
        ("torchmetrics.classification.MulticlassF1Score", {"num_classes": 5}),
        ("torchmetrics.classification.MulticlassF1Score", {"num_classes": 3, "average": "none"}),
        ("torchmetrics.classification.BinaryF1Score", {}),
    ],
)
def test_a_metric_that_can_not_score_is_refused(target, settings):
    with pytest.raises(ConfigError, match=r"`data\.metric"):
        evaluate(Classification(num_classes=3, own_metric=build_metric(target, **settings)), draw(12, 3), CLASSES)


def test_losses_of_labels_and_numbers_are_those_of_torch():
    rows, logits, classes = torch.arange(5), draw(5, 3), CLASSES[:5]
    batch = {"input_ids": rows, "targets": classes}
    margin = Classification(
        num_classes=3, own_loss=build_loss("torch.nn.MultiMarginLoss", margin=0.5, reduction="none")
    )
    expected = multi_margin_loss(logits, classes, margin=0.5, reduction="none")
    torch.testing.assert_close(margin.losses(Table(logits), batch), expected)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0])  # class weights still count
    torch.testing.assert_close(margin.losses(Table(logits), batch | {"weights": weights}), expected * weights)
    # evaluations keep the cross-entropy
    torch.testing.assert_close(
        margin.score(Table(logits), batch).loss, cross_entropy(logits, classes, reduction="none")
    )
    numbers, targets = draw(5, 1), draw(5, seed=1)
    huber = Regression(own_loss=build_loss("torch.nn.HuberLoss", delta=0.1, reduction="none"))
    found = huber.losses(Table(numbers), {"input_ids": rows, "targets": targets})
    torch.testing.assert_close(found, huber_loss(numbers[:, 0], targets, delta=0.1, reduction="none"))


def test_a_loss_of_text_counts_scored_tokens_and_tells_slots_apart():
    logits, targets = draw(4, 6, 8), TEXT_TARGETS[:4]
    task = LanguageModelling(bytes_per_token=None, own_loss=build_loss(f"{__name__}.Focal"))
    batch = {"input_ids": torch.arange(4), "targets": targets}
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    expected = ((1 - (-losses).exp()) * losses).view(4, 6).sum(1)
    torch.testing.assert_close(task.losses(Table(logits), batch), expected)
    by_slot = compute_slot_losses(task, Table(logits), batch, slots=2)
    torch.testing.assert_close(by_slot, expected.view(2, 2).sum(1))


def test_a_loss_that_is_no_module_or_a_mean_is_refused():
    with pytest.raises(ConfigError, match=r"`data\.loss"):
        build_loss("torch.optim.SGD")
    batch = {"input_ids": torch.arange(5), "targets": CLASSES[:5]}
    task = Classification(num_classes=3, own_loss=build_loss("torch.nn.CrossEntropyLoss"))
    with pytest.raises(ConfigError, match=r"`data\.loss` .*reduction=none"):
        task.losses(Table(draw(5, 3)), batch)

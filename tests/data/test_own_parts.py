"""A metric by `_target_` computes what torchmetrics would, or is refused before training."""

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.functional import one_hot
from torchmetrics.functional import auroc
from torchmetrics.functional.classification import binary_average_precision

from lorasweep.config.data import MetricComponent
from lorasweep.data.split import IGNORED
from lorasweep.data.tasks import Classification, Evaluation, LanguageModelling, Regression, build_own_metric
from lorasweep.errors import ConfigError


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
        lambda own: LanguageModelling(bytes_per_token=1.0, own_metric=own),
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
    error = build_metric("torchmetrics.classification.MulticlassCalibrationError", num_classes=3)
    assert error.score.direction == "minimize"
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

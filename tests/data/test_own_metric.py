"""A metric by `_target_`: it scores what torchmetrics would, or is refused in one sentence before anything trains."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torchmetrics
from tests.data.fixed_model import FixedModel
from torch.nn.functional import one_hot

from lorasweep.config.compose import compose_run
from lorasweep.config.data import MetricComponent
from lorasweep.data.own_metric import build_own_metric
from lorasweep.data.split import IGNORED
from lorasweep.data.tasks import Classification, Evaluation, LanguageModelling, MultiLabel, Regression
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


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_metrics", sys.modules[__name__])
    SquaredGap.__module__ = "own_metrics"


def make(target, kind="single_label", classes=3, **settings):
    fields = {name: settings.pop(name) for name in ("direction", "predictions") if name in settings}
    component = MetricComponent(target=target, arguments=settings, **fields)
    return build_own_metric(component, kind=kind, num_labels=classes)


def evaluate(task, logits, targets):
    """Returns the metrics after batches of different sizes."""
    evaluation = Evaluation(task)
    for rows in (torch.arange(0, 5), torch.arange(5, len(targets))):
        evaluation.update(task.score(FixedModel(logits), {"input_ids": rows, "targets": targets[rows]}))
    return {name: value.item() for name, value in evaluation.compute().items()}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 0, 2, 0, 1])
CASES = {
    "classes": (
        "torchmetrics.classification.MulticlassF1Score",
        {"num_classes": 3, "average": "macro"},
        3,
        lambda logits: torchmetrics.functional.classification.multiclass_f1_score(logits, CLASSES, 3, average="macro"),
    ),
    "ranking": (
        "torchmetrics.AUROC",
        {"task": "multiclass", "num_classes": 3},
        3,
        lambda logits: torchmetrics.functional.auroc(logits.softmax(-1), CLASSES, task="multiclass", num_classes=3),
    ),
    "binary": (
        "torchmetrics.classification.BinaryAveragePrecision",
        {},
        2,
        lambda logits: torchmetrics.functional.classification.binary_average_precision(
            logits.softmax(-1)[:, 1], CLASSES.clamp(max=1)
        ),
    ),
    "own": (
        "own_metrics.SquaredGap",
        {"scale": 0.5},
        3,
        lambda logits: 0.5 * (logits.softmax(-1) - one_hot(CLASSES, 3)).square().sum(-1).mean(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_metric_of_classes_is_that_of_all_examples_together(case):
    target, arguments, num_classes, expected = CASES[case]
    logits = draw(12, num_classes)
    own = make(target, "single_label", num_classes, **arguments)
    task = Classification(num_classes=num_classes, own_metric=own)
    found = evaluate(task, logits, CLASSES.clamp(max=num_classes - 1))
    assert found[own.score.name] == pytest.approx(expected(logits).item(), rel=1e-6)  # fp32 sums
    assert {"accuracy", "loss"} < set(found)


def test_a_metric_of_several_labels_gets_probabilities_or_the_labels():
    logits, targets = draw(12, 4), (draw(12, 4, seed=1) > 0).float()
    for predictions, expected in (("auto", logits.sigmoid()), ("labels", (logits > 0).long())):
        own = make(
            "torchmetrics.classification.MultilabelF1Score", "multi_label", 4, num_labels=4, predictions=predictions
        )
        found = evaluate(MultiLabel(num_labels=4, own_metric=own), logits, targets)
        wanted = torchmetrics.functional.classification.multilabel_f1_score(expected, targets.long(), num_labels=4)
        assert found["MultilabelF1Score"] == pytest.approx(wanted.item(), rel=1e-6)


def test_a_metric_of_numbers_gets_numbers():
    own = make("torchmetrics.MeanAbsoluteError", "regression", 0)
    logits, targets = draw(12, 1), draw(12, seed=1)
    found = evaluate(Regression(own_metric=own), logits, targets)
    assert found["MeanAbsoluteError"] == pytest.approx((logits[:, 0] - targets).abs().mean().item(), rel=1e-6)
    assert (own.score.direction, own.score.range) == ("minimize", (0.0, math.inf))


def test_a_metric_of_text_gets_the_scored_tokens_only():
    logits, targets = draw(12, 6, 8), torch.randint(8, (12, 6), generator=torch.Generator().manual_seed(2))
    targets[0, 2:] = IGNORED
    targets[7] = IGNORED
    own = make("torchmetrics.classification.MulticlassAccuracy", "documents", 0, num_classes=8, average="micro")
    found = evaluate(LanguageModelling(bytes_per_token=None, own_metric=own), logits, targets)
    scored = targets != IGNORED
    wanted = (logits.argmax(-1) == targets)[scored].double().mean().item()
    assert found["MulticlassAccuracy"] == pytest.approx(wanted, rel=1e-6)


def test_its_direction_and_its_range_come_from_the_class():
    assert make("torchmetrics.classification.MulticlassCalibrationError", num_classes=3).score.direction == "minimize"
    f1 = make("torchmetrics.F1Score", task="multiclass", num_classes=3).score
    assert (f1.name, f1.direction, f1.range) == ("F1Score", "maximize", (0.0, 1.0))
    # the limits of its plot are 0 and 1
    assert make("torchmetrics.classification.MulticlassCohenKappa", num_classes=3).score.range == (-1.0, 1.0)
    assert make("own_metrics.SquaredGap").score.range == (-math.inf, math.inf)
    assert make("torchmetrics.PearsonCorrCoef", "regression", 0, direction="maximize").score.direction == "maximize"


@pytest.mark.parametrize(
    ("target", "kind", "settings", "named"),
    [
        ("torchmetrics.PearsonCorrCoef", "regression", {}, r"`data.metric.direction` must be minimize or maximize"),
        ("torch.nn.Linear", "single_label", {}, r"`data.metric._target_` must be a subclass of `torchmetrics"),
        ("torchmetrics.MetricCollection", "single_label", {}, r"`data.metric._target_` must be a subclass"),
        ("os.system", "single_label", {}, r"`data.metric._target_` must be the import path of a class"),
        ("torchmetrics.classification.MulticlassF1Score", "single_label", {}, "num_classes"),
        ("torchmetrics.classification.BinaryF1Score", "single_label", {}, "the data has 3 classes"),
        ("torchmetrics.MeanAbsoluteError", "regression", {"predictions": "logits"}, r"`data.metric.predictions` must"),
        ("torchmetrics.MeanAbsoluteError", "documents", {"predictions": "logits"}, "the predicted token"),
    ],
)
def test_a_metric_that_can_not_score_is_refused(target, kind, settings, named):
    with pytest.raises(ConfigError, match=named) as refused:
        make(target, kind, **settings)
    assert str(refused.value).startswith("`data.metric")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_classes": 5}, "must take probabilities of shape"),
        ({"num_classes": 3, "average": "none"}, "must give one number, but MulticlassF1Score gives 3 numbers"),
    ],
)
def test_a_metric_that_does_not_take_the_data_is_refused(settings, named):
    own = make("torchmetrics.classification.MulticlassF1Score", **settings)
    with pytest.raises(ConfigError, match=named):
        own.check(draw(12, 3).softmax(-1), CLASSES)


def test_a_component_is_a_metric_of_every_kind_of_data_and_names_stay():
    for data in ("table", "stdlib_docs", "chat", "own", "glue"):
        given = {"data": data, "data.metric._target_": "torchmetrics.F1Score", "data.metric.task": "binary"}
        needed = {"table": {"data.train": "a.csv"}, "chat": {"data.train": "a.jsonl"}}
        own = {"own": {"data.factory": "a:b", "data.labels": ["x", "y"]}}
        config = compose_run(given | needed.get(data, {}) | own.get(data, {}), require_all=False)
        assert config.data.metric == MetricComponent(target="torchmetrics.F1Score", arguments={"task": "binary"})
    assert compose_run({"data.metric": "loss"}).data.metric == "loss"
    mapping = {"_target_": "torchmetrics.F1Score", "task": "binary", "direction": "minimize"}
    assert compose_run({"data.metric": mapping}).data.metric.direction == "minimize"
    with pytest.raises(ConfigError, match="direction"):
        compose_run({"data.metric": mapping | {"direction": "up"}})

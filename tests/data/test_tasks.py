"""Scores from examples: the metrics of all of them together, however they came in batches."""

import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy

from lorasweep.data.split import IGNORED, repeat_batch
from lorasweep.data.tasks import (
    LANGUAGE_MODEL_METRICS,
    Classification,
    Evaluation,
    ExampleScores,
    LanguageModelling,
    Regression,
)


class FixedModel(nn.Module):
    """A model whose logits are rows of a given table, chosen by its inputs."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids):
        return self.logits[input_ids]


@pytest.fixture
def table():
    return FixedModel(torch.randn(11, 11, generator=torch.Generator().manual_seed(0)))


def text_batch():
    tokens = torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    targets[0, 3:] = IGNORED
    targets[4, :] = IGNORED
    return {"input_ids": tokens, "targets": targets}


def select(batch, part):
    return {name: value[part] for name, value in batch.items()}


def test_text_metrics_are_those_of_all_tokens_together(table):
    batch, task = text_batch(), LanguageModelling(bytes_per_token=4.5)
    evaluation = Evaluation(task)
    for part in (slice(0, 3), slice(3, 5)):  # batches of different size must not be averaged
        evaluation.update(task.score(table, select(batch, part)))
    values = {name: value.item() for name, value in evaluation.compute().items()}
    logits = table(batch["input_ids"]).double().flatten(0, 1)
    loss = cross_entropy(logits, batch["targets"].flatten(), ignore_index=IGNORED).item()
    # fp32 losses of 11 classes: 1e-6
    assert values == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / 4.5}, rel=1e-6
    )
    assert tuple(values) == task.metrics == LANGUAGE_MODEL_METRICS


def test_training_loss_of_a_text_counts_only_what_is_scored(table):
    batch = text_batch()
    losses = LanguageModelling(bytes_per_token=1.0).losses(table, batch)
    assert losses.shape == (5,)
    assert losses[4] == 0
    expected = cross_entropy(table(batch["input_ids"][0, :3]), batch["targets"][0, :3], reduction="sum")
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-6)  # fp32 sums of three


def test_a_batch_repeated_for_slots_scores_the_same_in_each(table):
    batch, task = text_batch(), LanguageModelling(bytes_per_token=1.0)
    scores = task.score(table, repeat_batch(batch, slots=3))
    alone = task.score(table, batch)
    for slot in range(3):
        torch.testing.assert_close(scores.select_slot(slot, slots=3).loss, alone.loss)
        assert torch.equal(scores.select_slot(slot, slots=3).items, alone.items)


def test_sum_of_many_examples_keeps_its_digits_and_nan_is_not_hidden():
    scores = ExampleScores(loss=torch.tensor([2.0**24, 1.0] * 3), items=torch.ones(6))  # fp32 sums would drop the ones
    assert LanguageModelling(bytes_per_token=1.0).compute(scores)["loss"].item() == 3 * (2**24 + 1) / 6
    scores = ExampleScores(loss=torch.tensor([1.0, math.nan]), items=torch.ones(2))
    assert all(value.isnan() for value in LanguageModelling(bytes_per_token=1.0).compute(scores).values())


def class_batch(classes):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(11, (40,), generator=generator)
    return {"input_ids": ids, "targets": torch.randint(classes, (40,), generator=generator)}


@pytest.mark.parametrize("classes", [2, 3])
def test_class_metrics_are_what_they_say(classes):
    model = FixedModel(torch.randn(11, classes, generator=torch.Generator().manual_seed(0)))
    batch, task = class_batch(classes), Classification(num_classes=classes)
    values = task.compute(task.score(model, batch))
    predicted, target = model(batch["input_ids"]).argmax(-1), batch["targets"]
    of_class = []
    for label in range(classes):
        hits = ((predicted == label) & (target == label)).sum().item()
        of_class.append(2 * hits / ((predicted == label).sum() + (target == label).sum()).item())
    assert values["accuracy"].item() == pytest.approx((predicted == target).double().mean().item(), rel=1e-6)
    assert values["f1"].item() == pytest.approx(of_class[1] if classes == 2 else sum(of_class) / classes, rel=1e-6)
    assert values["loss"].item() == pytest.approx(cross_entropy(model(batch["input_ids"]), target).item(), rel=1e-6)
    if classes == 2:  # then it is Pearson's correlation of the two columns (torchmetrics computes in fp32)
        expected = stats.pearsonr(predicted.numpy(), target.numpy()).statistic
        assert values["matthews"].item() == pytest.approx(expected, rel=1e-5)
    assert tuple(values) == task.metrics


def test_class_weights_are_those_of_torch():
    model = FixedModel(torch.randn(11, 3, generator=torch.Generator().manual_seed(0)))
    batch, weight = class_batch(3), torch.tensor([0.5, 2.0, 1.0])
    weights = weight[batch["targets"]]
    losses = Classification(num_classes=3).losses(model, {**batch, "weights": weights})
    expected = cross_entropy(model(batch["input_ids"]), batch["targets"], weight=weight)
    torch.testing.assert_close(losses.sum() / weights.sum(), expected)


def test_regression_is_scored_by_error_and_correlation():
    predicted, target = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([1.0, 3.0, 9.0, 4.0])
    task, batch = Regression(), {"input_ids": torch.arange(4), "targets": target}
    values = task.compute(task.score(FixedModel(predicted[:, None]), batch))
    assert values["mse"].item() == pytest.approx(((predicted - target) ** 2).mean().item())
    assert values["spearman"].item() == pytest.approx(1.0)
    assert values["pearson"].item() == pytest.approx(stats.pearsonr(predicted, target).statistic, rel=1e-6)
    # a constant guess correlates with nothing
    batch = {"input_ids": torch.arange(3), "targets": torch.tensor([1.0, 2.0, 3.0])}
    values = Regression().compute(Regression().score(FixedModel(torch.ones(3, 1)), batch))
    assert values["pearson"] == values["spearman"] == 0


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        (LanguageModelling(bytes_per_token=2.0), "loss"),
        (LanguageModelling(bytes_per_token=2.0), "bits_per_byte"),
        (Classification(num_classes=11), "accuracy"),
        (Classification(num_classes=11), "loss"),
    ],
)
def test_weighted_mean_over_examples_is_the_metric(table, task, metric):
    batch = text_batch() if isinstance(task, LanguageModelling) else class_batch(11)
    scores = task.score(table, batch)
    values, weights = task.per_example(metric, scores)
    assert ((values * weights).sum() / weights.sum()).item() == pytest.approx(task.compute(scores)[metric].item())

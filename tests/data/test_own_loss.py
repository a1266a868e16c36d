"""A training loss by `_target_`: a loss of each item, in a pack as alone, or refused before anything trains."""

from __future__ import annotations

import sys

import pytest
import torch
from tests.data.fixed_model import FixedModel
from torch import nn
from torch.nn.functional import cross_entropy, huber_loss, multi_margin_loss

from lorasweep.config.components import Component
from lorasweep.config.compose import compose_run
from lorasweep.data.build_splits import check_own_parts
from lorasweep.data.own_loss import build_own_loss
from lorasweep.data.split import IGNORED
from lorasweep.data.tasks import Classification, LanguageModelling, Regression
from lorasweep.errors import ConfigError
from lorasweep.training.inputs import build_inputs
from lorasweep.training.packs.pack import compute_slot_losses


class Focal(nn.Module):
    """The user's own: the focal loss (arXiv 1708.02002), which counts easy items less."""

    def __init__(self, gamma=2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits, targets):
        losses = cross_entropy(logits, targets, reduction="none")
        return (1 - (-losses).exp()) ** self.gamma * losses


class Mean(nn.Module):
    def forward(self, logits, targets):
        return cross_entropy(logits, targets)


class Trained(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)


class Flat(nn.Module):
    def forward(self, logits, targets):
        return (logits.argmax(-1) != targets).float()


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_losses", sys.modules[__name__])
    for kind in (Focal, Mean, Trained, Flat):
        monkeypatch.setattr(kind, "__module__", "own_losses")


def make(target, **arguments):
    return build_own_loss(Component(target=target, arguments=arguments))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CLASSES = torch.tensor([0, 1, 2, 0, 2])


def test_losses_of_labels_and_numbers_are_those_of_torch():
    rows, logits = torch.arange(5), draw(5, 3)
    batch = {"input_ids": rows, "targets": CLASSES}
    margin = Classification(num_classes=3, own_loss=make("torch.nn.MultiMarginLoss", margin=0.5))
    expected = multi_margin_loss(logits, CLASSES, margin=0.5, reduction="none")
    torch.testing.assert_close(margin.losses(FixedModel(logits), batch), expected)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0])  # class weights still count
    weighted = margin.losses(FixedModel(logits), batch | {"weights": weights})
    torch.testing.assert_close(weighted, expected * weights)
    # evaluations keep the cross-entropy
    torch.testing.assert_close(
        margin.score(FixedModel(logits), batch).loss, cross_entropy(logits, CLASSES, reduction="none")
    )
    numbers, targets = draw(5, 1), draw(5, seed=1)
    huber = Regression(own_loss=make("torch.nn.HuberLoss", delta=0.1))
    found = huber.losses(FixedModel(numbers), {"input_ids": rows, "targets": targets})
    torch.testing.assert_close(found, huber_loss(numbers[:, 0], targets, delta=0.1, reduction="none"))


def test_a_loss_of_text_counts_scored_tokens_and_tells_slots_apart():
    logits, targets = draw(4, 6, 8), torch.randint(8, (4, 6), generator=torch.Generator().manual_seed(2))
    targets[0, 2:] = IGNORED
    task = LanguageModelling(bytes_per_token=None, own_loss=make("own_losses.Focal", gamma=1.0))
    batch = {"input_ids": torch.arange(4), "targets": targets}
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    expected = ((1 - (-losses).exp()) * losses).view(4, 6).sum(1)
    torch.testing.assert_close(task.losses(FixedModel(logits), batch), expected)
    by_slot = compute_slot_losses(task, FixedModel(logits), batch, slots=2)
    torch.testing.assert_close(by_slot, expected.view(2, 2).sum(1))


@pytest.mark.parametrize(
    ("target", "arguments", "named"),
    [
        ("torch.optim.SGD", {}, r"`data.loss._target_` must be a subclass of `torch.nn.modules.module.Module`"),
        ("torch.nn.HuberLoss", {"reduction": "sum"}, "`data.loss.reduction` must be left out"),
        ("own_losses.Trained", {}, "`data.loss` must have no trained parameters"),
        ("own_losses.Mean", {}, "`data.loss` must give a loss for each of the 5 items"),
        ("own_losses.Flat", {}, "`data.loss` must be differentiable"),
        ("torch.nn.CosineEmbeddingLoss", {}, "`data.loss` must take logits of shape"),
    ],
)
def test_a_loss_that_can_not_train_is_refused(target, arguments, named):
    with pytest.raises(ConfigError, match=named):
        check_own_parts(Classification(num_classes=3, own_loss=make(target, **arguments)), CLASSES, num_outputs=3)


def test_a_loss_comes_from_the_settings():
    text = {"data.block_length": 32, "data.max_validation_blocks": 2, "trainer.device": "cpu"}
    smooth = {"data.loss._target_": "torch.nn.CrossEntropyLoss", "data.loss.label_smoothing": 0.1}
    inputs = build_inputs(compose_run(text | smooth))
    batch = inputs.splits.validation.batch([0, 1])
    with torch.no_grad():
        trained, scored = (
            run(inputs.base.model, batch) for run in (inputs.splits.task.losses, inputs.splits.task.score)
        )
    assert (trained > scored.loss).all()
    assert compose_run(text).data.loss is None
    table = {"data": "table", "data.train": "a.csv", "data.label_smoothing": 0.1}
    with pytest.raises(ConfigError, match=r"`data.label_smoothing` must be 0 with `data.loss`"):
        compose_run(table | smooth | {"data.task": "single_label"})

"""The scores of an answer that needs no training: the most frequent label of the training split, or its mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorasweep.data.build_splits import DataSplits
from lorasweep.data.examples import LabelledSplit
from lorasweep.data.split import Split
from lorasweep.data.tasks import Classification, Regression


class ConstantModel(nn.Module):
    """A model whose logits are the same for every example."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Any) -> Tensor:
        return self.logits


def describe_scored_split(splits: DataSplits, split: Split) -> dict[str, Any]:
    """Returns the entry in a run record of a split that scores the run: with `constant_answer` if it has labels."""
    scores = score_constant_answer(splits, split)
    return split.describe() | ({"constant_answer": scores} if scores else {})


def score_constant_answer(splits: DataSplits, split: Split) -> dict[str, float]:
    """Returns every metric of a split if each example gets the same answer; empty for text and a user's data module.

    The answer is the most frequent class of the training split (of equally frequent ones the first), all labels that
    more than half of its examples have, or the mean of its numbers. The loss is that of the shares of the labels.
    """
    train = splits.train
    if not isinstance(train, LabelledSplit) or not isinstance(split, LabelledSplit):
        return {}
    logits = _fit_logits(train.labels.double(), splits)
    scores = splits.task.score(ConstantModel(logits.expand(len(split), -1)), {"targets": split.labels})
    return {name: float(value) for name, value in splits.task.compute(scores).items()}


def _fit_logits(labels: Tensor, splits: DataSplits) -> Tensor:
    """Returns the logits of the answer: (classes,), or (1,) for numbers."""
    if isinstance(splits.task, Regression):
        return labels.mean(0, keepdim=True)
    # One more example of each label, so that a label without examples has a finite loss.
    if isinstance(splits.task, Classification):
        return (labels.long().bincount(minlength=splits.task.num_classes) + 1.0).log()
    return ((labels.sum(0) + 1) / (len(labels) + 2)).logit()

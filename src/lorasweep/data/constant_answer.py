"""The scores of an answer that needs no training: the most frequent label of the training split, or its mean."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorasweep.data.examples import LabelledSplit
from lorasweep.data.split import Split
from lorasweep.data.tasks import Classification, MultiLabel, Regression, Task
from lorasweep.wording import join_words


def score_constant_answer(task: Task, *, train: Split, split: Split) -> dict[str, float]:
    """Returns every metric of a split if each example gets the same answer; empty for text and a user's data module.

    The answer is the most frequent class of the training split (of equally frequent ones the first), all labels that
    more than half of its examples have, or the mean of its numbers. The loss is that of the shares of the labels.
    """
    if not isinstance(train, LabelledSplit) or not isinstance(split, LabelledSplit):
        return {}
    logits = _fit_logits(train.labels.double(), task)
    scores = task.score_logits(logits.expand(len(split), -1).float(), {"targets": split.labels})
    return {name: float(value) for name, value in task.compute(scores).items()}


def describe_constant_answer(task: Task, *, train: Split, split: Split, label_names: Sequence[str]) -> list[str]:
    """Returns a sentence with the answer and its metrics on a split; no sentence for text and a user's data module."""
    scores = score_constant_answer(task, train=train, split=split)
    if not scores:
        return []
    assert isinstance(train, LabelledSplit)
    logits = _fit_logits(train.labels.double(), task)
    if isinstance(task, Regression):
        answer = f"{float(logits):.4g}, the mean of {train.name}"
    elif isinstance(task, MultiLabel):
        names = [repr(name) for name, logit in zip(label_names, logits.tolist(), strict=True) if logit > 0]
        answer = f"{join_words(names) if names else 'no label'}, as most examples of {train.name}"
    else:
        answer = f"{label_names[int(logits.argmax())]!r}, the most frequent label of {train.name}"
    values = [f"{name} {value:.4f}" for name, value in scores.items() if name != "loss"]
    return [f"Always answering {answer}, has {join_words(values)} on {split.name}."]


def _fit_logits(labels: Tensor, task: Task) -> Tensor:
    """Returns the logits of the answer: (classes,), or (1,) for numbers."""
    if isinstance(task, Regression):
        return labels.mean(0, keepdim=True)
    # One more example of each label, so that a label without examples has a finite loss.
    if isinstance(task, Classification):
        return (labels.long().bincount(minlength=task.num_classes) + 1.0).log()
    return ((labels.sum(0) + 1) / (len(labels) + 2)).logit()

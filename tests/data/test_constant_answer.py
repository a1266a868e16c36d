"""The scores of the most frequent label or of the mean of train, computed by the task that scores a run."""

import math

import pytest
import torch
from tests.data.ragged import make_ragged

from lorasweep.data.build_splits import DataSplits
from lorasweep.data.split import LabelledSplit
from lorasweep.data.tasks import Classification, Regression


def make_split(name, labels):
    tokens = make_ragged([[1]] * len(labels))
    return LabelledSplit(name=name, fingerprint="0", tokens=tokens, pad_token=0, bytes=len(labels), labels=labels)


def make_splits(task, train, validation, dtype):
    named = {"train": train, "validation": validation}
    found = [make_split(name, torch.tensor(labels, dtype=dtype)) for name, labels in named.items()]
    return DataSplits(
        train=found[0], validation=found[1], task=task, metric=task.metrics[0], test=lambda: found[1], notes=()
    )


def score(task, train, validation, dtype=torch.int64):
    splits = make_splits(task, train, validation, dtype)
    return splits.score_constant_answer(splits.validation)


@pytest.mark.parametrize("train", [[0, 2, 2, 1, 2, 0], [1, 0, 1, 0], [2, 2, 2]])
def test_most_frequent_class_of_train_is_the_answer(train):
    validation = [2, 0, 0, 1, 2, 2, 1]
    found = score(Classification(num_classes=3), train, validation)
    most_frequent = max(range(3), key=train.count)  # of equally frequent ones the first
    assert found["accuracy"] == pytest.approx(validation.count(most_frequent) / 7)
    assert found["matthews"] == 0
    shares = [(train.count(label) + 1) / (len(train) + 3) for label in range(3)]
    # fp32 logits: 1e-6
    assert found["loss"] == pytest.approx(-sum(math.log(shares[label]) for label in validation) / 7, rel=1e-6)


@pytest.mark.parametrize("count", [3, 7, 1000])
def test_mean_has_the_squared_error_around_it_and_no_correlation(count):
    train, validation = [0.1 * n for n in range(count)], [0.3, 0.7, 2.0]
    mean = sum(train) / count
    found = score(Regression(), train, validation, torch.float32)
    assert found["mse"] == pytest.approx(sum((x - mean) ** 2 for x in validation) / 3, rel=1e-5)  # fp32
    assert (found["pearson"], found["spearman"]) == (0, 0)

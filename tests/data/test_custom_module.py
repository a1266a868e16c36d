"""A LightningDataModule of the user's own gives splits like any other's, and every mistake in it is one sentence."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning import LightningDataModule
from tests.data.conftest import make_data
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, random_split

from lorasweep.data.build_splits import build_splits
from lorasweep.data.reading import read_source
from lorasweep.data.split import IGNORED
from lorasweep.data.tasks import Classification, LanguageModelling, Regression
from lorasweep.errors import ConfigError

ROWS = [{"input_ids": torch.arange(n % 5 + 2), "labels": torch.tensor(n % 5 % 2)} for n in range(20)]


def collate(items):
    tokens = [item["input_ids"] for item in items]
    masks = [torch.ones_like(row) for row in tokens]
    batch = {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
    }
    if "labels" in items[0]:
        batch["labels"] = torch.stack([item["labels"] for item in items])
    return batch


class Own(LightningDataModule):
    """Splits its rows at random, as many do."""

    def __init__(self, rows=ROWS, **changes):
        super().__init__()
        self.rows, self.collate = rows, collate
        for name, value in changes.items():
            setattr(self, name, value)

    def setup(self, stage):
        assert stage in ("fit", "test")
        self.splits = random_split(self.rows, [0.6, 0.2, 0.2])
        self.stages = [*getattr(self, "stages", []), stage]

    def _load(self, split):
        return DataLoader(split, batch_size=3, shuffle=True, collate_fn=self.collate)

    def train_dataloader(self):
        return self._load(self.splits[0])

    def val_dataloader(self):
        return self._load(self.splits[1])

    def test_dataloader(self):
        return self._load(self.splits[2])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


MADE = {
    "build": Own,
    "text": lambda: Own([{"input_ids": row["input_ids"]} for row in ROWS]),
    "numbers": lambda: Own([row | {"labels": torch.tensor(n / 2)} for n, row in enumerate(ROWS)]),
    "images": lambda: Own([{"pixels": torch.ones(3, 2, 2), "labels": 1} for _ in ROWS], collate=None),
    "no_module": lambda: 7,
    "no_loader": lambda: Own(train_dataloader=lambda: [1, 2]),
    "stream": lambda: Own(train_dataloader=lambda: DataLoader(Stream())),
    "no_labels": lambda: Own([{"input_ids": row["input_ids"]} for row in ROWS]),
    "no_mapping": lambda: Own(collate=lambda items: torch.ones(len(items))),
    "not_a_number": lambda: Own([row | {"labels": torch.tensor(float("nan"))} for row in ROWS]),
    "empty": lambda: Own(train_dataloader=lambda: DataLoader([])),
}


@pytest.fixture(autouse=True)
def own_data(monkeypatch):
    """The functions above as a module that can be named."""
    module = type(sys)("own_data")
    for name, function in MADE.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "own_data", module)


def make_config(name="build", **settings):
    return make_data("own", **({"factory": f"own_data:{name}", "labels": ["no", "yes"]} | settings))


def load(name="build", *, model_kind="classifier", **settings):
    config = make_config(name, **settings)
    return build_splits(config, source=read_source(config), tokenizer=None, model_kind=model_kind)


def test_splits_are_those_of_the_module():
    splits = load()
    assert [len(split) for split in (splits.train, splits.validation, splits.test())] == [12, 4, 4]
    assert splits.metric == "accuracy"
    assert isinstance(splits.task, Classification)
    assert splits.task.num_classes == 2


def test_batches_come_from_its_collate_function_with_labels_as_targets():
    split = load().train
    batch = split.batch([0, 3, 5])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, max(split.lengths[[0, 3, 5]]))
    assert batch["attention_mask"].sum(1).tolist() == split.lengths[[0, 3, 5]].tolist()
    assert "labels" not in batch
    assert batch["targets"].tolist() == [length % 2 for length in split.lengths[[0, 3, 5]].tolist()]


def test_what_it_draws_is_the_same_each_time_and_moves_no_stream():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = load()
    assert first.train.fingerprint == again.train.fingerprint != first.validation.fingerprint


def test_test_split_is_set_up_only_when_it_is_asked_for(monkeypatch):
    made = Own()
    monkeypatch.setattr(sys.modules["own_data"], "build", lambda: made)
    splits = load()
    assert made.stages == ["fit"]
    assert splits.test() is splits.test()
    assert made.stages == ["fit", "test"]


def test_text_is_scored_at_the_token_before():
    splits = load("text", model_kind="causal_lm", task="text", labels=[])
    assert isinstance(splits.task, LanguageModelling)
    assert splits.metric == "loss"
    assert splits.train.weights.tolist() == [length - 1 for length in splits.train.lengths.tolist()]
    short, long = (int(splits.train.lengths.argmin()), int(splits.train.lengths.argmax()))
    batch = splits.train.batch([short, long])
    assert batch["targets"].tolist() == [[1, *[IGNORED] * 5], [1, 2, 3, 4, 5, IGNORED]]


def test_labels_of_other_kinds_are_numbers():
    numbers = load("numbers", task="regression", labels=[])
    assert isinstance(numbers.task, Regression)
    assert numbers.train.batch([0, 1])["targets"].dtype == torch.float32


def test_rows_need_not_be_text():
    splits = load("images")
    assert splits.train.lengths.tolist() == [1] * 12
    assert splits.train.batch([0, 1])["pixels"].shape == (2, 3, 2, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_module", "LightningDataModule, .*'own_data:no_module'.* int"),
        ("no_loader", "`train_dataloader` .* got list"),
        ("stream", "`__len__` and `__getitem__`, but got Stream"),
        ("no_labels", "`labels`, but got input_ids, attention_mask"),
        ("no_mapping", "mappings of tensors, but got Tensor"),
        ("empty", "the train split of `data.factory` must have an example"),
        ("missing", "no attribute .missing"),
    ],
)
def test_wrong_module_is_one_sentence(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(name)
    assert "`data.factory`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_labels_name_the_row():
    with pytest.raises(ConfigError, match=r"`data.labels` .* example . of the train split .* 1"):
        load(labels=("only",))
    with pytest.raises(ConfigError, match=r"finite numbers.* example 0 of the train split"):
        load("not_a_number", task="regression", labels=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factory": "build"}, "`data.factory` must have the form `package.module:function`, but got 'build'"),
        ({"labels": []}, "`data.labels` must name the labels with `data.task=single_label`"),
        ({"task": "regression"}, "`data.labels` must be empty with `data.task=regression`"),
    ],
)
def test_wrong_setting_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)

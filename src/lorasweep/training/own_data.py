"""The data of a user's own LightningModule: the loaders of a LightningDataModule as they are, but repeatable."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves  # see lora.fully_trained
from torch.utils.data import DataLoader

from lorasweep.config.components import Component, instantiate
from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import LoggedMetric, RunConfig
from lorasweep.data.build_splits import DataSplits
from lorasweep.data.split import Batch, Split
from lorasweep.data.tasks import Task
from lorasweep.errors import ConfigError

LOADER_METHODS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}


@contextmanager
def random_streams(*seeds: int) -> Iterator[None]:
    """Starts the random streams of torch, NumPy and Python, from which a user's code may draw, inside the block."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    with isolate_rng(include_cuda=False):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


@dataclass(frozen=True, kw_only=True)
class SeededLoader:
    """A user's loader whose batches depend only on the seed and their number, not on what the model draws."""

    loader: DataLoader[Any]
    seed: int
    count_read: Callable[[], int]
    """Returns how many batches were read before an epoch begins. A resumed run skips those of its current epoch."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, num_skipped = divmod(self.count_read(), len(self))
        with random_streams(self.seed, epoch):
            batches = iter(self.loader)
        for number in range(len(self)):
            with random_streams(self.seed, epoch, number):
                batch = next(batches)
            if number >= num_skipped:
                yield batch


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnSplit(Split):
    """The size of a split of the user's data module, whose loaders make the batches. Each example counts as a token."""

    num_examples: int

    @functools.cached_property
    def lengths(self) -> Tensor:
        return torch.ones(self.num_examples, dtype=torch.int64)

    @property
    def weights(self) -> Tensor:
        return self.lengths.float()

    def batch(self, indices: Sequence[int]) -> Batch:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {"examples": self.num_examples, "fingerprint": self.fingerprint}


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnSplits(DataSplits):
    """The user's data module, and the metric that the user's module logs."""

    task: Task = None  # type: ignore[assignment]  # the module has its own loss and metrics
    data_module: LightningDataModule
    score: ScoreMetric

    @property
    def score_metric(self) -> ScoreMetric:
        return self.score

    def seed_loaders(self, seed: int) -> LightningDataModule:
        """Returns the data module. The seed decides the order of its training data, also after a run was resumed."""
        data, own = self.data_module, type(self.data_module)

        def load(name: str) -> SeededLoader:
            is_train, loader = name == "train", getattr(own, LOADER_METHODS[name])(data)
            count = (lambda: data.trainer.global_step) if is_train else (lambda: 0)  # type: ignore[union-attr]
            return SeededLoader(loader=loader, seed=seed if is_train else 0, count_read=count)

        for name, method in LOADER_METHODS.items():
            setattr(data, method, functools.partial(load, name))
        return data


def read_own_data(config: RunConfig) -> OwnSplits:
    """Creates the data module of `datamodule._target_` and sets it up, once and with the same seed for all runs.

    Errors of the data module's own code are raised as they are, with its traceback.

    Raises:
        ConfigError: It is no LightningDataModule, or has a loader that runs can't be compared on.
    """
    assert config.datamodule is not None
    return _read_data(config.datamodule, config.metric, batch_size=config.trainer.batch_size)


@functools.lru_cache(maxsize=1)  # modules with other arguments have the same data
def _read_data(component: Component, metric: LoggedMetric, *, batch_size: int) -> OwnSplits:
    with random_streams(0):
        data = instantiate(component, key="datamodule", expected=LightningDataModule)
        data.prepare_data()
        data.setup("fit")
    setup = data.setup
    data.prepare_data = data.setup = lambda *_, **__: None  # type: ignore  # the Trainer would draw other splits

    @functools.cache
    def read_test() -> OwnSplit:
        with random_streams(0):
            setup("test")
        return _read_split(data, "test")

    train, validation = (_read_split(data, name) for name in ("train", "validation"))
    found: Any = data.train_dataloader().batch_size
    if found not in (None, batch_size):
        raise ConfigError(
            f"`trainer.batch_size` must be {found}, as in the training loader of `datamodule`, but got {batch_size}."
        )
    assert metric.name is not None
    assert metric.direction is not None
    score = ScoreMetric(name=metric.name, direction=metric.direction)
    return OwnSplits(
        train=train, validation=validation, test=read_test, metric=score.name, data_module=data, score=score
    )


def _read_split(data: LightningDataModule, name: str) -> OwnSplit:
    """Returns the size of a split and the fingerprint of its first batch."""
    loader: Any = getattr(type(data), LOADER_METHODS[name])(data)
    try:
        num_examples, num_batches = len(loader.dataset), len(loader)
    except (TypeError, AttributeError):
        num_examples = num_batches = 0
    if not num_batches:
        raise ConfigError(
            f"`{LOADER_METHODS[name]}` of `datamodule` must return one DataLoader with a known number of batches, "
            f"but got {type(loader).__name__}."
        )
    digest = hashlib.sha256(str(num_examples).encode())
    for leaf in tree_leaves(next(iter(SeededLoader(loader=loader, seed=0, count_read=lambda: 0)))):
        is_tensor = isinstance(leaf, Tensor)
        digest.update(leaf.cpu().flatten().view(torch.uint8).numpy().tobytes() if is_tensor else repr(leaf).encode())
    return OwnSplit(name=name, fingerprint=digest.hexdigest()[:16], num_examples=num_examples)

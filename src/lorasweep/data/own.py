"""Reads the data sets of a user's LightningDataModule (`data.factory`). Each example is read once to know its length.

`read_source` calls `read_own`, and `splits` makes `OwnSplit`s of the result.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, IterableDataset

from lorasweep.config.data import CustomDataConfig, CustomTask
from lorasweep.config.user_function import call_user_function
from lorasweep.data.source import DataSource, OwnExamples
from lorasweep.data.split import IGNORED, Batch, Split
from lorasweep.errors import ConfigError, describe_error

FACTORY_KEY = "data.factory"
LOADERS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnSplit(Split):
    """Examples as the user's own data set and collate function return them."""

    examples: OwnExamples
    task: CustomTask
    bytes_per_token: None = None
    """Unknown: the examples may not even be text."""

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each example; 1 for examples without `input_ids`."""
        return self.examples.lengths

    @property
    def weights(self) -> Tensor:
        """Number of scored tokens of each text; 1 for an example of another task."""
        return self.examples.weights

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns these examples as the collate function joins them, with their labels as targets."""
        return make_batch(self.examples.collate([self.examples.dataset[index] for index in indices]), task=self.task)

    def describe(self) -> dict[str, Any]:
        """Returns the split's entry in a run record."""
        return {"examples": len(self), "fingerprint": self.fingerprint}


def read_own(config: CustomDataConfig) -> DataSource:
    """Returns the examples of the LightningDataModule that `data.factory` makes.

    Only the data set and the collate function of its loaders are used: order and batches are made as for every other
    data set. The module draws the same random numbers from torch at each call.

    Raises:
        ConfigError: The function or a method of the module fails, or a loader or example can't be used.
    """
    with _fixed_seed():
        module = call_user_function(config.factory, key=FACTORY_KEY, offered={})
        if not isinstance(module, LightningDataModule):
            raise ConfigError(
                f"`{FACTORY_KEY}` must return a LightningDataModule, but {config.factory!r} returns "
                f"{type(module).__name__}."
            )
        _call(config, "prepare_data", module.prepare_data)
        _call(config, "setup", functools.partial(module.setup, "fit"))
        train, validation = (_read_split(config, module, name) for name in ("train", "validation"))

    # The test split is read at its first use, and not here, so that training reads no test data.
    def read_test() -> OwnExamples:
        with _fixed_seed():
            _call(config, "setup", functools.partial(module.setup, "test"))
            return _read_split(config, module, "test")

    return DataSource(
        kind="documents" if config.task == "text" else config.task,
        label_names=config.labels,
        train=train,
        validation=validation,
        test=functools.cache(read_test),
        notes=(),
    )


def make_batch(collated: Any, *, task: CustomTask) -> Batch:
    """Returns a collated batch with `targets` in place of `labels`.

    For task `text`, `labels[i]` is token i, as in transformers; without `labels`, every token of `input_ids` is one.
    `targets[i]` is token i + 1, because the model predicts it at position i.

    Raises:
        ConfigError: The batch is no mapping of tensors, or has no labels.
    """
    if not hasattr(collated, "items") or not all(isinstance(value, Tensor) for value in collated.values()):
        raise ConfigError(
            f"`{FACTORY_KEY}` must give batches that are mappings of tensors, but got {type(collated).__name__}. "
            "Set a collate function in its loaders."
        )
    batch: Batch = dict(collated.items())
    labels = batch.pop("labels", None)
    if task == "text":
        labels = _tokens_of(batch) if labels is None else labels
        return {**batch, "targets": pad(labels[:, 1:], (0, 1), value=IGNORED)}
    if labels is None:
        raise ConfigError(f"`{FACTORY_KEY}` must give rows with `labels`, but got {', '.join(batch)}.")
    if task == "single_label":
        return {**batch, "targets": labels.long().flatten()}
    return {**batch, "targets": labels.float().flatten() if task == "regression" else labels.float()}


def _read_split(config: CustomDataConfig, module: LightningDataModule, name: str) -> OwnExamples:
    """Reads every example of a split once.

    Raises:
        ConfigError: There is no data set of known length, it is empty, or an example or label can't be used.
    """
    loader = _call(config, LOADERS[name], getattr(module, LOADERS[name]))
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ConfigError(
            f"`{FACTORY_KEY}` must have a `{LOADERS[name]}` that gives one DataLoader of a data set "
            f"with `__len__` and `__getitem__`, but {config.factory!r} gives "
            f"{type(getattr(loader, 'dataset', loader)).__name__}."
        )
    dataset, collate = cast(Any, loader.dataset), loader.collate_fn
    digest, lengths, weights = hashlib.sha256(), [], []
    for index in range(len(dataset)):
        row = _call(config, f"row {index} of the {name} split", functools.partial(operator.getitem, dataset, index))
        batch = make_batch(_call(config, "the collate function", functools.partial(collate, [row])), task=config.task)
        _check_targets(batch["targets"], config, place=f"row {index} of the {name} split")
        # The fingerprint covers the tensors that the model sees, after the collate function.
        for key in sorted(batch):
            digest.update(key.encode() + batch[key].contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        lengths.append(batch["input_ids"].shape[1] if "input_ids" in batch else 1)
        weights.append(float((batch["targets"] != IGNORED).sum()) if config.task == "text" else 1.0)
    if not lengths:
        raise ConfigError(
            f"the {name} split of `{FACTORY_KEY}` must not be empty, but {config.factory!r} gives no example."
        )
    return OwnExamples(
        name=name,
        dataset=dataset,
        collate=collate,
        lengths=torch.tensor(lengths),
        weights=torch.tensor(weights),
        fingerprint=digest.hexdigest()[:16],
    )


def _check_targets(targets: Tensor, config: CustomDataConfig, *, place: str) -> None:
    names = len(config.labels)
    if config.task == "single_label" and not 0 <= int(targets.min()) <= int(targets.max()) < names:
        raise ConfigError(
            f"`data.labels` must name every label, but {place} has label {int(targets.max())} and there are "
            f"{names} names. The first label is 0."
        )
    if config.task == "multi_label" and targets.shape[-1] != names:
        raise ConfigError(
            f"`labels` of a row must be {names} numbers, 0 or 1 for each of `data.labels`, but {place} has "
            f"{targets.shape[-1]}."
        )
    if targets.is_floating_point() and not targets.isfinite().all():
        raise ConfigError(f"`labels` of a row must be finite numbers, but those of {place} are not.")


def _tokens_of(batch: Batch) -> Tensor:
    if "input_ids" not in batch:
        raise ConfigError(f"`{FACTORY_KEY}` must give rows of text with `input_ids`, but got {', '.join(batch)}.")
    tokens = batch["input_ids"]
    return tokens.masked_fill(batch["attention_mask"] == 0, IGNORED) if "attention_mask" in batch else tokens


def _call(config: CustomDataConfig, step: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"`{FACTORY_KEY}` must name a LightningDataModule that works, but {step} of {config.factory!r} fails: "
            f"{describe_error(error)}."
        ) from error


@contextmanager
def _fixed_seed() -> Iterator[None]:
    """Seeds torch with 0 for a `with` block, and restores the state of torch's generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield

"""Reads the data sets of a user's LightningDataModule (`data.factory`)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, IterableDataset

from lorasweep.config.components import call_user_function
from lorasweep.config.data import CustomDataConfig, CustomTask
from lorasweep.data.source import DataSource
from lorasweep.data.split import IGNORED, Batch, Split
from lorasweep.errors import ConfigError

LOADER_METHODS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}


@dataclass(frozen=True, kw_only=True, eq=False)
class CustomSplit(Split):
    """Examples from the user's data set and collate function."""

    dataset: Any
    """The user's data set, with `__len__` and `__getitem__`. An index must always return the same item."""
    collate: Callable[[list[Any]], Any]
    """The user's collate function: joins items into a mapping of tensors."""
    task: CustomTask
    num_tokens: Tensor
    """Number of tokens of each example, (examples,), int64; 1 for examples without `input_ids`."""
    num_scored: Tensor
    """Number of scored tokens of each example, (examples,), float; 1 unless the task is `text`."""
    bytes_per_token: None = None
    """Unknown, because a data module returns no texts."""

    @property
    def lengths(self) -> Tensor:
        return self.num_tokens

    @property
    def weights(self) -> Tensor:
        return self.num_scored

    def batch(self, indices: Sequence[int]) -> Batch:
        return build_batch(self.collate([self.dataset[index] for index in indices]), task=self.task)

    def describe(self) -> dict[str, Any]:
        return {"examples": len(self), "fingerprint": self.fingerprint}


def read_custom_module(config: CustomDataConfig) -> DataSource:
    """Returns the splits of the LightningDataModule that `data.factory` returns.

    Only the data set and the collate function of its loaders are used. lorasweep chooses the order and the batches, so
    that they are the same in all trials. The module runs with a fixed torch seed, so each call returns the same data.

    Errors of the module's own code are raised as they are, with its traceback.

    Raises:
        ConfigError: The function fails, or a loader or example has the wrong type or labels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same data at each call, whatever the seed of the run
        module = call_user_function(config.factory, key="data.factory", offered={})
        if not isinstance(module, LightningDataModule):
            raise ConfigError(
                f"`data.factory` must return a LightningDataModule, but {config.factory!r} returns "
                f"{type(module).__name__}."
            )
        module.prepare_data()
        module.setup("fit")
        train, validation = (_read_split(config, module, name) for name in ("train", "validation"))

    @functools.cache
    def read_test() -> CustomSplit:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same data at each call, whatever the seed of the run
            module.setup("test")
            return _read_split(config, module, "test")

    return DataSource(
        kind="documents" if config.task == "text" else config.task,
        label_names=config.labels,
        train=train,
        validation=validation,
        test=read_test,
    )


def build_batch(collated: Any, *, task: CustomTask) -> Batch:
    """Returns a collated batch with `targets` instead of `labels`.

    For the task `text`, `labels[i]` is token i, as in transformers, and the default for `labels` is `input_ids`.
    `targets[i]` is token i + 1, because the model predicts that token at position i.

    Raises:
        ConfigError: The batch is not a mapping of tensors, or has no labels.
    """
    if not hasattr(collated, "items") or not all(isinstance(value, Tensor) for value in collated.values()):
        raise ConfigError(
            f"`data.factory` must return batches that are mappings of tensors, but got {type(collated).__name__}. "
            "Set a collate function in its loaders."
        )
    batch: Batch = dict(collated.items())
    labels = batch.pop("labels", None)
    if labels is None and task == "text" and "input_ids" in batch:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    if labels is None:
        wanted = "`input_ids`" if task == "text" else "`labels`"
        raise ConfigError(f"`data.factory` must return examples with {wanted}, but got {', '.join(batch)}.")
    if task == "text":
        return {**batch, "targets": pad(labels[:, 1:], (0, 1), value=IGNORED)}
    if task == "single_label":
        return {**batch, "targets": labels.long().flatten()}
    return {**batch, "targets": labels.float().flatten()}


def _read_split(config: CustomDataConfig, module: LightningDataModule, name: str) -> CustomSplit:
    """Returns a split of the module. Reads every example once, to know its length, its weight and the fingerprint.

    Raises:
        ConfigError: The loader has no data set of known length, the data set is empty, or an example is unusable.
    """
    loader = getattr(module, LOADER_METHODS[name])()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ConfigError(
            f"`{LOADER_METHODS[name]}` of `data.factory` must return one DataLoader of a data set with `__len__` and "
            f"`__getitem__`, but got {type(getattr(loader, 'dataset', loader)).__name__}."
        )
    dataset, collate = cast(Any, loader.dataset), loader.collate_fn
    digest, num_tokens, num_scored = hashlib.sha256(), [], []
    for index in range(len(dataset)):
        batch = build_batch(collate([dataset[index]]), task=config.task)
        _check_targets(batch["targets"], config, source=f"example {index} of the {name} split")
        # The fingerprint covers the tensors that the model sees, after the collate function.
        for key in sorted(batch):
            digest.update(key.encode() + batch[key].contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        num_tokens.append(batch["input_ids"].shape[1] if "input_ids" in batch else 1)
        num_scored.append(float((batch["targets"] != IGNORED).sum()) if config.task == "text" else 1.0)
    if not num_tokens:
        raise ConfigError(f"the {name} split of `data.factory` must have an example, but is empty.")
    return CustomSplit(
        name=name,
        fingerprint=digest.hexdigest()[:16],
        dataset=dataset,
        collate=collate,
        task=config.task,
        num_tokens=torch.tensor(num_tokens),
        num_scored=torch.tensor(num_scored),
    )


def _check_targets(targets: Tensor, config: CustomDataConfig, *, source: str) -> None:
    num_labels = len(config.labels)
    if config.task == "single_label" and (
        unknown := [label for label in targets.tolist() if label not in range(num_labels)]
    ):
        raise ConfigError(
            f"`data.labels` must name every label, but has {num_labels} names, and {source} has label "
            f"{unknown[0]}. Labels count from 0."
        )
    if not targets.isfinite().all():
        raise ConfigError(f"`labels` must be finite numbers, but {source} has NaN or infinity.")

"""Trains and scores a user's own LightningModule (`module._target_`) on the user's own data module.

The module's steps and the data module's loaders are used as they are, but the loaders are repeatable.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # see lora.fully_trained
from torch.utils.data import DataLoader

from lorasweep.config.components import Component, instantiate
from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import LoggedMetric, RunConfig
from lorasweep.data.build_splits import DataSplits
from lorasweep.data.split import Batch, Split
from lorasweep.data.tasks import Task
from lorasweep.disk import csv_text
from lorasweep.errors import ConfigError
from lorasweep.lora.layer_kinds import count_parameters
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel, fingerprint_weights
from lorasweep.training.checkpoint import read_rng_state, restore_rng_state
from lorasweep.training.environment import resolve_device
from lorasweep.training.optim import configure_optimizers
from lorasweep.training.processes import find_launch, quiet_lightning
from lorasweep.training.telemetry import TrainingProgress
from lorasweep.wording import suggest_nearest

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


def build_module(config: RunConfig) -> LightningModule:
    """Creates the user's module. Raises `ConfigError` if lorasweep can't train it."""
    component = config.module
    assert component is not None
    learning_rate = {component.lr_argument: config.optim.lr} if component.lr_argument else {}
    with random_streams(0):  # the same weights at each call, whatever the seed of the run
        module = instantiate(component, key="module", expected=LightningModule, **learning_rate)
    if not module.automatic_optimization:
        raise ConfigError(f"`module` must have automatic optimization, but {component.target!r} has a manual one.")
    for step in ("training_step", "validation_step", "test_step"):
        if not is_overridden(step, module):
            raise ConfigError(f"`module` must have a `{step}`, but {component.target!r} has none.")
    if is_overridden("configure_optimizers", module) and not component.lr_argument:
        raise ConfigError(
            f"`module.lr_argument` must name the argument of {component.target!r} that takes `optim.lr`, because its "
            "own `configure_optimizers` sets the learning rate."
        )
    names = sorted(name for name, _ in module.named_modules() if name)
    for name in component.new_modules:
        if name not in names:
            raise ConfigError(
                f"`module.new_modules` must name submodules, but got {name!r}.{suggest_nearest(name, names)}"
            )
    return module


def load_own_base(config: RunConfig) -> BaseModel:
    """Returns the user's module as a base, with frozen parameters."""
    module = build_module(config).requires_grad_(False).train(False)
    assert config.module is not None
    return BaseModel(
        model=module,
        tokenizer=None,  # type: ignore[arg-type]  # the user's data module reads the data
        path=config.module.target,
        fingerprint=fingerprint_weights(module, exclude=config.module.new_modules),
        num_parameters=count_parameters(module),
        kind=config.model.kind,
        new_head_names=config.module.new_modules,
    )


class OwnModuleRun(lightning.Callback):
    """Does for a user's module what `TrainingModule` does beside its steps."""

    def __init__(self, config: RunConfig, base: BaseModel, *, module: LightningModule) -> None:
        """`module` is the prepared copy of the base."""
        self.module, self.base, self.method = module, base, METHODS[config.method.name]
        self.metric = str(config.metric.name)
        self.progress = TrainingProgress()
        self.step_losses = torch.zeros(0)
        self._step_began = 0.0
        module.strict_loading = False  # a checkpoint has only the trained parameters
        if self.method.name != "full":
            # Running statistics belong to the frozen base, and the files of other methods could not keep them.
            for norm in (part for part in module.modules() if hasattr(part, "running_mean")):
                norm.eval()
        if not is_overridden("configure_optimizers", module):
            build: Any = functools.partial(configure_optimizers, config, module)
            module.configure_optimizers = build  # type: ignore[method-assign]

    def whole_model(self) -> nn.Module:
        return self.module

    def get_metrics(self) -> dict[str, float]:
        """Returns the score of the last evaluation. Loggers have the other values that the module logs."""
        return {self.metric: float(self.module.trainer.callback_metrics[self.metric])}

    def save_weights(self, model: nn.Module, folder: Path) -> None:
        self.method.save(model, folder, base=self.base)

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.progress.train_s += time.perf_counter() - self._step_began
        first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), ())
        self.progress.tokens += len(first)  # each example counts as one token
        self.progress.positions += len(first)
        self.step_losses = outputs["loss"].detach().float().reshape(1) if outputs else torch.zeros(1)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the trained parameters and the buffers without the base, and the random state of torch."""
        frozen = {name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        # the record has the arguments, and a checkpoint must load with `weights_only`
        for key in [key for key in checkpoint if "hyper_parameters" in key or "hparams" in key]:
            del checkpoint[key]
        checkpoint |= {
            "progress": dict(vars(self.progress)),
            "torch_stream": read_rng_state(trainer.strategy.root_device),
        }

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.progress = TrainingProgress(**checkpoint["progress"])
        restore_rng_state(checkpoint["torch_stream"], trainer.strategy.root_device)


def check_steps(config: RunConfig, base: BaseModel, splits: OwnSplits, *, precision: Any) -> None:
    """Tries both evaluations on one batch of the base, so that a wrong module does not fail hours later.

    Errors of the module's own code are raised as they are, with its traceback.

    Raises:
        ConfigError: The steps do not log the metric.
    """
    module: Any = copy_sharing_weights(base.model)
    _evaluate(config, module, splits, step="validate", precision=precision, num_batches=1)
    score_on_test(config, module, splits, precision=precision, num_batches=1)


def score_on_test(
    config: RunConfig, module: Any, splits: OwnSplits, *, precision: Any, num_batches: int | None = None
) -> tuple[dict[str, float], str | None]:
    """Returns the metric on test data under its name on validation data, and CSV lines `row,score,weight,group`.

    The lines have the scores that `record_scores` got; None if it was not called. Errors as in `check_steps`.
    """
    splits.test()
    _recorded.clear()
    values = {
        splits.metric: _evaluate(config, module, splits, step="test", precision=precision, num_batches=num_batches)
    }
    rows = [(n, score, 1, n if group is None else group) for n, (score, group) in enumerate(_recorded)]
    return values, csv_text(("row", "score", "weight", "group"), rows) if rows else None


def _evaluate(
    config: RunConfig, module: LightningModule, splits: OwnSplits, *, step: str, precision: Any, num_batches: int | None
) -> float:
    # `test_acc` for `val_acc`, and `test/loss` for `validation/loss`
    test_name = re.sub(r"^val(id(ation)?)?(?=[^a-z]|$)", "test", splits.metric)
    metric = test_name if step == "test" else splits.metric
    with quiet_lightning(), random_streams(0):
        trainer = lightning.Trainer(
            accelerator=resolve_device(config.trainer),
            devices=1,
            plugins=[find_launch(config.trainer).environment],
            precision=precision,
            logger=False,
            limit_val_batches=num_batches,
            limit_test_batches=num_batches,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,  # other runs train on the same weights
        )
        getattr(trainer, step)(module, datamodule=splits.seed_loaders(0), verbose=False)
    module.cpu()
    logged = trainer.callback_metrics
    if metric not in logged:
        hook = "test_step" if step == "test" else "validation_step"
        raise ConfigError(
            f"`metric.name={splits.metric}` needs a module whose `{hook}` logs {metric!r} with `self.log`, but it logs "
            f"{', '.join(sorted(logged)) or 'nothing'}."
        )
    return float(logged[metric])


_recorded: list[tuple[float, Any]] = []
"""Score and group of each example since the evaluation on test data began."""


def record_scores(values: Tensor | Sequence[float], groups: Sequence[Any] | None = None) -> None:
    """Keeps the scores of test examples, so that intervals also cover the choice of examples. Call it in `test_step`.

    Args:
        values: One score for each example of the batch. Their mean over the test data must be the metric.
        groups: The group of each example, if examples depend on each other, such as the images of one patient.
    """
    scores = torch.as_tensor(values).detach().double().flatten().tolist()
    _recorded.extend(zip(scores, [None] * len(scores) if groups is None else groups, strict=True))

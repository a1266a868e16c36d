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
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import lightning
import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # see lora.fully_trained

from lorasweep.config.components import Component, instantiate
from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import RunConfig
from lorasweep.data.rows import SplitFacts, Splits
from lorasweep.disk import csv_text
from lorasweep.errors import ConfigError, first_line
from lorasweep.lora.layer_kinds import count_parameters
from lorasweep.methods import copy_sharing_weights
from lorasweep.methods.method import replace_parameters
from lorasweep.models.load import BaseModel, fingerprint_weights
from lorasweep.training.checkpoint import read_rng_state, restore_rng_state
from lorasweep.training.environment import resolve_device, resolve_precision
from lorasweep.training.evaluation import ScoresOnTest
from lorasweep.training.optim import configure_optimizers
from lorasweep.training.prepare import prepare_model
from lorasweep.training.processes import find_launch, quiet_lightning
from lorasweep.training.progress import TrainingProgress
from lorasweep.training.run_inputs import RunInputs

DATA_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Hooks of a data module that Lightning calls for each batch, if the class overrides them."""
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

    loader: Any
    seed: int = 0
    count_read: Callable[[], int] = lambda: 0
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
class OwnSplit(SplitFacts):
    """The size of a split of the user's data module, whose loaders make the batches. Each example counts as a token."""

    @functools.cached_property
    def lengths(self) -> Tensor:
        return self.weights.long()

    def describe(self) -> dict[str, Any]:
        return {"examples": len(self), "fingerprint": self.fingerprint}


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnSplits(Splits):
    """The user's data module, and the metric that the user's module logs."""

    data_module: LightningDataModule
    """Set up once for all runs."""


class SeededData(LightningDataModule):
    """The user's data module with repeatable loaders. The seed decides the order of its training data.

    The Trainer does not set up the user's data module again, which could draw other splits.
    """

    def __init__(self, data: LightningDataModule, *, seed: int) -> None:
        super().__init__()
        self.data, self.seed = data, seed
        for hook in DATA_HOOKS:
            setattr(self, hook, getattr(data, hook))

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer

    def train_dataloader(self) -> SeededLoader:
        # also after a run was resumed, which skips the batches of earlier steps
        def count_steps() -> int:
            return 0 if self.trainer is None else self.trainer.global_step

        return SeededLoader(loader=self.data.train_dataloader(), seed=self.seed, count_read=count_steps)

    def val_dataloader(self) -> SeededLoader:
        return SeededLoader(loader=self.data.val_dataloader())

    def test_dataloader(self) -> SeededLoader:
        return SeededLoader(loader=self.data.test_dataloader())


@functools.lru_cache(maxsize=1)  # modules with other arguments have the same data
def read_own_data(component: Component, score: ScoreMetric, *, batch_size: int) -> OwnSplits:
    """Creates the data module of `datamodule._target_` and sets it up, once and with the same seed for all runs.

    Errors of the data module's own code are raised as they are, with its traceback.

    Raises:
        ConfigError: It is no LightningDataModule, or its training batches have another size.
    """
    with random_streams(0):
        data = instantiate(component, key="datamodule", expected=LightningDataModule)
        data.prepare_data()
        data.setup("fit")

    @functools.cache
    def read_test() -> OwnSplit:
        with random_streams(0):
            data.setup("test")
        return _read_split(data, "test")

    train, validation = (_read_split(data, name) for name in ("train", "validation"))
    found: Any = data.train_dataloader().batch_size
    if found not in (None, batch_size):
        raise ConfigError(
            f"`trainer.batch_size` must be {found}, as in the training loader of `datamodule`, but got {batch_size}."
        )
    return OwnSplits(train=train, validation=validation, test=read_test, score_metric=score, data_module=data)


def _read_split(data: LightningDataModule, name: str) -> OwnSplit:
    """Returns the size of a split and the fingerprint of its first batch."""
    loader: Any = getattr(data, LOADER_METHODS[name])()
    num_examples = len(loader.dataset)
    digest = hashlib.sha256(str(num_examples).encode())
    for leaf in tree_leaves(next(iter(SeededLoader(loader=loader)))):
        is_tensor = isinstance(leaf, Tensor)
        digest.update(leaf.cpu().flatten().view(torch.uint8).numpy().tobytes() if is_tensor else repr(leaf).encode())
    return OwnSplit(name=name, fingerprint=digest.hexdigest()[:16], weights=torch.ones(num_examples))


def build_module(config: RunConfig) -> LightningModule:
    """Creates the user's module. Raises `ConfigError` if lorasweep can't train it."""
    component = config.module
    assert component is not None
    learning_rate = {component.lr_argument: config.optim.lr} if component.lr_argument else {}
    with random_streams(0):  # the same weights at each call, whatever the seed of the run
        module = instantiate(component, key="module", expected=LightningModule, **learning_rate)
    if is_overridden("configure_optimizers", module) and not component.lr_argument:
        raise ConfigError(
            f"`module.lr_argument` must name the argument of {component.target!r} that takes `optim.lr`, because its "
            "own `configure_optimizers` sets the learning rate."
        )
    try:
        for name in component.new_modules:
            module.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"`module.new_modules` must name submodules, but {error}.") from error
    return module


def load_own_base(config: RunConfig) -> BaseModel:
    """Returns the user's module as a base, with frozen parameters, in its own dtype. Errors as in `build_module`."""
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


def load_own_inputs(config: RunConfig) -> RunInputs:
    """Loads the user's module and data, and tries both evaluations on one batch, so that no run fails hours later.

    Errors of the module's own code are raised as they are, with its traceback.

    Raises:
        ConfigError: The module or the data can't be used, or the steps do not log the metric.
    """
    name, direction = config.metric.name, config.metric.direction
    assert config.datamodule is not None
    assert name is not None
    assert direction is not None
    metric = ScoreMetric(name=name, direction=direction)
    data = read_own_data(config.datamodule, metric, batch_size=config.trainer.batch_size)
    precision, base = resolve_precision(config.trainer), load_own_base(config)
    inputs = RunInputs(base=base, splits=data, precision=precision, always_autocasts=True)
    module = copy_sharing_weights(base.model)
    _evaluate(module, config=config, inputs=inputs, step="validate", num_batches=1)
    score_own_module(module, config=config, inputs=inputs, num_batches=1)
    return inputs


def score_own_module(
    model: nn.Module, *, config: RunConfig, inputs: RunInputs, num_batches: int | None = None
) -> ScoresOnTest:
    """Returns the metric under its name on validation data, and the scores that `record_scores` got.

    Errors as in `load_own_inputs`.
    """
    inputs.splits.test()
    recorded: list[tuple[float, Any]] = []
    token = _RECORDED.set(recorded)
    try:
        score = _evaluate(model, config=config, inputs=inputs, step="test", num_batches=num_batches)
    finally:
        _RECORDED.reset(token)
    rows = [(n, score, 1, n if group is None else group) for n, (score, group) in enumerate(recorded)]
    lines = csv_text(("row", "score", "weight", "group"), rows) if rows else None
    return ScoresOnTest({inputs.splits.metric: score}, lines)


class OwnModuleRun(lightning.Callback):
    """Does for a user's module what `TrainingModule` does beside its steps."""

    def __init__(self, config: RunConfig, inputs: RunInputs) -> None:
        module, base = build_module(config), inputs.base
        replace_parameters(module, dict(zip(module.parameters(), base.model.parameters(), strict=True)))
        prepared: Any = prepare_model(config, replace(base, model=module))
        self.data = SeededData(_get_data(inputs), seed=config.seeds.data_order)
        self.module: LightningModule = prepared
        self.metric = str(config.metric.name)
        self.progress_by_slot = [TrainingProgress()]
        self.step_losses = torch.zeros(1)
        self.kept_slots: Sequence[int] | None = None
        self._step_began = 0.0
        prepared.strict_loading = False  # a checkpoint has only the trained parameters
        if not config.method.trains_all:
            # Running statistics belong to the frozen base, and the files of other methods could not keep them.
            for norm in (part for part in prepared.modules() if hasattr(part, "running_mean")):
                norm.eval()
        if not is_overridden("configure_optimizers", prepared):
            build: Any = functools.partial(configure_optimizers, config, prepared)
            prepared.configure_optimizers = build

    def whole_models(self) -> list[nn.Module]:
        return [self.module]

    def count_trained(self) -> list[int]:
        return [sum(p.numel() for p in self.module.parameters() if p.requires_grad)]

    def read_rates(self) -> list[float]:
        [optimizer] = self.module.trainer.optimizers
        return [float(optimizer.param_groups[0]["lr"])]

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The score of the last evaluation. Loggers have the other values that the module logs."""
        return [{self.metric: float(self.module.trainer.callback_metrics[self.metric])}]

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        [progress] = self.progress_by_slot
        progress.train_s += time.perf_counter() - self._step_began
        first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), ())
        progress.tokens += len(first)  # each example counts as one token
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
            "progress": [dict(vars(self.progress_by_slot[0]))],
            "torch_stream": read_rng_state(trainer.strategy.root_device),
        }

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.progress_by_slot = [TrainingProgress(**checkpoint["progress"][0])]
        restore_rng_state(checkpoint["torch_stream"], trainer.strategy.root_device)


def _get_data(inputs: RunInputs) -> LightningDataModule:
    assert isinstance(inputs.splits, OwnSplits)
    return inputs.splits.data_module


def _evaluate(module: Any, *, config: RunConfig, inputs: RunInputs, step: str, num_batches: int | None) -> float:
    wanted = inputs.splits.metric
    # `test_acc` for `val_acc`, and `test/loss` for `validation/loss`
    test_name = re.sub(r"^val(id(ation)?)?(?=[^a-z]|$)", "test", wanted)
    metric = test_name if step == "test" else wanted
    with quiet_lightning(), random_streams(0):
        trainer = lightning.Trainer(
            accelerator=resolve_device(config.trainer),
            devices=1,
            plugins=[find_launch(config.trainer).environment],
            precision=inputs.lightning_precision(config),
            logger=False,
            limit_val_batches=num_batches,
            limit_test_batches=num_batches,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,  # other runs train on the same weights
        )
        try:
            getattr(trainer, step)(module, datamodule=SeededData(_get_data(inputs), seed=0), verbose=False)
        except MisconfigurationException as error:
            raise ConfigError(f"`module` must be one that Lightning can train, but: {first_line(error)}") from error
    module.cpu()
    logged = trainer.callback_metrics
    if metric not in logged:
        hook = "test_step" if step == "test" else "validation_step"
        raise ConfigError(
            f"`metric.name={wanted}` needs a module whose `{hook}` logs {metric!r} with `self.log`, but it logs "
            f"{', '.join(sorted(logged)) or 'nothing'}."
        )
    return float(logged[metric])


_RECORDED: ContextVar[list[tuple[float, Any]] | None] = ContextVar("recorded", default=None)
"""Score and group of each example so far, inside an evaluation on test data."""


def record_scores(values: Tensor | Sequence[float], groups: Sequence[Any] | None = None) -> None:
    """Keeps the scores of test examples, so that intervals also cover the choice of examples. Call it in `test_step`.

    Args:
        values: One score for each example of the batch. Their mean over the test data must be the metric.
        groups: The group of each example, if examples depend on each other, such as the images of one patient.
    """
    scores = torch.as_tensor(values).detach().double().flatten().tolist()
    if (recorded := _RECORDED.get()) is not None:  # None in a Trainer of the user's own
        recorded.extend(zip(scores, [None] * len(scores) if groups is None else groups, strict=True))

"""transformers' `from_pretrained`, quiet, complete and safe: no pickle and no foreign code unless it is allowed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, UnpicklingError, EOFError)
"""What transformers raises for a model or tokenizer that is missing, damaged or of a kind that it does not know."""
DRAWING_SEED = 0
"""Seed of heads that are drawn while loading, so that loading gives the same model each time; runs draw them anew."""


class IncompleteError(ValueError):
    """Weights are missing or have another shape than their model's configuration says."""


def load_pretrained(kind: Any, source: str, *, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """Loads a model straight into `dtype` and checks that all of its weights are there.

    Args:
        kind: A model class of transformers, or one of its `AutoModel...` classes.
        source: Folder or hub id.
        dtype: Type of the parameters; some buffers (rotary frequencies) stay fp32.
        settings: Passed on to `from_pretrained`.

    Raises:
        IncompleteError: Weights are missing or have the wrong shape; transformers alone would draw them anew.
        Exception: One of `LOADING_ERRORS`.
    """
    model, lacking = _load(kind, source, dtype=dtype, **settings)
    _refuse(lacking)
    return model


def load_with_new_head(
    kind: Any, source: str, *, dtype: torch.dtype, **settings: Any
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Loads a model whose checkpoint may lack a head, or have one for other labels.

    A head is every module outside the pre-trained network (`classifier`, `score`), and the pooler before it. A new head
    is drawn as its architecture defines, always from the same seed.

    Returns:
        The model, and the names of the modules that are newly drawn, outermost.

    Raises:
        IncompleteError: Other weights are missing or have the wrong shape.
        Exception: One of `LOADING_ERRORS`.
    """
    with own_stream():
        model, lacking = _load(kind, source, dtype=dtype, **settings)
    network = f"{model.base_model_prefix}."
    _refuse([name for name in lacking if name.startswith(network) and "pooler" not in name.split(".")])
    return model, outermost_modules(model, lacking)


def outermost_modules(model: nn.Module, parameters: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the largest modules that have only these parameters, given by name."""
    found = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    given = set(parameters)

    def is_within(module: str) -> bool:
        inside = model.get_submodule(module).named_parameters(prefix=module, remove_duplicate=False)
        return module != "" and all(name in given for name, _ in inside)

    grown: dict[str, None] = {}
    for name in found:
        while is_within(name.rpartition(".")[0]):
            name = name.rpartition(".")[0]
        grown[name] = None
    return tuple(name for name in grown if not any(name.startswith(f"{other}.") for other in grown))


@contextmanager
def own_stream() -> Iterator[None]:
    """Draws random numbers inside from `DRAWING_SEED`; restores torch's own stream afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(DRAWING_SEED)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' progress bars and load report: problems become errors here."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR + 1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _load(kind: Any, source: str, *, dtype: torch.dtype, **settings: Any) -> tuple[PreTrainedModel, list[str]]:
    """Returns a model and the names of its weights that the checkpoint lacks or has in another shape."""
    given = {"use_safetensors": True, "trust_remote_code": False} | settings
    with quiet_transformers():
        model: PreTrainedModel
        model, found = kind.from_pretrained(
            source,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are found below, with their names
            output_loading_info=True,
            **given,
        )
    return model, sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])


def _refuse(lacking: Collection[str]) -> None:
    if lacking:
        raise IncompleteError(
            f"{len(lacking)} of its weights are missing or have another shape, such as {next(iter(lacking))!r}"
        )

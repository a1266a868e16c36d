"""transformers' `from_pretrained`, quiet, complete and safe: no pickle and no foreign code unless it is allowed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, UnpicklingError, EOFError)
"""What transformers raises for a model or tokenizer that is missing, damaged or of a kind that it does not know."""
DRAWING_SEED = 0
"""Of what is drawn while loading, so that the same model comes out each time; runs draw their heads anew."""


class IncompleteError(ValueError):
    """Weights are missing or have another shape than their model's configuration says."""


def load_pretrained(kind: Any, source: str, *, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """Loads a model straight into `dtype`, all of whose weights are there.

    Args:
        kind: A model class of transformers, or one of its `AutoModel...` classes.
        source: Folder or hub id.
        dtype: Of the parameters; some buffers (rotary frequencies) stay fp32.
        settings: Passed on to `from_pretrained`.

    Raises:
        IncompleteError: Weights are missing or have the wrong shape; transformers alone would make them up.
        Exception: One of `LOADING_ERRORS`.
    """
    model, lacking = _load(kind, source, dtype=dtype, **settings)
    _refuse(lacking)
    return model


def load_with_new_head(
    kind: Any, source: str, *, dtype: torch.dtype, **settings: Any
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Loads a model whose checkpoint may lack a head, or have one for other labels.

    A head is what lies outside the pre-trained network (`classifier`, `score`), and the pooler before it. A new one is
    drawn as its architecture says, from a seed that is always the same.

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
    """Returns the largest modules of which some parameters, given by name, are parts, with nothing else inside."""
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
    """Lets what is drawn inside come from `DRAWING_SEED`; torch's own stream is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(DRAWING_SEED)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' progress bars and load report off the screen: what matters of them is in errors here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR + 1)
    previous = transformers_logging.set_tqdm_hook(lambda make, args, settings: make(*args, **settings, disable=True))
    of_gguf: Any = modeling_gguf_pytorch_utils
    bar, of_gguf.tqdm = of_gguf.tqdm, functools.partial(of_gguf.tqdm, disable=True)  # which does not ask the hook
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(previous)
        of_gguf.tqdm = bar


def _load(kind: Any, source: str, *, dtype: torch.dtype, **settings: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model and the names of its weights that the checkpoint lacks or has in another shape."""
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

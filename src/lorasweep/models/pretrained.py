"""transformers' `from_pretrained`, quiet, complete and safe: safetensors only, no code that comes with a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
"""What transformers raises for a model or tokenizer that is missing, damaged or of a kind that it does not know."""


class IncompleteError(ValueError):
    """Weights are missing or have another shape than their model's configuration says."""


def load_pretrained(kind: Any, source: str, *, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """Loads a model straight into `dtype`.

    Args:
        kind: A model class of transformers, or one of its `AutoModel...` classes.
        source: Folder or hub id.
        dtype: Of the parameters; some buffers (rotary frequencies) stay fp32.
        settings: Passed on to `from_pretrained`.

    Raises:
        IncompleteError: Weights are missing or have the wrong shape; transformers alone would make them up.
        Exception: One of `LOADING_ERRORS`.
    """
    with quiet_transformers():
        model: PreTrainedModel
        model, found = kind.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are found below, with their names
            output_loading_info=True,
            **settings,
        )
    lacking = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
    if lacking:
        raise IncompleteError(
            f"{len(lacking)} of its weights are missing or have another shape, such as {lacking[0]!r}"
        )
    return model


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message without its full stop, for use inside a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".: ")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' progress bar and load report off the screen: what matters of them is in errors here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR + 1)
    previous = transformers_logging.set_tqdm_hook(lambda make, args, settings: make(*args, **settings, disable=True))
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(previous)

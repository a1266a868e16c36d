"""Loads models with transformers' `from_pretrained`, quietly, and checks that no weight is missing.

Pickle files and code from the hub are refused unless the caller allows them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging


def load_pretrained(
    model_class: Any, source: str, *, dtype: torch.dtype, may_lack_head: bool = False, **settings: Any
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Loads a model in `dtype`, and checks that the checkpoint has its weights.

    The head is every module outside the pre-trained network (`classifier`, `score`), and the pooler inside. A new head
    is initialised as its architecture defines, with a fixed seed. Later, each run draws the head again.

    Args:
        model_class: A model class of transformers, or one of its `AutoModel...` classes.
        source: Folder or hub id.
        dtype: Type of the parameters; some buffers (rotary frequencies) stay fp32.
        may_lack_head: Whether the checkpoint may have no head, or a head for other labels.
        settings: Passed on to `from_pretrained`.

    Returns:
        The model, and the names of its new modules: of two nested modules only the outer one.

    Raises:
        ValueError: Weights are missing or have the wrong shape. transformers alone would only warn.
        Exception: The files are missing, damaged or of an unknown kind. transformers raises errors of many classes.
    """
    model: PreTrainedModel
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same weights at each call, whatever the seed of the run
        model, info = model_class.from_pretrained(
            source,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # no error, because `info` names them
            output_loading_info=True,
            **({"use_safetensors": True, "trust_remote_code": False} | settings),
        )
    missing = sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])
    network = f"{model.base_model_prefix}."
    needed = [
        name for name in missing if not may_lack_head or (name.startswith(network) and "pooler" not in name.split("."))
    ]
    if needed:
        raise ValueError(f"{len(needed)} of its weights are missing or have another shape, such as {needed[0]!r}")
    return model, outermost_modules(model, missing)


def outermost_modules(model: nn.Module, parameters: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the modules whose parameters are all given: of two nested modules only the outer one."""
    names = set(parameters)

    def is_covered(module: str) -> bool:
        inside = model.get_submodule(module).named_parameters(prefix=module, remove_duplicate=False)
        return all(name in names for name, _ in inside)

    modules: dict[str, None] = {}  # in the order of the parameters
    for parameter in parameters:
        name = parameter.rpartition(".")[0]
        while (parent := name.rpartition(".")[0]) and is_covered(parent):
            name = parent
        modules[name] = None
    return tuple(name for name in modules if not any(name.startswith(f"{other}.") for other in modules))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' progress bars and log messages. Our errors tell of problems instead."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR + 1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]

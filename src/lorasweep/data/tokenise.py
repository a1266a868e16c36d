"""Tokenises texts of any task. The token ids stay in the cache folder of `datasets` for later runs and sweeps."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.data.rows import Ragged
from lorasweep.data.source import Example, Examples
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError, first_line

CACHE_FORMAT = 6
"""Part of every cache key. Raise it when a task tokenises the same examples differently than before."""
MIN_SHOWN_CHARACTERS = 10_000_000
"""A progress bar is shown while at least as much text is tokenised, which takes seconds."""
BATCH_ROWS = 1000
"""Number of examples that are tokenised together."""
Columns = dict[str, list[Any]]
"""For each name of `map_cached`, a sequence for each example."""


def get_end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the end-of-text token. Raises ConfigError if the tokenizer has none."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ConfigError(
            "`model.path` must have a tokenizer with an end-of-text token, but has none. Use another model."
        )
    return end


def find_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token at padded positions, which are masked, so that any token serves."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(token, int)), 0)


def tokenise_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns token ids without special tokens. Even `<|endoftext|>` inside a text becomes several ordinary tokens."""
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about texts longer than the model's context: they are cut later
    )["input_ids"]
    return ids


def cache_key(tokenizer: PreTrainedTokenizerBase, fingerprint: str, **settings: Any) -> str:
    """Returns 32 hex digits that differ for other examples, tokenizers, settings or values of `CACHE_FORMAT`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any
    if backend is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:  # without the truncation and padding of its latest call
        serialised = json.loads(backend.to_str()).items()
        rules = {name: rule for name, rule in serialised if name not in ("truncation", "padding")}
    tokenizer_parts = [rules, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), tokenizer.padding_side]
    parts = [CACHE_FORMAT, fingerprint, *tokenizer_parts, sorted(settings.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def get_cache_folder() -> Path:
    """Returns the folder of what lorasweep keeps for later commands, below that of `datasets`."""
    return Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME, "datasets")), "lorasweep")


def map_cached(
    examples: Examples[Example], tokenise: Callable[[Sequence[Example]], Columns], *, key: str
) -> dict[str, Ragged]:
    """Returns the sequences that `tokenise` makes of the examples. Takes them from the cache if possible."""
    folder = get_cache_folder()
    path = folder / f"{key}.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):  # not tokenised yet, or damaged
        parts: dict[str, list[Tensor]] = defaultdict(list)
        is_quiet = sum(len(text) for item in examples.items for text in item.list_texts()) < MIN_SHOWN_CHARACTERS
        starts = range(0, len(examples), BATCH_ROWS)
        for start in track(starts, "tokenising", console=Console(stderr=True), disable=is_quiet):
            for name, rows in tokenise(examples.items[start : start + BATCH_ROWS]).items():
                parts[f"{name}.values"].append(torch.tensor(list(itertools.chain(*rows)), dtype=torch.int32))
                parts[f"{name}.lengths"].append(torch.tensor(list(map(len, rows)), dtype=torch.int32))
        tensors = {name: torch.cat(tensors) for name, tensors in parts.items()}
        with suppress(OSError):  # the cache is not writable, so each run tokenises the examples again
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(tensors))
    names = [name.removesuffix(".values") for name in tensors if name.endswith(".values")]
    return {
        name: Ragged.join(tensors[f"{name}.values"].long(), lengths=tensors[f"{name}.lengths"].long()) for name in names
    }


def read_template_file(name: str) -> str:
    """Returns the text of the file that `data.template` names. Raises ConfigError if it can't be read."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: the user in `~USER` is unknown
        raise ConfigError(
            f"`data.template` must name a readable file, but got {name!r}: {first_line(error)}."
        ) from error


def digest_template(text: str) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a template's text, as in a run's record."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]

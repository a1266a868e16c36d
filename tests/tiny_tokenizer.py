"""The byte-level tokenizer of the embedded model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasweep.models import tiny

END_OF_TEXT = 256


def load_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(Path(tiny.__file__).parent)
    return tokenizer

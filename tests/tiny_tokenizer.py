"""The byte-level tokenizer of the embedded model."""

from pathlib import Path

from transformers import AutoTokenizer

from lorasweep.models import tiny

END_OF_TEXT = 256


def load_tokenizer():
    return AutoTokenizer.from_pretrained(Path(tiny.__file__).parent)

"""Tokenizers: that of the embedded model, of bytes, and one of words."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorasweep.models import tiny

END_OF_TEXT = 256
WORDS = [f"w{n}" for n in range(40)]


def load_tokenizer():
    return AutoTokenizer.from_pretrained(Path(tiny.__file__).parent)


def make_word_tokenizer():
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}
    vocabulary = {word: n for n, word in enumerate([*special.values(), *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

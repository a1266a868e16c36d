"""Documents become token blocks that score every token once, and a bad part is named before anything is trained."""

import math

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import StdlibConfig
from lorasweep.data import parts as parts_file
from lorasweep.data.parts import choose_evenly, cut_blocks, load_part, load_parts, tokenise
from lorasweep.data.rows import fingerprint_documents
from lorasweep.data.stdlib import Document
from lorasweep.errors import ConfigError
from lorasweep.models.tiny.pretrain import END_OF_TEXT, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def make_config(**settings):
    defaults = {
        "name": "stdlib_docs",
        "block_length": 4,
        "max_validation_blocks": None,
        "max_test_blocks": None,
        "metric": "bits_per_byte",
    }
    return StdlibConfig(**(defaults | settings))


def make_documents(*texts):
    return [Document(name=f"document {n}", text=text) for n, text in enumerate(texts)]


@pytest.fixture
def use_documents(monkeypatch):
    """Puts given documents, per part, in place of the standard library's; gives the names of parts as they are read."""
    read = []

    def use(**parts):
        def read_part(name):
            read.append(name)
            return parts[name]

        monkeypatch.setattr(parts_file, "SOURCES", {"stdlib_docs": read_part})
        return read

    return use


def test_tokens_are_all_documents_each_with_its_end(tokenizer):
    row = tokenise(make_documents("ab", "ü", ""), tokenizer=tokenizer)
    assert row.dtype == torch.int64
    assert row.tolist() == [97, 98, END_OF_TEXT, *"ü".encode(), END_OF_TEXT, END_OF_TEXT]


def test_spelled_out_special_token_is_text(tokenizer):
    row = tokenise(make_documents("<|endoftext|>"), tokenizer=tokenizer)
    assert row.tolist() == [*b"<|endoftext|>", END_OF_TEXT]


def test_document_longer_than_the_context_is_tokenised_whole_and_without_a_warning(tokenizer, caplog):
    short = build_tokenizer()
    short.model_max_length = 8
    assert len(tokenise(make_documents("x" * 100), tokenizer=short)) == 101
    assert not caplog.records


def test_blocks_predict_every_token_but_the_first_once():
    blocks = cut_blocks(torch.arange(14), block_length=4)
    assert blocks.shape == (3, 5)
    assert blocks[:, 1:].flatten().tolist() == list(range(1, 13))  # 13 is left over
    assert torch.equal(blocks[1:, 0], blocks[:-1, -1])


@pytest.mark.parametrize(
    ("most", "chosen"), [(None, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 2, 4]), (7, [0, 1, 2, 3, 4, 5, 6]), (1, [0])]
)
def test_fewer_blocks_are_evenly_spaced(most, chosen):
    assert choose_evenly(torch.arange(7)[:, None], most=most).flatten().tolist() == chosen


def test_part_counts_bytes_and_tokens(tokenizer, use_documents):
    use_documents(train=make_documents("añb", "cdef"))
    part = load_part(make_config(), "train", tokenizer=tokenizer, max_blocks=None)
    assert part.describe() == {"documents": 2, "bytes": 8, "blocks": 2, "fingerprint": part.fingerprint}
    assert math.isclose(part.bytes_per_token, 8 / 10)  # 8 bytes and 2 ends


def test_limits_of_validation_and_test_do_not_touch_training(tokenizer, use_documents):
    documents = make_documents("x" * 80)
    use_documents(train=documents, validation=documents, test=documents)
    parts = load_parts(make_config(max_validation_blocks=3, max_test_blocks=2), tokenizer=tokenizer)
    assert [len(part.tokens) for part in (parts.train, parts.validation, parts.test())] == [20, 3, 2]


def test_test_part_is_read_once_and_not_before_it_is_called_for(tokenizer, use_documents):
    documents = make_documents("some text")
    read = use_documents(train=documents, validation=documents, test=documents)
    parts = load_parts(make_config(), tokenizer=tokenizer)
    assert read == ["train", "validation"]
    assert parts.test() is parts.test()
    assert read == ["train", "validation", "test"]


def test_fingerprint_moves_with_names_texts_and_order():
    documents = make_documents("one", "two")
    variants = [
        documents,
        documents[::-1],
        make_documents("one", "twO"),
        [Document(name="other", text="one"), documents[1]],
        [Document(name="document 0o", text="ne"), documents[1]],  # the same characters, cut elsewhere
    ]
    assert len({fingerprint_documents(variant) for variant in variants}) == len(variants)
    assert fingerprint_documents(make_documents("one", "two")) == fingerprint_documents(documents)


def test_empty_part_is_named(tokenizer, use_documents):
    use_documents(train=make_documents("some text"), validation=[])
    with pytest.raises(ConfigError, match="the validation part of `data=stdlib_docs` must not be empty"):
        load_parts(make_config(), tokenizer=tokenizer)


def test_part_shorter_than_a_block_is_named(tokenizer, use_documents):
    use_documents(train=make_documents("abcd"))
    assert len(load_part(make_config(), "train", tokenizer=tokenizer, max_blocks=None).tokens) == 1
    with pytest.raises(
        ConfigError, match=r"`data.block_length` must be less than the 5 tokens of the train part .* got 5"
    ):
        load_part(make_config(block_length=5), "train", tokenizer=tokenizer, max_blocks=None)


def test_tokenizer_without_an_end_is_refused():
    tokenizer: PreTrainedTokenizerBase = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="must have a tokenizer with an end-of-text token"):
        tokenise(make_documents("text"), tokenizer=tokenizer)


def test_embedded_docs_load_and_can_be_read_back(tokenizer):
    parts = load_parts(make_config(block_length=128), tokenizer=tokenizer)
    assert len(parts.train.tokens) > 1000
    first = bytes(parts.train.tokens[0].tolist()).decode()
    assert "assert" in first  # the first topic
    assert parts.train.fingerprint != parts.validation.fingerprint

"""Documents become token blocks that score every token once, and a bad split is named before anything is trained."""

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from tests.tiny_tokenizer import load_tokenizer

from lorasweep.config.compose import compose_run
from lorasweep.data import split as split_file
from lorasweep.data.build_splits import build_block_split
from lorasweep.data.source import Document, collect_examples
from lorasweep.data.split import choose_evenly
from lorasweep.errors import ConfigError

check_shapes = jaxtyped(typechecker=beartype)
cut_blocks = check_shapes(split_file.cut_blocks)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def make_documents(*texts, name="train"):
    return collect_examples(name, [Document(f"document {n}", text) for n, text in enumerate(texts)])


def make_split(documents, tokenizer, *, block_length=4, **limits):
    settings = {"data.block_length": block_length, **{f"data.{key}": value for key, value in limits.items()}}
    config = compose_run({"data": "stdlib_docs", **settings})
    return build_block_split(documents, config=config.data, tokenizer=tokenizer)


def test_blocks_predict_every_token_but_the_first_once():
    blocks = cut_blocks(torch.arange(14), block_length=4)
    assert blocks.shape == (3, 5)
    assert blocks[:, 1:].flatten().tolist() == list(range(1, 13))  # 13 is left over
    assert torch.equal(blocks[1:, 0], blocks[:-1, -1])


def test_group_of_a_block_is_the_document_of_the_first_token_that_it_predicts(tokenizer):
    # tokens: abc$defg$hi, so block 1 begins with the d and predicts from the e on; block 2 begins with the $
    split = make_split(make_documents("abc", "defg", "hijk", name="test"), tokenizer)
    assert split.groups == ("document 0", "document 1", "document 2")
    limited = make_split(make_documents("abc", "defg", "hijk", name="test"), tokenizer, max_test_blocks=2)
    assert limited.groups == ("document 1", "document 2")
    named = collect_examples("test", [Document("a", "abc", "one"), Document("b", "defg", "two"), Document("c", "hijk")])
    assert make_split(named, tokenizer).groups == ("one", "two", "c")


def test_a_split_shorter_than_a_block_is_named(tokenizer):
    assert len(make_split(make_documents("abcd"), tokenizer)) == 1
    with pytest.raises(ConfigError, match=r"`data.block_length` .* 5 tokens of the train split"):
        make_split(make_documents("abcd"), tokenizer, block_length=5)


@pytest.mark.parametrize("counts", [[1, 5, 5, 9], [3, 3, 3], [1, 0, 40], [1] * 20])
@pytest.mark.parametrize("limit", [1, 4, 8])
def test_chosen_blocks_are_spread_evenly_over_documents(counts, limit):
    owners = [document for document, count in enumerate(counts) for _ in range(count)]
    chosen = choose_evenly(counts, limit=limit)
    assert len(set(chosen)) == limit
    shares = [[owners[index] for index in chosen].count(document) for document in range(len(counts))]
    # a document that has fewer blocks than another one has no blocks left, or only the last block of a round
    assert all(share >= min(count, max(shares) - 1) for share, count in zip(shares, counts, strict=True))

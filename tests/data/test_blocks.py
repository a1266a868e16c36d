"""Documents become token blocks that score every token once, and a bad split is named before anything is trained."""

import math

import pytest
import torch
import transformers

from lorasweep.data.blocks import build_block_split, choose_evenly, cut_blocks, positions_in_documents
from lorasweep.data.source import Documents, fingerprint_documents
from lorasweep.data.stdlib import Document
from lorasweep.data.tasks import LanguageModelling
from lorasweep.errors import ConfigError
from lorasweep.models.tiny.pretrain import END_OF_TEXT, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def make_rows(*texts, name="train"):
    documents = [Document(name=f"document {n}", text=text) for n, text in enumerate(texts)]
    return Documents(name=name, documents=documents, fingerprint=fingerprint_documents(documents))


def make_split(rows, tokenizer, *, block_length=4, max_blocks=None, separate=False):
    return build_block_split(
        rows,
        data="text",
        tokenizer=tokenizer,
        block_length=block_length,
        max_blocks=max_blocks,
        separate=separate,
    )


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


def test_a_part_counts_bytes_and_tokens(tokenizer):
    split = make_split(make_rows("añb", "cdef"), tokenizer)
    assert split.describe() == {"documents": 2, "bytes": 8, "blocks": 2, "fingerprint": split.fingerprint}
    assert math.isclose(split.bytes_per_token, 8 / 10)  # 8 bytes and 2 ends
    assert split.lengths.tolist() == split.weights.tolist() == [4, 4]


def test_targets_are_the_next_tokens(tokenizer):
    batch = make_split(make_rows("abcdefgh"), tokenizer).batch([1, 0])
    assert batch["input_ids"].tolist() == [[101, 102, 103, 104], [97, 98, 99, 100]]
    assert batch["targets"].tolist() == [[102, 103, 104, END_OF_TEXT], [98, 99, 100, 101]]
    assert set(batch) == {"input_ids", "targets"}


def test_an_empty_part_is_named(tokenizer):
    with pytest.raises(ConfigError, match="the validation split of `data=text` must not be empty"):
        make_split(make_rows(name="validation"), tokenizer)


def test_a_part_shorter_than_a_block_is_named(tokenizer):
    assert len(make_split(make_rows("abcd"), tokenizer)) == 1
    with pytest.raises(
        ConfigError, match=r"`data.block_length` must be less than the 5 tokens of the train split .* got 5"
    ):
        make_split(make_rows("abcd"), tokenizer, block_length=5)


def test_positions_start_anew_after_the_end_of_a_document():
    tokens = torch.tensor([[7, 0, 7, 7, 0], [0, 0, 7, 7, 7], [7, 7, 7, 7, 7]])
    expected = [[0, 1, 0, 1, 2], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert positions_in_documents(tokens, separator=0).tolist() == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_token_sees_an_earlier_document_where_documents_are_separate(tokenizer, attention):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    model.config.use_cache = False  # as `load_base` sets it; with a cache transformers looks for no packed rows
    task = LanguageModelling(bytes_per_token=1.0)

    def losses(text, separate):
        split = make_split(make_rows(text, "xyzuvw"), tokenizer, block_length=9, separate=separate)
        with torch.no_grad():
            return task._token_losses(model, split.batch([0]))[0, 3:]  # of the second document

    # fp32 in two orders of summation
    torch.testing.assert_close(losses("ab", True), losses("cd", True), rtol=1e-5, atol=1e-6)
    assert (losses("ab", False) - losses("cd", False)).abs().max() > 1e-4

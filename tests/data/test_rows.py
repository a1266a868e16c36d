"""Splits make padded batches that give the same losses and gradients, and blocks that score every token once."""

import pytest
import torch
import transformers
from tests.data.conftest import make_data, make_ragged
from tests.tiny_tokenizer import load_tokenizer

from lorasweep.data.batching import StepBatchSampler
from lorasweep.data.rows import IGNORED, Rows
from lorasweep.data.source import collect_examples
from lorasweep.errors import ConfigError
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.tasks.chat.rows import count_scored
from lorasweep.tasks.table.objective import Classification
from lorasweep.tasks.text.read import Document
from lorasweep.tasks.text.rows import build_blocks

TOKENS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15], [16, 17, 18, 19]]
TARGETS = [[IGNORED, *tokens[2:], 3] if len(tokens) > 1 else [3] for tokens in TOKENS]
SPLIT = {"name": "train", "fingerprint": "0", "facts": {}}
INPUTS = {"input_ids": make_ragged(TOKENS)}
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_labelled(class_weights=None):
    labels = torch.tensor([0, 1, 1, 0, 1])
    weights = {} if class_weights is None else {"weights": class_weights[labels]}
    return Rows(
        **SPLIT,
        sequences=INPUTS,
        columns={"targets": labels, **weights},
        weights=weights.get("weights", torch.ones(len(labels))),
    )


def make_completions():
    targets = make_ragged(TARGETS)
    return Rows(**SPLIT, sequences={**INPUTS, "targets": targets}, weights=count_scored(targets).float())


def make_pairs():
    """Two pairs; the fifth row is left out."""
    sequences = {name: rows.select(torch.arange(4)) for name, rows in make_completions().sequences.items()}
    return Rows(**SPLIT, groups=("a", "b"), sequences=sequences, weights=torch.ones(2), row_names=("one", "two"))


def make_llama():
    # `load_base` turns the cache off; with a cache transformers looks for no packed sequences
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, use_cache=False))


def make_bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=2))


def step_gradient(model, split, objective, *, accumulate):
    """Loss and gradient of one optimizer step, whose examples are cut into so many micro-batches."""
    model.zero_grad()
    loss = torch.zeros(())
    sampler = StepBatchSampler(split, batch_size=4, num_steps=1, seed=0, group_by_length=True, accumulate=accumulate)
    for micro in sampler:
        share = objective.losses(model, split.batch(micro.indices)).double().sum() / micro.step_weight
        share.backward()
        loss = loss + share.detach()
    return loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_padding_is_masked_and_a_batch_without_any_has_no_mask():
    batch = make_labelled().batch([1, 2])
    assert batch["input_ids"].tolist() == [[8, 9, 0, 0, 0], [10, 11, 12, 13, 14]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["targets"].tolist() == [1, 1]
    assert "attention_mask" not in make_labelled().batch([1])
    assert "weights" not in batch
    split = make_labelled(class_weights=torch.tensor([2.0, 0.5]))
    assert split.weights.tolist() == [2.0, 0.5, 0.5, 2.0, 0.5]
    assert split.batch([0, 1])["weights"].tolist() == [2.0, 0.5]


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize(
    ("make_model", "split", "objective"),
    [
        (make_llama, make_completions(), NextTokens(bytes_per_token=1.0)),
        (make_bert, make_labelled(class_weights=torch.tensor([2.0, 0.5])), Classification(num_classes=2)),
    ],
)
def test_the_gradient_of_a_step_cut_by_length_is_that_of_the_padded_batch(make_model, split, objective, accumulate):
    torch.manual_seed(0)
    model = make_model().double().eval()
    whole, expected = step_gradient(model, split, objective, accumulate=1)
    cut, found = step_gradient(model, split, objective, accumulate=accumulate)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)  # losses are fp32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)  # cross-entropy runs in fp32


def make_blocks(*documents, block_length=4, **limits):
    config = make_data("stdlib_docs", block_length=block_length, **limits)
    return build_blocks(collect_examples("test", list(documents)), config=config, tokenizer=load_tokenizer())


def test_blocks_predict_every_token_but_the_first_once():
    text = "abcdefghijklm"
    blocks = make_blocks(Document("1", text)).batch([0, 1, 2])  # 13 characters and the end, which is left over
    assert blocks["targets"].shape == (3, 4)
    assert blocks["targets"].flatten().tolist() == [*text.encode()[1:]]
    assert blocks["input_ids"].flatten().tolist() == [*text.encode()[:-1]]


def test_group_of_a_block_is_the_document_of_the_first_token_that_it_predicts():
    # tokens: abc$defg$hi, so block 1 begins with the d and predicts from the e on; block 2 begins with the $
    documents = Document("1", "abc"), Document("2", "defg", "two"), Document("3", "hijk")
    assert make_blocks(*documents).groups == ("1", "two", "3")
    assert make_blocks(*documents, max_test_blocks=2).groups == ("1", "two")


def test_a_split_shorter_than_a_block_is_refused():
    assert len(make_blocks(Document("1", "abcd"))) == 1
    with pytest.raises(ConfigError, match=r"`data.block_length` .* 5 tokens of the test split"):
        make_blocks(Document("1", "abcd"), block_length=5)


def test_a_pair_is_one_example_with_two_rows_that_stay_together():
    split = make_pairs()
    assert (len(split), split.lengths.tolist(), split.row_lengths.tolist()) == (2, [5, 6], [3, 5])
    batch = split.batch([1, 0])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [15, 0, 0, 0, 0], [5, 6, 7, 0, 0], [8, 9, 0, 0, 0]]
    assert batch["targets"][0].tolist() == TARGETS[2]
    assert split.fill_reference().batch([1])["reference"].tolist() == [0.0, 0.0]
    known = split.fill_reference(torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert known.batch([1, 0])["reference"].tolist() == [-3.0, -4.0, -1.0, -2.0]

"""Examples of different lengths: padded batches and cut steps give the same losses and gradients."""

import pytest
import torch
import transformers
from tests.data.ragged import make_ragged

from lorasweep.data.batching import StepBatchSampler
from lorasweep.data.split import IGNORED, CompletionSplit, LabelledSplit
from lorasweep.data.tasks import Classification, LanguageModelling

TOKENS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15], [16, 17, 18, 19]]


SPLIT = {"name": "train", "fingerprint": "0", "tokens": make_ragged(TOKENS), "pad_token": 0, "bytes": 9}
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def labelled(**settings):
    return LabelledSplit(labels=torch.tensor([0, 1, 1, 0, 1]), **SPLIT, **settings)


def completions():
    targets = [[IGNORED, *tokens[2:], 3] if len(tokens) > 1 else [3] for tokens in TOKENS]
    columns = {"answer_starts": torch.ones(len(TOKENS)), "rows": (None,) * len(TOKENS)}
    return CompletionSplit(targets=make_ragged(targets), scored_bytes=30, **columns, **SPLIT)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double().eval()
    model.config.use_cache = False  # as `load_base` sets it; with a cache transformers looks for no packed sequences
    return model


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=2)).double().eval()


def step_gradient(model, split, task, *, accumulate, batch_size):
    """The gradient of one optimizer step, its examples cut into so many micro-batches."""
    model.zero_grad()
    loss = torch.zeros(())
    steps = StepBatchSampler(split, batch_size=batch_size, num_steps=1, seed=0, accumulate=accumulate)
    for micro in steps:
        share = task.losses(model, split.batch(micro.indices)).double().sum() / micro.step_weight
        share.backward()
        loss = loss + share.detach()
    return loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_padding_is_masked_and_a_batch_without_any_has_no_mask():
    batch = labelled().batch([1, 2])
    assert batch["input_ids"].tolist() == [[8, 9, 0, 0, 0], [10, 11, 12, 13, 14]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["targets"].tolist() == [1, 1]
    assert "attention_mask" not in labelled().batch([1])
    assert "weights" not in batch
    split = labelled(class_weights=torch.tensor([2.0, 0.5]))
    assert split.weights.tolist() == [2.0, 0.5, 0.5, 2.0, 0.5]
    assert split.batch([0, 1])["weights"].tolist() == [2.0, 0.5]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_the_gradient_of_a_step_cut_by_length_is_that_of_the_padded_batch(llama, bert, accumulate):
    cases = [
        (llama, completions(), LanguageModelling(bytes_per_token=1.0)),
        (bert, labelled(class_weights=torch.tensor([2.0, 0.5])), Classification(num_classes=2)),
    ]
    for model, split, task in cases:
        whole, expected = step_gradient(model, split, task, accumulate=1, batch_size=4)
        cut, found = step_gradient(model, split, task, accumulate=accumulate, batch_size=4)
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)  # losses are fp32
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)  # cross-entropy runs in fp32

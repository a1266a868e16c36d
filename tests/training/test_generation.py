"""Answers to the prompts of a split: the same alone and in batches, and scored against all references."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from tests.data.ragged import make_ragged
from tests.tiny_tokenizer import load_tokenizer
from torchmetrics.functional.text import sacre_bleu_score

from lorasweep.config.compose import compose_run
from lorasweep.data.examples import CompletionSplit
from lorasweep.data.split import IGNORED
from lorasweep.errors import ConfigError
from lorasweep.training.score import gather_references, generate, score_answers

SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
PROMPTS = [b"name: a", b"b", b"name: a", b"a longer prompt"]
ANSWERS = [b"yes it is", b"no", b"yes", b"one two three"]


@pytest.fixture
def inputs():
    return SimpleNamespace(
        base=SimpleNamespace(tokenizer=load_tokenizer()), autocast=lambda config: contextlib.nullcontext()
    )


@pytest.fixture
def config():
    return compose_run({"trainer.device": "cpu", "trainer.eval_batch_size": 3})


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_attention_heads=2))
    model.config.use_cache = False
    return model.eval()


def completion_split(answers):
    rows = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    targets = [[*[IGNORED] * (len(prompt) - 1), *answer, 256] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    shared = {"name": "test", "fingerprint": "0", "pad_token": 0, "bytes": 1, "scored_bytes": 1}
    return CompletionSplit(tokens=make_ragged(rows), targets=make_ragged(targets), **shared)


def test_rows_of_one_prompt_are_its_references():
    found = gather_references(completion_split(ANSWERS))
    assert [bytes(prompt) for prompt in found] == [b"name: a", b"b", b"a longer prompt"]
    assert [bytes(answer[:-1]) for answer in found[tuple(b"name: a")]] == [b"yes it is", b"yes"]


def test_answers_in_a_batch_are_those_alone(llama, inputs, config):
    prompts = [tuple(prompt) for prompt in dict.fromkeys(PROMPTS)]
    settings = {"max_tokens": 8, "split": completion_split(ANSWERS), "config": config, "inputs": inputs}
    together = generate(llama, prompts, **settings)
    assert together == [generate(llama, [prompt], **settings)[0] for prompt in prompts]
    assert all(0 < len(answer) <= 8 for answer in together)


def test_the_score_is_corpus_bleu_over_all_references(llama, inputs, config):
    split = completion_split(ANSWERS)
    scores = score_answers(llama, split, config=config, inputs=inputs)
    assert set(scores) == {"bleu", "rouge1", "rouge2", "rougeL"}
    texts = [[b"yes it is", b"yes"], [b"no"], [b"one two three"]]
    made = generate(
        llama,
        [tuple(p) for p in dict.fromkeys(PROMPTS)],
        max_tokens=int(1.5 * (len(b"one two three") + 1)),
        split=split,
        config=config,
        inputs=inputs,
    )
    answers = [inputs.base.tokenizer.decode(row, skip_special_tokens=True).strip() for row in made]
    expected = sacre_bleu_score(answers, [[text.decode() for text in given] for given in texts])
    assert scores["bleu"] == pytest.approx(100 * expected.item())


def test_several_answers_in_a_row_are_refused():
    split = completion_split(ANSWERS)
    split.targets.values[-2] = IGNORED
    with pytest.raises(ConfigError, match=r"`data.generate`"):
        gather_references(split)


def test_a_model_that_cannot_generate_is_refused(inputs, config):
    with pytest.raises(ConfigError, match=r"`data.generate`"):
        score_answers(torch.nn.Linear(2, 2), completion_split(ANSWERS), config=config, inputs=inputs)

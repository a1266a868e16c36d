"""Generated answers are those of a server, the same from a pack and alone, and a score that fails loses nothing."""

import csv
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.word_chats import compute_answer_logits, find_margin, make_word_chats

from lorasweep.config.compose import compose_run
from lorasweep.config.data import AnswersConfig, AnswerScore
from lorasweep.errors import ConfigError
from lorasweep.methods import copy_sharing_weights
from lorasweep.record import ANSWERS_FILE, TEST_SCORES_FILE, read_run
from lorasweep.training.finished_run import restore_model, score_run, write_base_answers
from lorasweep.training.generation import build_score, check_answers, score_answers
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone

ROUNDING = 1e-3
"""Bound of the difference of two logits of the tiny Llama in fp32, from batches of other shapes. Each of its 15
products adds up at most 64 terms of size at most 10, so 15 * 64 * 10 * eps = 1.1e-3 if no errors cancel."""

FUNCTIONS = """
def raise_it(answer, reference, example):
    raise KeyError("no such thing")

def nan(answer, reference, example):
    return float("nan")

def text(answer, reference, example):
    return "3"

def number(answer, reference, example, *, plus=0):
    return example["number"] + plus

def fail_for_others(answer, reference, example):
    return 1 / (answer == reference)
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "own_scores.py").write_text(FUNCTIONS)
    sys.path.append(str(folder))
    yield make_word_chats(folder)
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def make(settings):
    """Returns the configuration and the inputs of a run."""

    def make(**more):
        config = compose_run({**settings, **{key.replace("__", "."): value for key, value in more.items()}})
        return config, load_inputs(config)

    return make


def read_answers(folder, split="test"):
    with (folder / ANSWERS_FILE.format(split)).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """The folder of a run of full fine-tuning, which learned to end its answers, and some of the answers."""
    folder = tmp_path_factory.mktemp("trained")
    steps = {"trainer__max_steps": 60, "trainer__eval_every_steps": 60}
    config, inputs = make(method="full", data__answers__on_validation=True, **steps)
    train_alone(config, RunFolder(path=folder), inputs=inputs)
    score_run(folder, inputs=inputs)
    return folder


def test_answers_are_those_of_a_server_that_gets_the_messages(make, trained):
    config, inputs = make(method="full")
    model, tokenizer = restore_model(config, inputs.base, folder=trained / "best"), inputs.base.tokenizer
    # a model's own settings of generation must not change greedy answers
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 9.0, True
    found = score_answers(model, inputs.splits.test(), config=config, inputs=inputs)
    lines = list(csv.DictReader(found.lines.splitlines()))
    assert len({len(line["prompt"]) for line in lines}) > 3  # prompts of other lengths stand in one batch
    plain = restore_model(config, inputs.base, folder=trained / "best")
    end = tokenizer.convert_tokens_to_ids("<end>")
    num_cut_off = num_close = 0
    for line in lines:
        # rounding may decide between two words, or a word and the end, that are almost equally probable
        is_close = find_margin(compute_answer_logits(plain.eval(), tokenizer, line)) < 2 * ROUNDING
        num_close += is_close
        words = line["prompt"].removeprefix("<user> ").removesuffix(" <end> <bot>")
        assert line["reference"] == words.split()[-1]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = plain.generate(**ids, do_sample=False, max_new_tokens=4, eos_token_id=[2, end], pad_token_id=0)
        answer = output[0, ids["input_ids"].shape[1] :].tolist()  # one prompt alone: its logits differ in rounding
        num_cut_off += end not in answer and 2 not in answer
        assert line["answer"] == tokenizer.decode(answer, skip_special_tokens=True) or is_close
        assert float(line["score"]) == (line["answer"] == line["reference"])
    assert num_close < len(lines) / 4
    assert found.facts["cut_off"] == pytest.approx(num_cut_off, abs=num_close)
    assert found.facts == {"examples": len(lines), "cut_off": found.facts["cut_off"], "left_out": 0}
    mean = sum(float(line["score"]) for line in lines) / len(lines)
    assert found.values == {"exact_match": pytest.approx(mean)}
    assert 0 < mean < 1


def test_answers_end_at_the_end_of_the_turn_or_are_counted_as_cut_off(make, trained):
    config, inputs = make(method="full", data__answers__max_new_tokens=1)
    model = restore_model(config, inputs.base, folder=trained / "best")
    found = score_answers(model, inputs.splits.test(), config=config, inputs=inputs)
    answers = [line["answer"] for line in csv.DictReader(found.lines.splitlines())]
    assert found.facts["cut_off"] == sum(map(bool, answers)) > 0  # one word, whose end would be the second token
    record = read_run(trained)
    assert record.answers["test"]["cut_off"] < record.answers["test"]["examples"]


def test_a_run_keeps_answers_of_test_data_and_of_validation_only_if_asked(make, trained, tmp_path):
    record = read_run(trained)
    assert {"exact_match", "bits_per_byte"} <= record.test.keys() & record.best.keys()
    assert {"validation_answers.csv", "test_answers.csv", TEST_SCORES_FILE} <= record.files.keys()
    assert len(read_answers(trained, "validation")) == record.answers["validation"]["examples"] > 0
    config, inputs = make(method="frozen")
    record = train_alone(config, RunFolder(path=tmp_path), inputs=inputs)
    assert "exact_match" not in record.best
    assert score_run(tmp_path, inputs=inputs).answers.keys() == {"test"}
    write_base_answers(tmp_path, config, inputs=inputs)
    assert read_answers(tmp_path, "base") == read_answers(tmp_path)


@pytest.mark.parametrize("function", ["raise_it", "nan", "text", "gone"])
def test_a_score_that_fails_is_a_sentence_before_the_sweep(make, function):
    config, inputs = make(data__answers__score={"_target_": f"own_scores.{function}"})
    with pytest.raises(ConfigError, match=r"`data\.answers\.score") as caught:
        check_answers(config, inputs.splits.test(), inputs=inputs)
    assert function in str(caught.value)


def test_a_score_that_fails_later_loses_neither_weights_nor_answers_nor_the_other_score(make, tmp_path):
    config, inputs = make(method="frozen", data__answers__score={"_target_": "own_scores.fail_for_others"})
    check_answers(config, inputs.splits.test(), inputs=inputs)
    train_alone(config, RunFolder(path=tmp_path), inputs=inputs)
    record = score_run(tmp_path, inputs=inputs)
    assert record.test.keys() == {"bits_per_byte", "loss", "perplexity"}
    problem = record.answers["test"]["problem"]
    assert [word for word in ("ZeroDivisionError", "`fail_for_others`", "'prompt': 'w") if word not in problem] == []
    lines = read_answers(tmp_path)
    assert len(lines) == record.answers["test"]["examples"]
    assert {line["score"] for line in lines} == {""}


def test_a_function_gets_the_row_of_the_table_and_its_own_arguments(make):
    config, inputs = make(data__answers__score={"_target_": "own_scores.number", "plus": 1, "direction": "minimize"})
    found = score_answers(copy_sharing_weights(inputs.base.model), inputs.splits.test(), config=config, inputs=inputs)
    split = inputs.splits.test()
    lines = list(csv.DictReader(found.lines.splitlines()))
    assert [float(line["score"]) for line in lines] == [
        split.answers.table_rows[int(line["row"])]["number"] + 1 for line in lines
    ]
    assert config.data.answers.metric.direction == "minimize"
    assert split.answers.table_rows[0].keys() == {"prompt", "completion", "number"}


def test_a_limit_is_spread_over_prompts_and_cut_examples_are_left_out(make):
    config, inputs = make(data__answers__max_examples=10, data__max_length=11)
    split = inputs.splits.test()
    found = score_answers(copy_sharing_weights(inputs.base.model), split, config=config, inputs=inputs)
    lines = list(csv.DictReader(found.lines.splitlines()))
    prompts = Counter(line["group"] for line in lines)
    assert sum(prompts.values()) == 10
    assert max(prompts.values()) == 1 < len(set(split.groups))
    assert found.facts["left_out"] == 0
    config, inputs = make(data__max_length=6)  # of the tokens before the last one
    split = inputs.splits.test()
    found = score_answers(copy_sharing_weights(inputs.base.model), split, config=config, inputs=inputs)
    assert 0 < found.facts["left_out"] < len(split)
    words = [len(line["prompt"].split()) for line in csv.DictReader(found.lines.splitlines())]
    assert max(words) == 5  # <user>, two words, <end> and <bot>


@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        ("exact_match", " Paris,\n France ", "Paris, France", 1),
        ("exact_match", "paris", "Paris", 0),
        ("last_number", "2 + 3 makes 1,205.0 apples.", "#### 1205", 1),
        ("last_number", "-7", "7", 0),
        ("last_number", "none", "7", 0),
    ],
)
def test_built_in_scores(name, answer, reference, score):
    assert build_score(AnswersConfig(score=name))(answer, reference, None) == score


def test_the_guides_sentence_bleu_uses_the_references_of_the_row(tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    guide = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text(encoding="utf-8")
    (code,) = re.findall(r'```python title="my_scores.py"\n(.*?)```', guide, flags=re.DOTALL)
    (tmp_path / "my_scores.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    score = build_score(AnswersConfig(score=AnswerScore(target="my_scores.bleu")))
    answer = "The Punter is a pub near the river ."
    assert score(answer, answer, {}) == pytest.approx(100)
    assert score(answer, "Visit Zizzi .", {}) < 10
    assert score(answer, "Visit Zizzi .", {"references": ["Visit Zizzi .", answer]}) == pytest.approx(100)


def test_a_reference_without_a_number_is_named(make):
    with pytest.raises(ConfigError, match="`last_number` raised ValueError: the reference has no number"):
        build_score(AnswersConfig(score="last_number"))("7", "seven", None)
    config, inputs = make(data__answers__score="last_number")
    check_answers(config, inputs.splits.test(), inputs=inputs)  # each word has one

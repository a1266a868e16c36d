"""Rows become token ids once: the same ids come from the cache."""

import pytest
from tests.tiny_tokenizer import END_OF_TEXT, load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

import lorasweep.tasks.text.rows as text_rows
from lorasweep.data.source import collect_examples
from lorasweep.data.tokenise import cache_key
from lorasweep.tasks.table.read import LabelledText
from lorasweep.tasks.table.rows import tokenise_labelled
from lorasweep.tasks.text.read import Document
from lorasweep.tasks.text.rows import tokenise_documents


@pytest.fixture
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    return tmp_path


def rows(ragged):
    return [ragged[n].tolist() for n in range(len(ragged))]


def tokenise_text(tokenizer, *texts):
    examples = collect_examples("train", [Document(str(n), text) for n, text in enumerate(texts)])
    return tokenise_documents(examples, tokenizer=tokenizer)


def test_texts_are_followed_by_their_end(tokenizer):
    made = tokenise_text(tokenizer, "ab", "ü", "")
    assert rows(made) == [[97, 98, END_OF_TEXT], [*"ü".encode(), END_OF_TEXT], [END_OF_TEXT]]
    spelled = tokenise_text(tokenizer, "<|endoftext|>")
    assert rows(spelled) == [[*b"<|endoftext|>", END_OF_TEXT]]


def test_the_same_rows_come_from_the_cache_and_one_that_cant_be_written_costs_only_time(
    tokenizer, tmp_path, own_cache, monkeypatch
):
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
        assert rows(tokenise_text(tokenizer, "ab")) == [[97, 98, END_OF_TEXT]]
    made = tokenise_text(tokenizer, "ab", "cde")

    def fail(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(text_rows, "tokenise_plain", fail)
    again = tokenise_text(tokenizer, "ab", "cde")
    assert rows(again) == rows(made)
    assert [path.suffix for path in (own_cache / "lorasweep").iterdir()] == [".safetensors"]


def test_the_key_changes_with_whatever_changes_the_ids(tokenizer):
    other = load_tokenizer()
    other.add_tokens(["abc"])
    templated = load_tokenizer()
    templated.chat_template = "{{ messages[0].content }}"
    lowercased = load_tokenizer()  # the same vocabulary, other ids
    lowercased.backend_tokenizer.normalizer = Lowercase()
    keys = {
        cache_key(tokenizer, "0", form="text"),
        cache_key(tokenizer, "1", form="text"),
        cache_key(tokenizer, "0", form="plain"),
        cache_key(tokenizer, "0", form="text", max_length=3),
        cache_key(other, "0", form="text"),
        cache_key(templated, "0", form="text"),
        cache_key(lowercased, "0", form="text"),
    }
    assert len(keys) == 7
    assert cache_key(load_tokenizer(), "0", form="text") in keys
    used = load_tokenizer()
    used("abc", truncation=True, max_length=2)  # the call leaves its truncation in the tokenizer
    assert cache_key(used, "0", form="text") in keys


def test_labelled_texts_are_cut_and_counted(tokenizer):
    examples = collect_examples("train", [LabelledText("abc", None, 0), LabelledText("abcdef", None, 1)])
    made = tokenise_labelled(examples, tokenizer=tokenizer, max_length=4)
    assert [len(row) for row in rows(made["input_ids"])] == [3, 4]
    assert rows(made["full_length"]) == [[3], [6]]


def test_pairs_are_told_apart_where_the_model_does():
    backend = Tokenizer(models.WordLevel({"[U]": 0, "[S]": 1, "a": 2, "b": 3}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A [S]", pair="$A [S] $B:1 [S]:1", special_tokens=[("[S]", 1)]
    )
    typed = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[U]")
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    examples = collect_examples("train", [LabelledText("a a", "b", 0)])
    made = tokenise_labelled(examples, tokenizer=typed, max_length=8)
    assert rows(made["input_ids"]) == [[2, 2, 1, 3, 1]]
    assert rows(made["token_type_ids"]) == [[0, 0, 0, 1, 1]]

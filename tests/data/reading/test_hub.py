"""A data set of the hub is read from a folder or the cache without network, and what can't be had is one sentence."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets.packaged_modules.parquet.parquet import Parquet

import lorasweep
from lorasweep.cli import run
from lorasweep.errors import ConfigError
from lorasweep.outcome import DONE, WRONG_REQUEST
from lorasweep.tasks.table.read import LabelledText

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
LABELLED = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def rows_of(*pairs, features=LABELLED):
    return Dataset.from_list([dict(zip(features, pair, strict=True)) for pair in pairs], features=features)


@pytest.fixture
def read_folder(folder, read):
    """Writes splits to a folder and reads them by `data.path`."""

    def write_and_read(name="table", train=None, **settings):
        splits = {key: settings.pop(key, train) for key in ("validation", "test")}
        for split, dataset in {"train": train, **splits}.items():
            (folder / "toy").mkdir(exist_ok=True)
            dataset.to_parquet(folder / "toy" / f"{split}.parquet")
        given = {"train": "train", "validation": "validation", "test": "test"}
        return read(name, {}, path="toy", **(given | settings))

    return write_and_read


@pytest.fixture
def fill_cache(folder, cache):
    """Puts a data set into the cache as if it had come from the hub."""

    def fill(repo, *, commit=COMMIT, subset="default", **splits):
        (folder / "downloaded").mkdir(exist_ok=True)
        files = {split: [str(folder / "downloaded" / f"{split}.parquet")] for split in splits}
        for split, dataset in splits.items():
            dataset.to_parquet(files[split][0])
        name = repo.split("/")[-1]
        builder = Parquet(dataset_name=name, config_name=subset, hash=commit, data_files=files)
        builder.download_and_prepare(str(cache / repo.replace("/", "___") / subset / "0.0.0" / commit))

    return fill


TRAIN = rows_of(("good", 0), ("bad", 1), ("fine", 0))


def test_folder_is_read_with_the_names_of_its_classes_in_their_order(read_folder):
    source = read_folder(train=TRAIN, validation=rows_of(("so", 1)), test=rows_of(("and so", 0)))
    assert (source.label_kind, source.label_names) == ("single_label", ("pos", "neg"))
    assert source.train.items == [
        LabelledText(*row) for row in (("good", None, 0), ("bad", None, 1), ("fine", None, 0))
    ]
    assert source.validation.items == [LabelledText("so", None, 1)]
    assert source.test().items == [LabelledText("and so", None, 0)]


def test_cache_is_used_for_the_commit_and_subset_that_it_has_and_no_other(read, fill_cache):
    fill_cache("owner/toy", subset="small", train=TRAIN, test=rows_of(("so", 1)))
    settings = {"path": "owner/toy", "subset": "small", "train": "train"}
    source = read("table", {}, test="test", **settings)
    assert len(source.train) + len(source.validation) == 3
    assert source.test().items == [LabelledText("so", None, 1)]
    assert read("table", {}, revision=COMMIT, **settings).label_kind == "single_label"
    with pytest.raises(ConfigError, match=r"`data\.revision`"):
        read("table", {}, revision=OTHER_COMMIT, **settings)
    with pytest.raises(ConfigError, match=r"`data\.subset`"):
        read("table", {}, **{**settings, "subset": "large"})


def test_new_names_the_splits_and_the_commit_of_a_data_set(folder, fill_cache, capsys):
    rows = rows_of(*((f"the text of number {number}", number % 2) for number in range(400)))
    fill_cache("owner/toy", train=rows, dev=rows.select(range(40)))
    words = ["new", "made.yaml", "--from", "owner/toy", "model.path=embedded:tiny"]
    assert run([*words, "trainer.max_steps=10"]) == DONE
    settings = yaml.safe_load((folder / "made.yaml").read_text())["settings"]
    named = {"path": "owner/toy", "train": "train", "validation": "dev", "revision": COMMIT, "label": "label"}
    assert {f"data.{key}": value for key, value in named.items()}.items() <= settings.items()
    assert "data.test" not in settings
    capsys.readouterr()
    assert run(["new", "other.yaml", "--from", "owner/other", "model.path=embedded:tiny"]) == WRONG_REQUEST
    error = capsys.readouterr().err
    assert (error.count("lorasweep: "), "'owner/other'" in error, "connection" in error) == (1, True, True)


@pytest.mark.slow  # a process of its own, because the clients read HF_ENDPOINT when they are imported
def test_a_hub_that_is_not_there_is_asked_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens, so connections are refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        words = ["new", "made.yaml", "--from", "owner/other", "model.path=embedded:tiny"]
        command = [sys.executable, "-m", "lorasweep", *words]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        source = str(Path(lorasweep.__file__).parents[1])
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "PYTHONPATH": source}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == WRONG_REQUEST, done.stderr
    assert done.stderr.count("lorasweep: ") == 1, done.stderr
    assert [word for word in ("'owner/other'", address, "connection") if word not in done.stderr] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "owner/toy"}, ["`data.path`", "'owner/toy'", "connection"]),
        ({"path": "empty"}, ["`data.path`", "'empty'"]),
        ({"subset": "small"}, ["'toy'", "default"]),
        ({"test": "tets"}, ["`data.test`", "'tets'", "'validation', 'test'"]),
        ({"label": "lable"}, ["`data.label`", "'toy, train'", "Did you mean `label`?"]),
    ],
)
def test_what_is_not_there_is_named(read_folder, read, folder, settings, words):
    read_folder(train=TRAIN)
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError) as raised:
        read("table", {}, **({"path": "toy", "train": "train"} | settings))
    assert [word for word in words if word not in str(raised.value)] == []


def test_rows_without_text_or_label_are_left_out_and_counted(read_folder):
    rows = rows_of(("good", 0), ("", 1), ("bad", 1), ("hidden", -1), (None, 0), ("fine", None), ("well", 1))
    source = read_folder(train=rows, validation=TRAIN, test=rows_of(("one", -1), ("two", -1)))
    assert [example.text for example in source.train.items] == ["good", "bad", "well"]
    assert any(note.startswith("4 of 7 rows of 'toy, train' are skipped") for note in source.notes)
    with pytest.raises(ConfigError, match="'toy, test' must have usable rows"):
        source.test()


def test_conversations_and_texts_of_a_hub_are_read(read_folder):
    features = Features({"messages": List({"role": Value("string"), "content": Value("string")})})
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    source = read_folder("chat", train=rows_of((said,), (said[:1],), features=features))
    assert [[m.texts for m in chat.messages] for chat in source.train.items] == [
        [("user", "hi"), ("assistant", "hello")]
    ]
    assert any(note.startswith("1 of 2 rows of 'toy, train' are skipped.") for note in source.notes)
    features = Features({"body": Value("string"), "year": Value("int64")})
    texts = rows_of(("one", 1), ("", 1), ("two", 2), ("three", None), features=features)
    source = read_folder("text", train=texts, text="body")
    assert [document.text for document in source.train.items] == ["one", "two", "three"]
    source = read_folder("text", train=texts, text="body", group="year")
    assert [(document.text, document.group) for document in source.train.items] == [("one", "1"), ("two", "2")]


GLUE = [(f"sentence {n}", f"other {n}", n % 2) for n in range(40)]
MRPC = Features(
    {"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=["not_eq", "eq"])}
)


def test_glue_validates_on_its_own_split_and_takes_the_test_split_from_train(read, fill_cache):
    train = rows_of(*GLUE, features=MRPC)
    fill_cache("nyu-mll/glue", subset="mrpc", train=train, validation=rows_of(*GLUE[:5], features=MRPC))
    source = read("glue_mrpc", {})
    assert source.label_names == ("not_eq", "eq")
    assert [item[:3] for item in source.validation.items] == GLUE[:5]
    test = source.test()
    assert 0 < len(test) < 20
    assert sorted(item[:3] for item in (*source.train.items, *test.items)) == sorted(GLUE)

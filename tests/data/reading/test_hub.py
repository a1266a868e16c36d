"""A data set of the hub is read from a folder or the cache without network, and what can't be had is one sentence."""

from __future__ import annotations

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi

from lorasweep.data.reading import hub
from lorasweep.errors import ConfigError

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
LABELLED = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def refuse(*args, **kwargs):
        raise ConnectionError("[Errno -2] Name or service not known\nand a second line")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    return tmp_path / "cache"


def rows_of(*pairs, features=LABELLED):
    return Dataset.from_list([dict(zip(features, pair, strict=True)) for pair in pairs], features=features)


@pytest.fixture
def write_splits(folder):
    def write(name, **splits):
        for split, dataset in splits.items():
            (folder / name).mkdir(exist_ok=True)
            dataset.to_parquet(folder / name / f"{split}.parquet")

    return write


@pytest.fixture
def fill_cache(write_splits, folder, cache):
    """Puts a data set into the cache as if it had come from the hub."""

    def fill(repo, *, commit=COMMIT, subset="default", **splits):
        write_splits("downloaded", **splits)
        files = {split: [str(folder / "downloaded" / f"{split}.parquet")] for split in splits}
        name = repo.split("/")[-1]
        builder = Parquet(dataset_name=name, config_name=subset, hash=commit, data_files=files)
        builder.download_and_prepare(str(cache / repo.replace("/", "___") / subset / "0.0.0" / commit))
        for file in (folder / "downloaded").iterdir():
            file.unlink()

    return fill


TRAIN = rows_of(("good", 0), ("bad", 1), ("fine", 0))


def test_folder_is_read_with_the_names_of_its_classes_in_their_order(read, write_splits):
    write_splits("toy", train=TRAIN, validation=rows_of(("so", 1)), test=rows_of(("and so", 0)))
    source = read("hub", {}, path="toy", validation="validation", test="test")
    assert (source.kind, source.label_names) == ("single_label", ("pos", "neg"))
    assert (source.train.texts, source.train.labels) == (["good", "bad", "fine"], [0, 1, 0])
    assert (source.validation.labels, source.test().labels) == ([1], [0])


def test_cache_is_used_without_asking_the_hub(read, fill_cache):
    fill_cache("owner/toy", train=TRAIN, test=rows_of(("so", 1)))
    source = read("hub", {}, path="owner/toy", test="test")
    assert len(source.train) + len(source.validation) == 3
    assert source.test().texts == ["so"]
    assert not datasets.config.HF_HUB_OFFLINE


def test_cache_is_used_for_the_commit_that_it_has_and_no_other(read, fill_cache):
    fill_cache("owner/toy", train=TRAIN)
    assert read("hub", {}, path="owner/toy", revision=COMMIT).kind == "single_label"
    for revision in (OTHER_COMMIT, "main"):
        with pytest.raises(
            ConfigError, match="the data set 'owner/toy' must be in the cache or on the hub, but can't be"
        ):
            read("hub", {}, path="owner/toy", revision=revision)


def test_subset_is_told_from_another_one_in_the_cache(read, fill_cache):
    fill_cache("owner/toy", subset="small", train=TRAIN)
    assert read("hub", {}, path="owner/toy", subset="small").kind == "single_label"
    with pytest.raises(ConfigError, match="the data set 'owner/toy' must be in the cache or on the hub"):
        read("hub", {}, path="owner/toy", subset="large")


def test_hub_is_asked_for_the_commit_and_then_loaded(read, write_splits, monkeypatch):
    write_splits("toy", train=TRAIN)
    asked = []

    def info(self, path, *, revision, timeout):
        asked.append((path, revision))
        return type("DatasetInfo", (), {"sha": COMMIT})

    def load(path, name, *, revision=None):
        asked.append((path, name, revision))
        if revision is None:
            raise ConnectionError("not in the cache")
        return datasets.load_dataset("toy")

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr(hub, "load_dataset", load)
    assert read("hub", {}, path="owner/toy", subset="small", revision="v1").kind == "single_label"
    assert asked == [("owner/toy", "small", None), ("owner/toy", "v1"), ("owner/toy", "small", COMMIT)]


def test_hub_is_not_asked_where_the_user_wants_no_network(read, fill_cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    fill_cache("owner/toy", train=TRAIN)
    assert read("hub", {}, path="owner/toy").kind == "single_label"
    assert datasets.config.HF_HUB_OFFLINE
    monkeypatch.delattr(HfApi, "dataset_info")
    with pytest.raises(ConfigError, match="'owner/other' must be in the cache while HF_HUB_OFFLINE or HF_"):
        read("hub", {}, path="owner/other")


def test_hub_that_is_not_reached_is_one_sentence(read):
    with pytest.raises(ConfigError) as raised:
        read("hub", {}, path="owner/toy")
    assert str(raised.value) == (
        "the data set 'owner/toy' must be in the cache or on the hub, but can't be loaded: [Errno -2] Name or service "
        "not known. Check its spelling and the connection, or use a local file by `data=table`, `chat` or `text`."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "empty"}, "`data.path` must be a folder that `datasets` can load, but 'empty' can't be: "),
        (
            {"path": "toy", "subset": "small"},
            "but 'toy' can't be: BuilderConfig 'small' not found. Available: .*default",
        ),
        ({"path": "toy", "revision": "main"}, "`data.revision` must be null for a folder, but got 'main'"),
        (
            {"path": "toy", "test": "tets"},
            r"`data.test` must be a split of 'toy', train, test, but got 'tets'. Did you",
        ),
        (
            {"path": "toy", "label": "lable"},
            r"`data.label` must be a column of 'toy, train', but got 'lable'. Did you mean",
        ),
    ],
)
def test_what_is_not_there_is_named(read, write_splits, folder, settings, message):
    (folder / "empty").mkdir()
    write_splits("toy", train=TRAIN, test=TRAIN)
    with pytest.raises(ConfigError, match=message):
        read("hub", {}, **settings)


def test_rows_without_text_or_label_are_left_out_and_counted(read, write_splits):
    rows = rows_of(("good", 0), ("", 1), ("bad", 1), ("hidden", -1), (None, 0), ("fine", None), ("well", 1))
    write_splits("toy", train=rows, validation=TRAIN, test=TRAIN)
    source = read("hub", {}, path="toy", validation="validation", test="test")
    assert source.train.texts == ["good", "bad", "well"]
    assert (
        "4 of 7 rows of 'toy, train' are left out. The first: row 2 of 'toy, train' must have a text in column 'text', "
        "but it is empty."
    ) in source.notes


def test_test_part_whose_labels_are_hidden_is_named(read, write_splits):
    write_splits("toy", train=TRAIN, validation=TRAIN, test=rows_of(("one", -1), ("two", -1)))
    source = read("hub", {}, path="toy", validation="validation", test="test")
    with pytest.raises(
        ConfigError, match="'toy, test' must have rows that can be used, but has none: row 1 of 'toy, test'"
    ):
        source.test()


def test_lists_of_classes_are_several_labels(read, write_splits):
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["z", "a"]))})
    rows = rows_of(("one", [0]), ("two", [0, 1]), ("three", []), features=features)
    write_splits("toy", train=rows, validation=rows, test=rows)
    source = read("hub", {}, path="toy", validation="validation", test="test")
    assert (source.kind, source.label_names, source.train.labels) == ("multi_label", ("z", "a"), [[0], [0, 1], []])


def test_conversations_of_a_hub_are_read(read, write_splits):
    features = Features({"messages": List({"role": Value("string"), "content": Value("string")})})
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = rows_of((said,), (said[:1],), features=features)
    write_splits("toy", train=rows, validation=rows, test=rows)
    source = read("hub", {}, path="toy", kind="chat", validation="validation", test="test", metric="loss")
    assert [[message.content for message in talk] for talk in source.train.conversations] == [["hi", "hello"]]
    assert any(note.startswith("1 of 2 rows of 'toy, train' are left out.") for note in source.notes)


def test_column_of_texts_is_read_as_documents(read, write_splits):
    features = Features({"body": Value("string")})
    rows = rows_of(("one",), ("",), ("three",), features=features)
    write_splits("toy", train=rows, validation=rows, test=rows)
    source = read("hub", {}, path="toy", kind="text", text="body", validation="validation", test="test")
    assert [(document.name, document.text) for document in source.train.documents] == [
        ("row 1", "one"),
        ("row 3", "three"),
    ]


GLUE = [(f"sentence {n}", f"other {n}", n % 2) for n in range(40)]
MRPC = Features(
    {"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=["not_eq", "eq"])}
)


def test_glue_halves_its_validation_part_and_says_so(read, fill_cache):
    rows = rows_of(*GLUE, features=MRPC)
    fill_cache("nyu-mll/glue", subset="mrpc", train=rows, validation=rows)
    source = read("glue", {}, task="mrpc")
    assert source.label_names == ("not_eq", "eq")
    halves = [
        set(zip(split.texts, split.pairs, split.labels, strict=True)) for split in (source.validation, source.test())
    ]
    assert halves[0].isdisjoint(halves[1])
    assert halves[0] | halves[1] == set(GLUE)
    assert min(map(len, halves)) > 10  # of 40: a hash halves them evenly but for chance
    note = "GLUE hides the labels of its test split: {} is {} of the 40 rows of its validation split, those whose texts"
    assert any(n.startswith(note.format("validation", len(halves[0]))) for n in source.notes)
    assert any(n.startswith(note.format("test", len(halves[1]))) for n in source.test().notes)


def test_glue_has_numbers_and_matched_validation_where_the_task_has(read, fill_cache):
    stsb = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": Value("float32")})
    rows = rows_of(*((a, b, n / 8) for n, (a, b, _) in enumerate(GLUE)), features=stsb)
    fill_cache("nyu-mll/glue", subset="stsb", train=rows, validation=rows)
    assert read("glue", {}, task="stsb").kind == "regression"
    mnli = Features(
        {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=["e", "n", "c"])}
    )
    rows = rows_of(*GLUE, features=mnli)
    fill_cache("nyu-mll/glue", subset="mnli", train=rows, validation_matched=rows, validation_mismatched=rows)
    source = read("glue", {}, task="mnli")
    assert source.train.pairs[0] == "other 0"
    assert any("of its validation_matched split" in note for note in source.notes)


def test_glue_that_can_not_be_had_is_one_sentence(read):
    with pytest.raises(ConfigError, match="the data set 'nyu-mll/glue' must be in the cache or on the hub, but can't"):
        read("glue", {})

"""Every `data=...` gives examples of its kind."""

from __future__ import annotations

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.data.read_source import read_source
from lorasweep.data.stdlib import read_docs


def test_embedded_text_comes_as_documents_in_its_own_splits():
    source = read_source(compose_run({"data": "stdlib_docs"}).data)
    assert (source.kind, source.label_names, source.notes) == ("documents", (), ())
    assert source.train.items == read_docs("train")
    assert source.validation.items == read_docs("validation")
    assert source.test().items == read_docs("test")
    assert source.test() is source.test()


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"data": "text", "data.train": "train.txt"}, "documents"),
        ({"data": "table", "data.train": "train.csv"}, "single_label"),
        (
            {"data": "chat", "data.train": "train.csv", "data.prompt": "text", "data.completion": "label"},
            "conversations",
        ),
        ({"data": "table", "data.path": "toy", "data.train": "train"}, "single_label"),
        ({"data": "text", "data.path": "toy", "data.train": "train"}, "documents"),
    ],
)
def test_few_overrides_are_enough(folder, monkeypatch, settings, kind):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    (folder / "toy").mkdir()
    for name in ("train.csv", "toy/train.csv"):
        (folder / name).write_text("text,label\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(20)))
    (folder / "train.txt").write_text("a line of text\n" * 50)
    source = read_source(compose_run(settings).data)
    assert source.kind == kind
    assert min(len(source.train), len(source.validation), len(source.test())) >= 1

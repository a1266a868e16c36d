"""Every `data=...` gives examples of its kind."""

from __future__ import annotations

from lorasweep.config.compose import compose_run
from lorasweep.data.reading import read_source
from lorasweep.data.stdlib import read_docs


def test_embedded_text_comes_as_documents_in_its_own_splits():
    source = read_source(compose_run({"data": "stdlib_docs"}).data)
    assert (source.kind, source.label_names, source.notes) == ("documents", (), ())
    assert source.train.items == list(read_docs("train"))
    assert source.validation.items == list(read_docs("validation"))
    assert source.test().items == list(read_docs("test"))
    assert source.test() is source.test()

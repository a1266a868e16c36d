"""The examples in the docstrings of the Python API print what they say."""

import doctest
import inspect

import pandas
import pytest
from tests.small_runs import MINI

import lorasweep

EXAMPLES = [
    example
    for name in lorasweep.__all__
    for example in doctest.DocTestFinder(exclude_empty=True).find(
        getattr(lorasweep, name), f"lorasweep.{name}", globs={"lorasweep": lorasweep, "pandas": pandas}
    )
    if example.examples
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which `outputs/tiny` is a sweep of two trials."""
    path = tmp_path_factory.mktemp("examples")
    space = {"method.rank": [1, 2], "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    arms = {"lora": {"settings": {"method": "lora"}, "space": space, "trials": 2}}
    lorasweep.run_sweep({**MINI, "arms": arms}, output=path / "outputs" / "tiny", progress=None)
    return path


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_prints_what_it_says(example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_what_trains_or_reads_has_an_example():
    named = {example.name for example in EXAMPLES}
    functions = {f"lorasweep.{name}" for name in lorasweep.__all__ if inspect.isfunction(getattr(lorasweep, name))}
    # the first needs a file of another tool, the second the user's module
    assert functions - named == {"lorasweep.export_recipe", "lorasweep.record_scores"}

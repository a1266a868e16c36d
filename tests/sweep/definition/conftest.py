"""A sweep file's content with overrides, as a definition."""

import pytest

from lorasweep.sweep.definition.arms import read_definition


@pytest.fixture
def read(write_file):
    return lambda content, *overrides: read_definition(write_file(content), overrides)

"""A sweep file's content with overrides, as a definition."""

import pytest

from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.overrides import SweepOverrides


@pytest.fixture
def read(write_file):
    return lambda content, *overrides: read_definition(write_file(content), SweepOverrides.parse(overrides))

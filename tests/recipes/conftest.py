"""Writes another tool's file and reads it."""

import pytest
import yaml

from lorasweep.recipes.read import read_recipe


@pytest.fixture
def read(here):
    """Reads a file of these values, or of this text; `changes` are further keys, `has_data` goes to the reader."""

    def read(values, *, name="theirs.yaml", has_data=False, **changes):
        path = here / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump({**values, **changes}))
        return read_recipe(path, has_data=has_data)

    return read

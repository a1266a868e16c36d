"""A server that isn't installed is a reason to skip, or a failure where servers are required."""

import pytest

from .daemon import REQUIRED, need

SENTENCE = "not installed: no-such-server. `apt-get install such-servers`"


@pytest.mark.parametrize(("setting", "outcome"), [("", pytest.skip.Exception), ("required", pytest.fail.Exception)])
def test_a_server_that_is_not_installed_is_named_with_its_package(monkeypatch, setting, outcome):
    monkeypatch.setenv(REQUIRED, setting)
    with pytest.raises(outcome) as caught:
        need(["sh", "no-such-server"], packages="such-servers")
    assert SENTENCE in str(caught.value)

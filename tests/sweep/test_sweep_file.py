"""A sweep's file is found by path or name; one that is not there is refused with the nearest name."""

from __future__ import annotations

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep import find_sweep_file


def test_a_sweep_is_found_by_path_or_name(write_file, content, tmp_path, monkeypatch):
    path = write_file(content)
    assert find_sweep_file(str(path)) == path
    assert find_sweep_file("quickstart").name == "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "quickstart.yaml").write_text("name: mine\n")
    assert find_sweep_file("quickstart") == tmp_path / "sweeps" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.yaml", "a sweep file must exist, but 'nothing.yaml' does not."),
        ("some/where", "a sweep file must exist, but 'some/where' does not."),
        ("quickstat", r"a sweep must be one of .*quickstart.*, but got 'quickstat'. Did you mean `quickstart`\?"),
    ],
)
def test_a_sweep_that_is_not_there_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_sweep_file(name)

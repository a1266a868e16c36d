"""Commands that start together in one folder have a folder each, and none of them touches another's files."""

import pytest
import yaml
from tests.small_runs import TWO_STEPS

from lorasweep.record import read_steps, read_sweep

pytestmark = pytest.mark.slow

WORDS = [f"{key}={value}" for key, value in TWO_STEPS.items()]
SWEEP = {
    "name": "mini",
    "settings": TWO_STEPS | {"worker.pack_size": 1, "confirm.seeds": 0},
    "arms": {"frozen": {"settings": {"method": "frozen"}}},
}


@pytest.fixture
def run_together(begin):
    """Starts `lorasweep` several times at once; returns the exit codes and all that was printed."""

    def run(*commands):
        sessions = [begin(*words) for words in commands]
        codes = [session.wait() for session in sessions]
        return codes, "\n".join(session.output for session in sessions)

    return run


def test_runs_and_sweeps_that_want_the_same_folder_get_it_once(tmp_path, run_together):
    codes, printed = run_together(*(["train", *WORDS, f"seed={seed}", "output=mine"] for seed in range(2)))
    assert sorted(codes) == [0, 2], printed
    assert printed.count("`output` must be") + printed.count("another one has 'mine' open") == 1
    assert [row["step"] for row in read_steps(tmp_path / "mine", having='"lr"')] == [1, 2]
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(SWEEP))
    (tmp_path / "empty").mkdir()
    codes, printed = run_together(*[["sweep", "mini.yaml", "sweep.output=empty"]] * 2)
    assert sorted(codes) == [0, 2], printed
    assert "Traceback" not in printed
    assert read_sweep(tmp_path / "empty").status == "complete"

"""A real sweep that is looked at: what is said of it while it runs, and when it is complete."""

import time

import pytest
import yaml
from tests.small_runs import rates

from lorasweep.cli import run
from lorasweep.sweep.status import count_ended, read_status

from .conftest import SETTINGS

SWEEP = {
    "name": "watched",
    "settings": SETTINGS | {"worker.pack_size": 1, "confirm.seeds": 2},
    "arms": {
        "lora": {
            "settings": {"method": "lora", "method.rank": 2},
            "space": {"optim.lr": rates(1e-3, 1e-1)},
            "trials": 3,
        },
    },
}
pytestmark = pytest.mark.slow


@pytest.mark.release
def test_a_sweep_that_is_looked_at_all_the_time_is_seen_to_go_on_and_ends_well(tmp_path, begin, capsys):
    (tmp_path / "watched.yaml").write_text(yaml.safe_dump(SWEEP))
    watched, folder = begin("sweep", "watched.yaml", "sweep.output=out"), tmp_path / "out"
    watched.wait_for((folder / "sweep.json").exists)
    seen = [read_status(folder)]  # each file read is whole, or this raises
    while seen[-1].record.status != "complete":
        time.sleep(0.02)
        seen.append(read_status(folder))
    assert watched.wait() == 0, watched.output
    arms = [status.arms[0] for status in seen]
    for runs in ([arm.trials for arm in arms], [arm.confirm for arm in arms]):
        assert [count_ended(some) for some in runs] == sorted(count_ended(some) for some in runs)
    assert max(run.state == "running" for arm in arms for run in (*arm.trials, *arm.confirm)) == 1
    assert (count_ended(arms[-1].trials), count_ended(arms[-1].confirm)) == (3, 2)

    assert run(["status", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "watched: bits_per_byte (minimize), complete" in shown
    assert "3/3" in shown
    assert "--resume" not in shown
    assert "Type `lorasweep compare" in " ".join(shown.split())

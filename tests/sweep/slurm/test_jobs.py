"""The arrays of a sweep are kept in its folder, and Slurm says which of their tasks have not ended."""

from __future__ import annotations

import pytest

from lorasweep.errors import RecordError
from lorasweep.sweep.slurm import note_array, read_arrays, read_queue


def test_arrays_come_back_in_order(tmp_path):
    assert read_arrays(tmp_path) == []
    note_array(tmp_path, job_id="77", num=8)
    note_array(tmp_path, job_id="90", num=2)
    assert [(array.job_id, array.num) for array in read_arrays(tmp_path)] == [("77", 8), ("90", 2)]


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"job_id": "7"}]', '[{"job_id": 7, "num": "x"}]', "[" * 10_000])
def test_a_damaged_list_is_refused(tmp_path, content):
    (tmp_path / "workers" / "slurm").mkdir(parents=True)
    (tmp_path / "workers" / "slurm" / "arrays.json").write_text(content)
    with pytest.raises(RecordError, match="must list the arrays of Slurm jobs of its sweep, but is damaged"):
        read_arrays(tmp_path)


def test_the_queue_holds_the_sweeps_own_tasks(tmp_path, fake_slurm):
    note_array(tmp_path, job_id="77", num=2)
    fake_slurm.says("squeue", "77|0|RUNNING|None|n1\n77|1|PENDING|BeginTime|\n91|N/A|RUNNING|None|n2\n")
    queue = read_queue(read_arrays(tmp_path))
    assert [(task.index, task.state, task.reason, task.nodes) for task in queue] == [
        ("0", "RUNNING", "None", "n1"),
        ("1", "PENDING", "BeginTime", ""),
    ]


def test_a_slurm_that_does_not_answer_is_not_an_empty_queue(tmp_path, fake_slurm):
    fake_slurm.says("squeue", error="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    assert read_queue(read_arrays(tmp_path)) is None

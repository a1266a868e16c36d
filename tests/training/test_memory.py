"""The memory that a machine has and that a forward pass keeps is counted."""

import pytest
import torch

from lorasweep.training.memory import cgroup_limits, count_saved_bytes, machine_memory_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("memberships", "files", "expected"),
    [
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": str(4 * GIB)}, [4 * GIB]),
        ("0::/job\n", {"job/memory.max": str(4 * GIB), "memory.max": str(2 * GIB)}, [4 * GIB, 2 * GIB]),
        ("0::/\n", {"memory.max": str(GIB)}, [GIB]),
        ("3:cpu,memory:/a\n2:pids:/a\n", {"memory/a/memory.limit_in_bytes": str(GIB)}, [GIB]),
        ("3:memory:/of/the/host\n", {"memory/memory.limit_in_bytes": str(GIB)}, [GIB]),
        ("0::/job\n", {}, []),
    ],
)
def test_limits_of_control_groups_and_of_those_above_them_are_read(tmp_path, memberships, files, expected):
    (tmp_path / "cgroup").write_text(memberships)
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text)
    assert list(cgroup_limits(memberships=tmp_path / "cgroup", mount=tmp_path / "mount")) == expected
    assert list(cgroup_limits(memberships=tmp_path / "missing", mount=tmp_path)) == []


def test_the_smaller_of_machine_and_control_group_counts(monkeypatch):
    whole = machine_memory_bytes(torch.device("cpu"))
    assert whole > 0
    monkeypatch.setattr("lorasweep.training.memory.cgroup_limits", lambda: iter([2 * whole, whole // 3]))
    assert machine_memory_bytes(torch.device("cpu")) == whole // 3


def test_each_storage_that_is_kept_counts_once_and_weights_do_not():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)

    def compute():
        y = layer(x)  # keeps x, (4, 8)
        return (y * y[:, :4].repeat(1, 2)).sum() + (y * y).sum()  # keeps y and the repeated half, (4, 8) each

    assert count_saved_bytes(compute, model=layer) == 3 * x.nbytes

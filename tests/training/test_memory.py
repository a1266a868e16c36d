"""The memory that a machine has free is read."""

from dataclasses import replace

import pytest

from lorasweep.errors import ConfigError
from lorasweep.models.attention import AttentionChoice
from lorasweep.record import read_run
from lorasweep.training.inputs import check_batch_memory
from lorasweep.training.memory import list_cgroup_free_bytes
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone

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
def test_what_is_left_of_control_groups_and_of_those_above_them_is_read(tmp_path, memberships, files, expected):
    (tmp_path / "cgroup").write_text(memberships)
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text)
        for used in ("memory.current", "memory.usage_in_bytes", "memory.stat"):
            (tmp_path / "mount" / name).with_name(used).write_text("0")
    assert list(list_cgroup_free_bytes(memberships=tmp_path / "cgroup", mount=tmp_path / "mount")) == expected
    assert list(list_cgroup_free_bytes(memberships=tmp_path / "missing", mount=tmp_path)) == []


@pytest.mark.parametrize(
    ("line", "limit", "used", "cached"),
    [
        ("0::/\n", "memory.max", "memory.current", "inactive_file"),
        ("3:memory:/\n", "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_what_a_control_group_uses_is_not_free_but_cached_files_are(tmp_path, line, limit, used, cached):
    (tmp_path / "cgroup").write_text(line)
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("1000")
    (tmp_path / used).write_text("700")
    (tmp_path / limit).with_name("memory.stat").write_text(f"anon 5\n{cached} 300\n")
    given = {"memberships": tmp_path / "cgroup", "mount": tmp_path}
    assert list(list_cgroup_free_bytes(**given)) == [600]


def test_the_attention_that_was_chosen_is_said_and_recorded(make_config, inputs, tmp_path):
    config, told = make_config({"method": "frozen"}), "Attention is eager: short."
    assert replace(inputs, attention=None).list_notes(config) == inputs.splits.notes
    chosen = replace(inputs, attention=AttentionChoice("eager", "short"))
    assert chosen.list_notes(config) == (*inputs.splits.notes, told)
    train_alone(config, RunFolder(path=tmp_path), inputs=chosen)
    assert told in read_run(tmp_path).notes


@pytest.mark.parametrize("accumulate", [1, 10**9])
def test_a_batch_larger_than_the_memory_is_refused_before_it_is_drawn(make_config, inputs, accumulate):
    config = make_config({"trainer.batch_size": 10**10, "trainer.accumulate": accumulate}).trainer
    with pytest.raises(ConfigError, match=r"`trainer\.batch_size` must fit the free memory .* 10000000000 examples"):
        check_batch_memory(config, inputs.splits.train)

"""What is wrong with a request for Slurm workers is said in one sentence, before anything is queued."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep.slurm import check_ranks, check_slurm
from lorasweep.sweep.slurm.check import local_place

HOST = socket.gethostname()

REFUSALS = [
    ("allocation failure: Invalid feature specification", {"constraint": "a100"}, "`worker.constraint` must be .* 'a1"),
    (
        "sbatch: error: invalid partition specified: x",
        {"partition": "gpu"},
        "`worker.partition` must be something that",
    ),
    (
        "allocation failure: Invalid account or account/partition combination specified",
        {"account": "lab"},
        "`worker.account` must be something that Slurm takes, but got 'lab': sbatch says 'Invalid account or",
    ),
    ("allocation failure: Invalid qos specification", {"qos": "high"}, "`worker.qos` .* but got 'high': sbatch says"),
    (
        "sbatch: unrecognized option '--blu=2'\nTry \"sbatch --help\" for more information",
        {"extra": {"blu": 2}},
        "`worker.extra` must be something that Slurm takes, but got .*: sbatch says .*unrecognized option",
    ),
    (
        "allocation failure: Requested node configuration is not available",
        {},
        "`worker` must be something that Slurm takes: sbatch says 'Requested node configuration is not available'",
    ),
    ("", {}, "`worker` must be something that Slurm takes: sbatch says 'nothing'"),
]


@pytest.fixture
def check(fake_slurm, workers, tmp_path):
    def run(*, storage="postgresql", sweep=tmp_path / "sweep", **settings):
        return check_slurm(workers(**settings), sweep, name="quickstart", storage=storage)

    return run


@pytest.mark.parametrize("missing", ["sbatch", "srun", "sinfo", "squeue"])
def test_a_machine_without_slurm_is_refused(check, fake_slurm, monkeypatch, missing):
    (fake_slurm.folder / missing).unlink()
    monkeypatch.setenv("PATH", str(fake_slurm.folder))
    with pytest.raises(ConfigError, match=f"must be typed on a machine with Slurm, but `{missing}` is not found. Log"):
        check()


def test_a_slurm_that_does_not_answer_is_refused(check, fake_slurm):
    fake_slurm.says("sinfo", error="slurm_load_partitions: Unable to contact slurm controller\n", code=1)
    with pytest.raises(ConfigError, match="Slurm must answer, but `sinfo` says: slurm_load_partitions: Unable to con"):
        check()


def test_a_cluster_without_a_machine_is_refused(check, fake_slurm):
    fake_slurm.says("sinfo")
    with pytest.raises(ConfigError, match="Slurm must have a partition with machines, but `sinfo` shows none"):
        check()


def test_a_cluster_without_a_default_partition_wants_one_named(check, fake_slurm):
    fake_slurm.says("sinfo", "gpu|64|512000|gpu:4|infinite|g1\nlong|64|512000|(null)|infinite|g1\n")
    with pytest.raises(ConfigError, match=r"`worker.partition` must be set, .* no default one: gpu, long."):
        check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "gpus"}, r"`worker.partition` must be one of gpu, long, main, but got 'gpus'. Did you mean `gp"),
        ({"partition": "main,no"}, "`worker.partition` must be one of gpu, long, main, but got 'no'"),
        (
            {"gpus": 1},
            "`worker.gpus <= 0` must hold in partition `main`, the GPUs of its largest machine, but got 1. Se",
        ),
        ({"gpus": 5, "partition": "gpu"}, "`worker.gpus <= 4` must hold in partition `gpu`, .* but got 5."),
        ({"cpus": 17}, "`worker.cpus <= 16` must hold in partition `main`, the processor cores of .*, but got 17."),
        ({"cpus": 5, "tasks_per_node": 4}, "`worker.cpus <= 4` must hold .*, for each of 4 ranks, but got 5."),
        ({"mem_gb": 100}, "`worker.mem_gb <= 62` must hold in partition `main`, .* but got 100.0."),
        ({"nodes": 3}, "`worker.nodes <= 2` must hold in partition `main`, the number of its machines, but got 3."),
        (
            {"time_min": 121},
            "`worker.time_min <= 120` must hold in partition `main`, the longest time of a job, but got",
        ),
    ],
)
def test_more_than_a_partition_has_is_refused(check, fake_slurm, settings, message):
    with pytest.raises(ConfigError, match=message):
        check(**{"time_min": 60, **settings})
    assert not [call for call in fake_slurm.calls if call.startswith("sbatch")]


@pytest.mark.parametrize(
    "settings",
    [
        {"time_min": 120},
        {"gpus": 4, "partition": "gpu"},
        {"partition": "main,gpu", "gpus": 4},
        {"partition": "long", "time_min": 100_000},
    ],
)
def test_what_a_partition_has_is_taken(check, fake_slurm, settings):
    check(**{"time_min": 60, **settings})
    assert [call for call in fake_slurm.calls if call.startswith("sbatch")] == ["sbatch --test-only"]


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        (
            {"qos": "hgh"},
            "normal\nhigh\n",
            r"`worker.qos` must be one of high, normal, but got 'hgh'. Did you mean `hi",
        ),
        ({"account": "labb"}, "lab\nlab\n", r"`worker.account` must be one of lab, but got 'labb'. Did you mean `lab`"),
    ],
)
def test_names_are_looked_up_where_the_cluster_keeps_accounts(check, fake_slurm, settings, names, message):
    fake_slurm.says("sacctmgr", names)
    with pytest.raises(ConfigError, match=message):
        check(time_min=60, **settings)


@pytest.mark.parametrize(("said", "settings", "message"), REFUSALS)
def test_what_slurm_itself_refuses_names_the_key(check, fake_slurm, said, settings, message):
    fake_slurm.says("sbatch", error=said + "\n", code=1)
    with pytest.raises(ConfigError, match=message):
        check(**{"time_min": 60, **settings})


def test_machines_that_are_busy_are_a_warning(check, fake_slurm):
    fake_slurm.says("sbatch", error="allocation failure: Required node not available (down, drained)\n", code=1)
    assert "Slurm can't start the workers now, they will wait in line: Required node" in check(time_min=60)[0]


def test_a_journal_is_refused_where_workers_may_be_on_other_machines(check, fake_slurm):
    with pytest.raises(ConfigError, match="`storage` must be postgresql or mysql for workers on several machines"):
        check(time_min=60, storage="journal")
    fake_slurm.says("sinfo", f"main*|16|64000|(null)|2:00:00|{HOST}\n")
    assert check(time_min=60, storage="journal") == []


@pytest.mark.parametrize("folder", ["/tmp/sweep", "/dev/shm/a/sweep", "/var/tmp/sweep"])
def test_a_folder_that_other_machines_do_not_have_is_a_warning(check, fake_slurm, folder):
    (warning,) = check(time_min=60, sweep=Path(folder))
    assert f"The sweep's folder '{folder}' is in `/" in warning
    assert "Set `sweep.output` to a folder that all machines share." in warning
    fake_slurm.says("sinfo", f"main*|16|64000|(null)|2:00:00|{HOST}\n")
    assert check(time_min=60, sweep=Path(folder)) == []


def test_a_folder_in_memory_is_in_a_place_of_one_machine(monkeypatch):
    mounts = "disk / ext4 rw 0 0\nfast /fast tmpfs rw 0 0\nshared /fast/shared nfs4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda path: mounts)
    assert local_place(Path("/fast/sweep")) == "`/fast`, a file system in memory (tmpfs)"
    assert local_place(Path("/fast/shared/sweep")) is None
    assert local_place(Path("/home/sweep")) is None


@pytest.mark.parametrize(
    ("settings", "trainer", "message"),
    [
        (
            {"tasks_per_node": 4},
            {},
            "`worker.tasks_per_node == trainer.devices` must hold, .* but got 4 and 1.",
        ),
        ({}, {"devices": 2}, "`worker.tasks_per_node == trainer.devices` must hold, .* but got 1 and 2."),
        ({"nodes": 2}, {"devices": "auto"}, "`worker.nodes == trainer.num_nodes` must hold, .* but got 2 and 1."),
    ],
)
def test_ranks_that_no_trial_is_spread_over_are_refused(workers, settings, trainer, message):
    with pytest.raises(ConfigError, match=message):
        check_ranks(
            workers(**settings), [SimpleNamespace(trainer=SimpleNamespace(**{"devices": 1, "num_nodes": 1} | trainer))]
        )


@pytest.mark.parametrize(
    ("settings", "trainer"),
    [
        ({}, {}),
        ({"tasks_per_node": 4}, {"devices": 4, "num_nodes": 1}),
        ({"tasks_per_node": 4, "nodes": 2}, {"devices": "auto", "num_nodes": 2}),
    ],
)
def test_ranks_that_trials_are_spread_over_are_taken(workers, settings, trainer):
    check_ranks(
        workers(**settings), [SimpleNamespace(trainer=SimpleNamespace(**{"devices": 1, "num_nodes": 1} | trainer))]
    )

"""A process knows its place among those that torchrun or srun launched with it, and itself alone otherwise."""

from __future__ import annotations

import pytest

from lorasweep.launch import Launch, describe_launch, first_host, meeting_point, read_launch

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_a_launched_process_knows_its_place(environment):
    found = read_launch(environment)
    assert found == Launch(rank=5, size=8, local_rank=1, num_nodes=2)
    assert found.local_size == 4


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}], ids=["shell", "batch script"])
def test_a_process_started_alone_is_alone(environment):
    assert read_launch(environment) == Launch()


def test_a_step_meets_on_its_first_node_at_a_port_of_its_own():
    host, port = meeting_point(SRUN)
    assert host == "gpu07"
    assert port != meeting_point(SRUN | {"SLURM_STEP_ID": "3"})[1]
    assert meeting_point(SRUN | {"SLURM_STEP_NUM_NODES": "1"})[0] == "127.0.0.1"
    assert meeting_point(SRUN | {"MASTER_ADDR": "other", "MASTER_PORT": "29500"}) == ("other", 29500)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[03-05,9],b", "n03"),
        ("n[7]", "n7"),
        ("a,n[1-2]", "a"),
        ("n[1-2].site,b", "n1.site"),
    ],
)
def test_the_first_host_of_a_list_in_slurms_notation(nodes, host):
    assert first_host(nodes) == host


def test_what_to_type_names_processes_and_nodes():
    assert describe_launch(devices=4, num_nodes=1) == "`torchrun --nproc-per-node 4 -m lorasweep ...`"
    several = describe_launch(devices=4, num_nodes=2)
    assert "srun --nodes 2 --ntasks-per-node 4" in several
    assert "torchrun --nnodes 2 --nproc-per-node 4" in several

"""Several processes train a run as one does, and end alike whatever happens to one: two real ones, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorasweep
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError, RanksLost, RunError
from lorasweep.launch import Launch
from lorasweep.record import read_run, read_steps
from lorasweep.training import RunPlace, build_workbench, share_bench, train_run
from lorasweep.training.ranks import Ranks, check_launch, require_ranks
from lorasweep.training.reproduce import config_as_run
from lorasweep.training.shard import check_shardable

CHILD = Path(__file__).parent / "ranks_child.py"
TIMEOUT_S = 240
ROUNDING = {"rel": 1e-5}
"""fp32: sums in another order, which Adam's first steps magnify where a gradient is near 0."""


def environment(folder):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    return kept | {
        "PYTHONPATH": str(Path(lorasweep.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }


def torchrun(folder, *words):
    """Runs two processes to their end, and returns what came of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(
        command, env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def seen(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def losses(run):
    return [row["loss"] for row in read_steps(run) if "loss" in row]


def scores(run):
    return [row["validation"] for row in read_steps(run) if "validation" in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of one process and of two, by every strategy."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "one").mkdir()
    alone = [sys.executable, str(CHILD), "train", str(folder / "one")]
    done = subprocess.run(alone, env=environment(folder), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    done = torchrun(folder, str(CHILD), "train", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What became of runs that ended early, on both ranks."""
    folder = tmp_path_factory.mktemp("ended")
    done = torchrun(folder, str(CHILD), "end", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


KINDS = [(method, strategy, n) for method in ("lora", "full") for strategy in ("ddp", "fsdp") for n in (1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "strategy", "accumulate"), KINDS)
def test_two_ranks_learn_what_one_process_does(trained, method, strategy, accumulate):
    """5 rows a step, in 3 micro-batches one of them of a single row; 5 rows of validation."""
    two, one = trained / f"{method}-{strategy}-{accumulate}", trained / "one" / f"{method}-auto-{accumulate}"
    assert losses(two) == pytest.approx(losses(one), **ROUNDING)
    assert len(losses(two)) == 4
    for found, expected in zip(scores(two), scores(one), strict=True):
        assert found == pytest.approx(expected, **ROUNDING)
    record, alone = read_run(two), read_run(one)
    assert (record.tokens_trained, record.trainable_params) == (alone.tokens_trained, alone.trainable_params)
    assert (record.status, record.best["step"]) == (alone.status, alone.best["step"])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "strategy", "accumulate"), KINDS)
def test_the_kept_weights_are_those_of_one_process(trained, method, strategy, accumulate):
    two, one = trained / f"{method}-{strategy}-{accumulate}", trained / "one" / f"{method}-auto-{accumulate}"
    for part in ("best", "last"):
        assert {path.name for path in (two / part).iterdir()} == {path.name for path in (one / part).iterdir()}
        (file,) = (two / part).glob("*.safetensors")
        found, expected = load_file(file), load_file(one / part / file.name)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            # Adam's first steps are lr whatever a gradient's size, so where it is nearly 0 its rounding shows
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_full_fine_tunings_weights_load_in_transformers(trained):
    model = AutoModelForCausalLM.from_pretrained(trained / "full-fsdp-1" / "best")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.slow
def test_the_base_is_left_as_it_is_and_one_rank_writes(trained):
    assert seen(trained, "base", 0) == seen(trained, "base", 1) == {"same": True}
    run = trained / "lora-ddp-1"
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert [row["step"] for row in read_steps(run) if "loss" in row] == [1, 2, 3, 4]
    assert not list(trained.rglob("*.tmp"))
    assert not list(run.glob("*.ckpt"))


@pytest.mark.slow
def test_what_the_first_rank_is_told_ends_all_at_one_step(ended):
    assert seen(ended, "end", 0) == seen(ended, "end", 1)
    assert seen(ended, "end")["paused"] == ["paused", 2, None]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_that_one_rank_was_asked_to_stop_goes_on_as_if_it_was_not(ended, strategy):
    """Stopped at step 3 with a checkpoint whose weights and moments are whole."""
    whole, stopped = ended / f"whole-{strategy}", ended / f"stopped-{strategy}"
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-6)
    assert len(losses(stopped)) == 6
    assert read_run(stopped).status == "complete"
    assert len(list(stopped.glob("events.out.tfevents.*"))) == 2  # two sessions


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_with_what_two_began(ended, strategy):
    folder = ended / f"moved-{strategy}"
    record = read_run(folder)
    assert (record.status, record.steps_done) == ("interrupted", 3)
    assert (record.platform["processes"], record.platform["strategy"]) == (2, strategy)
    config = config_as_run(record)
    record = train_run(config, RunPlace(folder=folder), bench=build_workbench(config), resume=True)
    assert (record.status, len(losses(folder))) == ("complete", 6)
    assert losses(folder) == pytest.approx(losses(ended / f"whole-{strategy}"), **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_out_of_memory_on_one_rank_halves_the_micro_batches_of_all(ended, strategy):
    assert seen(ended, "end")[f"memory-{strategy}"] == ["complete", 4, [1, 2]]
    assert read_run(ended / f"memory-{strategy}").batching["micro_batches"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_nan_on_one_rank_ends_all(ended, strategy):
    kind, message = seen(ended, "end", 1)[f"nan-{strategy}"]
    assert kind == "Diverged"
    assert "became NaN or infinite at step 1" in message
    assert read_run(ended / f"nan-{strategy}").status == "failed"


@pytest.mark.slow
def test_ranks_agree_and_fail_together_and_can_meet_again(tmp_path):
    """Launched as srun does: by its variables."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(2):
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        variables = environment(tmp_path) | step | {"MASTER_PORT": str(port)}
        command = [sys.executable, str(CHILD), "meet", str(tmp_path)]
        processes.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, errors
    for rank in range(2):
        found = seen(tmp_path, "meet", rank)
        assert (found["size"], found["broadcast"], found["gather"]) == (2, {"from": 0}, ["x", "xx"])
        assert found["any"] == [True, False]
        assert found["sum"] == [[[3, 3], [3, 3]], [2], [[2, 2, 2], [2, 2, 2]]]
    assert seen(tmp_path, "meet", 0)["errors"] == [
        ["LoraSweepError", "on purpose"],
        ["RunError", "rank 1 failed: KeyError: 'unforeseen'"],
    ]
    assert seen(tmp_path, "meet", 1)["errors"] == [["LoraSweepError", "on purpose"], ["KeyError", "'unforeseen'"]]


@pytest.mark.slow
def test_ranks_follow_the_first_through_the_runs_of_a_sweep(tmp_path):
    done = torchrun(tmp_path, str(CHILD), "follow", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert seen(tmp_path, "follow", 0) == {"ended": ["complete", "Diverged", "complete"]}
    assert seen(tmp_path, "follow", 1) == {"followed": 3}


@pytest.mark.slow
def test_a_run_whose_rank_was_killed_goes_on_from_its_checkpoint(tmp_path):
    done = torchrun(tmp_path, str(CHILD), "killed", str(tmp_path), "--die")
    assert done.returncode != 0
    assert read_run(tmp_path / "killed").status in ("running", "interrupted")
    assert list((tmp_path / "killed").glob("last-00000002-*.ckpt"))
    done = torchrun(tmp_path, str(CHILD), "killed", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert seen(tmp_path, "killed") == {"outcome": "complete"}
    assert [row["step"] for row in read_steps(tmp_path / "killed") if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_command_trains_on_two_ranks_and_one_of_them_speaks(tmp_path):
    words = [
        "trainer.max_steps=2",
        "trainer.eval_every_steps=2",
        "data.block_length=32",
        "data.max_validation_blocks=4",
    ]
    small = ["trainer.batch_size=4", "trainer.device=cpu", "trainer.precision=fp32", "output=run"]
    done = torchrun(tmp_path, "-m", "lorasweep", "train", *words, *small, "trainer.devices=2", "trainer.strategy=fsdp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits_per_byte") == 1
    assert read_run(tmp_path / "run").status == "complete"
    done = torchrun(tmp_path, "-m", "lorasweep", "train", *words, *small[:-1])
    assert done.returncode != 0
    assert done.stderr.count("lorasweep: `trainer.devices`") == 1
    assert not (tmp_path / "outputs").exists()


def trainer(**settings):
    return compose_run({f"trainer.{key}": value for key, value in settings.items()}).trainer


@pytest.mark.parametrize(
    ("settings", "launch", "message"),
    [
        (
            {"devices": 2},
            Launch(),
            r"launched on each node, 1, but got 2. Set it so, or launch with `torchrun --nproc-per",
        ),
        ({"devices": 3}, Launch(size=2), r"launched on each node, 2, but got 3"),
        (
            {"devices": 2, "num_nodes": 2},
            Launch(size=2),
            r"`trainer.num_nodes` must be the number of nodes .* 1, but got 2",
        ),
        ({"devices": 1}, Launch(size=2), r"launched on each node, 2, but got 1. Set it so"),
        ({"strategy": "ddp"}, Launch(), r"`trainer.strategy` must be auto for one process, but got 'ddp'"),
        (
            {"devices": "auto", "device": "cpu"},
            Launch(size=4096),
            r"`trainer.devices <= \d+` must hold, the number of proc",
        ),
    ],
)
def test_processes_that_were_not_launched_so_are_refused(settings, launch, message):
    with pytest.raises(ConfigError, match=message):
        check_launch(trainer(**settings), launch)


@pytest.mark.parametrize(
    ("settings", "launch"),
    [
        ({}, Launch()),
        ({"devices": "auto"}, Launch()),
        ({"devices": 2}, Launch(size=2)),
        ({"devices": "auto"}, Launch(size=2)),
    ],
)
def test_processes_that_were_launched_so_are_taken(settings, launch, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    check_launch(trainer(device="cpu", **settings), launch)


def test_a_run_for_several_processes_is_refused_in_one_that_joined_none():
    with pytest.raises(
        ConfigError, match=r"must be the number of processes of this run, 1, but is 2. Launch with `torchrun"
    ):
        require_ranks(trainer(devices=2))


def test_a_strategy_of_several_processes_is_refused_for_one():
    with pytest.raises(ConfigError, match=r"`trainer.strategy` must be auto for one process, but got 'fsdp'"):
        require_ranks(trainer(devices="auto", strategy="fsdp"))


def test_a_quantised_base_is_not_sharded():
    layer = torch.nn.Linear(2, 2)
    layer.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        ConfigError, match=r"must be ddp for a quantised base, but got 'fsdp', and weight is torch.uint8"
    ):
        check_shardable(layer)


class Gone:
    """A connection whose other side is gone."""

    def wait(self):
        raise RuntimeError("Connection closed by peer [somewhere]")


def test_a_rank_that_is_gone_is_said_in_a_sentence():
    with pytest.raises(RanksLost, match=r"must be there, but rank 0 waits for one that is gone \(Connection closed"):
        Ranks()._wait(Gone)


class Other(Ranks):
    """Two ranks, of which the other has something else."""

    def __init__(self):
        super().__init__()
        self.size = 2

    def barrier(self):
        pass

    def gather(self, value):
        return [value, {**value, "data.train": "0"}]


def test_different_data_on_ranks_is_refused(bench, monkeypatch):
    monkeypatch.setattr(Ranks, "_raise_first_error", raise_own)
    with pytest.raises(ConfigError, match=r"`data.train` must be the same for every process of a run, but rank 0 has"):
        share_bench(Other(), lambda: bench)


def raise_own(ranks, own):
    raise own


def test_one_process_alone_meets_nobody():
    ranks = Ranks()
    assert (ranks.broadcast("x"), ranks.gather("x"), ranks.any(True), ranks.any(False)) == ("x", ["x"], True, False)
    ranks.barrier()
    ranks.connect()
    assert not torch.distributed.is_initialized()
    with pytest.raises(RunError, match="its own"), ranks.together():
        raise RunError("its own")
    assert ranks.in_turn(lambda: 3) == 3
    ranks.leave()


def test_each_rank_has_a_dropout_stream_of_its_own():
    seeds = [Ranks(Launch(rank=rank, size=3)).seed_of(7) for rank in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3

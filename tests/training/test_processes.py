"""Several processes train a run as one does, and end alike whatever happens to one: two real ones, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.processes_child import SETTINGS, SIGNALS, SLOTS, VARIANTS, end_b
from tests.training.runs import train_together

import lorasweep
from lorasweep.config.compose import compose_run
from lorasweep.record import read_run, read_steps
from lorasweep.runs.reproduce import restore_solo_config
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
CHILD = Path(__file__).parent / "processes_child.py"
TIMEOUT_S = 480
ROUNDING = {"rel": 1e-5}
"""fp32: sums in another order, which Adam's first steps magnify where a gradient is near 0."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(folder, *words, **variables):
    """Runs Python to its end, and returns what came of it."""
    outer = ("SLURM_", "MASTER_", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    kept |= {
        "PYTHONPATH": str(Path(lorasweep.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        **variables,
    }
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=kept, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)


def run_child(folder, mode, *, launcher=()):
    done = start(folder, *launcher, CHILD, mode, folder)
    assert done.returncode == 0, done.stderr


def seen(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def losses(run):
    return [row["loss"] for row in read_steps(run) if "loss" in row]


def scores(run):
    return [row["validation"] for row in read_steps(run) if "validation" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Trains runs of one process, once each."""
    folder = tmp_path_factory.mktemp("alone")
    inputs = load_inputs(compose_run(SETTINGS))

    def train(name="lora-1", **settings):
        if not (folder / name).exists():
            config = compose_run(SETTINGS | {key.replace("__", "."): value for key, value in settings.items()})
            train_alone(config, RunFolder(path=folder / name), inputs=inputs)
        return folder / name

    return train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two processes that Lightning started: by each strategy, ended by a hook, stopped, signalled, diverged."""
    folder = tmp_path_factory.mktemp("processes")
    run_child(folder, "all")
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The pack of one process."""
    folder = tmp_path_factory.mktemp("pack")
    configs = {folder / name: compose_run(SETTINGS | VARIANTS["all-fsdp-1"] | own) for name, own in SLOTS.items()}
    inputs = load_inputs(compose_run(SETTINGS))
    train_together(configs, inputs=inputs, checkpoint_file=folder / "pack.ckpt", on_evaluation=end_b)
    return folder


def assert_equal_runs(two, one):
    assert losses(two) == pytest.approx(losses(one), **ROUNDING)
    for found, expected in zip(scores(two), scores(one), strict=True):
        assert found == pytest.approx(expected, **ROUNDING)
    record, single = read_run(two), read_run(one)
    for name in ("tokens_trained", "trainable_params", "status", "steps_done"):
        assert getattr(record, name) == getattr(single, name), name
    assert record.best == pytest.approx(single.best, **ROUNDING)
    if record.status == "complete":
        assert record.best not in (record.last, *scores(two))  # on all examples


def assert_equal_weights(two, one):
    assert {path.name for path in (two / "best").iterdir()} == {path.name for path in (one / "best").iterdir()}
    (file,) = (two / "best").glob("*.safetensors")
    found, expected = load_file(file), load_file(one / "best" / file.name)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        # Adam's first steps are lr whatever a gradient's size, so where it is nearly 0 its rounding shows
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_each_process_holds_its_share_and_the_first_alone_writes(trained, alone):
    record = read_run(alone())
    for rank in range(2):
        outcomes = seen(trained, "all", rank)
        assert outcomes["seen-lora-ddp-1"] == [2, record.total_params + record.trainable_params]
        size, held = outcomes["seen-lora-fsdp-3"]
        assert size == 2
        assert held == pytest.approx(record.total_params / 2 + record.trainable_params, rel=0.01)
        assert outcomes["base"]
    for name in ("lora-ddp-1", "lora-fsdp-3"):
        assert len(list((trained / name).glob("events.out.tfevents.*"))) == 1
        assert not list((trained / name).rglob("*.ckpt"))
    assert not list(trained.rglob("*.tmp"))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_learn_what_one_does(trained, alone, name):
    method, _, accumulate = name.split("-")
    two, one = trained / name, alone(f"{method}-{accumulate}", **VARIANTS[name])
    assert_equal_runs(two, one)
    assert_equal_weights(two, one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_pack_of_two_processes_learns_what_one_does(trained, pack, strategy):
    """It was stopped and resumed, and one of its runs ended before. The files have the weights of all slots whole."""
    for name in SLOTS:
        two, one = trained / f"pack-{strategy}" / name, pack / name
        assert_equal_runs(two, one)
        assert_equal_weights(two, one)
        assert read_run(two).status == ("stopped" if name == "b" else "complete")
    assert not list((trained / f"pack-{strategy}").rglob("*.ckpt"))


def test_what_the_first_process_is_told_ends_all_at_one_step(trained):
    first, second = (seen(trained, "all", rank) for rank in range(2))
    assert {k: v for k, v in first.items() if "seen" not in k} == {k: v for k, v in second.items() if "seen" not in k}
    assert first["ended"] == ["stopped", 2]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_that_one_process_was_asked_to_stop_goes_on_as_if_it_was_not(trained, strategy):
    """Stopped at step 3 with a checkpoint whose weights and moments are whole."""
    whole, stopped = trained / f"whole-{strategy}", trained / f"stopped-{strategy}"
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-6)
    assert len(losses(stopped)) == 6
    assert read_run(stopped).status == "complete"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_with_what_two_began(trained, strategy):
    folder = trained / f"moved-{strategy}"
    record = read_run(folder)
    assert (record.status, record.steps_done) == ("interrupted", 3)
    assert (record.platform["processes"], record.platform["strategy"]) == (2, strategy)
    config = restore_solo_config(record)
    record = train_alone(config, RunFolder(path=folder), inputs=load_inputs(config), resume=True)
    assert (record.status, record.steps_done) == ("complete", 6)
    assert losses(folder) == pytest.approx(losses(trained / f"whole-{strategy}"), **ROUNDING)


@pytest.mark.parametrize(("moment", "ranks"), SIGNALS)
def test_a_signal_ends_all_processes_at_one_step(trained, alone, moment, ranks):
    """Sent in the middle of a batch, to one process or to both in different batches; the run then goes on."""
    stopped = seen(trained, "all", 0)[f"{moment}-{ranks} stopped"]
    assert stopped == seen(trained, "all", 1)[f"{moment}-{ranks} stopped"]
    assert stopped[0] == "interrupted"
    assert 0 < stopped[1] < 4
    assert_equal_runs(trained / f"{moment}-{ranks}", alone())


def test_a_run_of_torchrun_resumes_after_one_process_was_killed(tmp_path, alone):
    assert start(tmp_path, *TORCHRUN, CHILD, "killed", tmp_path).returncode
    run_child(tmp_path, "killed", launcher=TORCHRUN)
    assert_equal_runs(tmp_path / "killed", alone())


def typed(*words):
    settings = {"trainer.devices": 2, **SETTINGS}
    return ["train", *(f"{key}={value}" for key, value in settings.items()), *words]


@pytest.mark.smoke
def test_the_command_starts_processes_and_resumes(tmp_path, alone):
    done = start(tmp_path, "-m", "lorasweep", *typed("output=run", "trainer.strategy=fsdp", "trainer.max_steps=4"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits_per_byte") == 1
    assert {path.name for path in tmp_path.iterdir()} - {"datasets"} == {"run"}  # no folder of the second process
    assert_equal_runs(tmp_path / "run", alone())


def test_a_step_of_srun_is_joined(tmp_path, alone):
    """Two processes with Slurm's variables, as srun starts them."""
    words = [sys.executable, "-m", "lorasweep", *typed("output=run", "trainer.strategy=ddp")]
    variables = {
        "SLURM_JOB_ID": str(10_000 + os.getpid() % 9_000),
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        **dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"), "2"),
        **dict.fromkeys(("SLURM_NNODES", "SLURM_STEP_NUM_NODES"), "1"),
        "PYTHONPATH": str(Path(lorasweep.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            words,
            cwd=tmp_path,
            env={**os.environ, **variables, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(process.communicate(timeout=TIMEOUT_S)[1], process.returncode) for process in ranks]
    assert [code for _, code in ended] == [0, 0], ended
    assert_equal_runs(tmp_path / "run", alone())

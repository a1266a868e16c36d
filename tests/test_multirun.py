"""`lorasweep sweep -m`: a sweep for each value of a setting, in one folder, which resumes as a whole."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from tests.small_runs import MINI

import lorasweep.sweep.workers.worker as worker_file
from lorasweep.cli import run
from lorasweep.outcome import DONE, WRONG_REQUEST
from lorasweep.record import list_sweeps, read_sweep
from lorasweep.training.loaded_parts import LoadedParts
from lorasweep.training.stop_signal import INTERRUPTED_EXIT_CODE


@pytest.fixture(autouse=True)
def _sweep_file(here):
    Path("mini.yaml").write_text(yaml.safe_dump(MINI, sort_keys=False))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "trainer.max_steps=2"], "-m` must make 2 to 100 sweeps"),
        (["-m", "trainer.max_steps=range(1,200)"], "-m` must make 2 to 100 sweeps"),
        (["-m", "trainer.max_steps=2,no"], "trainer.max_steps"),
        (["-m", "data.max_train_documents=5,0"], "data.max_train_documents"),
        (["-m", "data.max_train_documents=5,1", "--minutes", "3"], "--minutes"),
        (["-m", "data.max_train_documents=5,1", "--resume", "outputs/x"], "-m"),
        (["-m", "sweep.output=a,b"], "sweep.output"),
        (["-m", "data.metric=loss,bits_per_byte"], "one metric"),
        (["-m", "data.block_length=32,100000000"], "1-data.block_length-100000000: "),
    ],
)
def test_a_wrong_value_is_one_sentence_and_nothing_is_written(words, said, capsys):
    name = [] if "--resume" in words else ["mini.yaml"]
    assert run(["sweep", *name, *words]) == WRONG_REQUEST
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lorasweep: ")
    assert said in error
    assert {path.name for path in Path().iterdir()} == {"mini.yaml"}


@pytest.mark.slow
def test_a_group_of_sweeps_loads_once_resumes_after_an_interruption_and_is_compared(monkeypatch, capfd):
    loaded, true_load, true_run = [], LoadedParts.load_base, worker_file.train_run

    def load_base(self, *arguments, **others):
        loaded.append(id(self))
        return true_load(self, *arguments, **others)

    def interrupt_second(config, run_folder, **others):
        if "1-" in str(run_folder.path):
            os.kill(os.getpid(), signal.SIGINT)
        return true_run(config, run_folder, **others)

    monkeypatch.setattr(LoadedParts, "load_base", load_base)
    monkeypatch.setattr(worker_file, "train_run", interrupt_second)
    words = ["sweep", "mini.yaml", "-m", "data.max_train_documents=5,10,20"]
    assert run(words) == INTERRUPTED_EXIT_CODE
    assert "lorasweep sweep --resume outputs/mini\n" in capfd.readouterr().err
    assert len({*loaded}) == 1
    sweeps = list_sweeps(Path("outputs/mini"))
    assert [path.name for path in sweeps] == [f"{n}-data.max_train_documents-{d}" for n, d in enumerate((5, 10, 20))]
    assert [read_sweep(path).status for path in sweeps] == ["complete", "interrupted", "running"]
    assert run(["status", "outputs/mini"]) == DONE
    assert "Type `lorasweep sweep --resume outputs/mini` to" in capfd.readouterr().out.replace("\n", " ")
    assert run(["compare", "outputs/mini"]) == WRONG_REQUEST

    assert run(["sweep", "--resume", "outputs/mini", "--cfg", "job"]) == DONE
    assert capfd.readouterr().out.count("name: mini\n") == 3
    monkeypatch.setattr(worker_file, "train_run", true_run)
    finished = read_sweep(sweeps[0])
    assert run(["sweep", "--resume", "outputs/mini", "--json"]) == DONE
    found = json.loads(capfd.readouterr().out)
    assert list(found["differences"]) == ["data.max_train_documents"]
    assert [read_sweep(path).status for path in sweeps] == ["complete"] * 3
    assert read_sweep(sweeps[0]) == finished


@pytest.mark.slow
def test_a_plan_of_several_sweeps_counts_all(capfd):
    assert run(["plan", "mini.yaml", "-m", "trainer.max_steps=2,4", "--json"]) == DONE
    captured = capfd.readouterr()
    plans = json.loads(captured.out)["sweeps"]
    assert [plan["name"] for plan in plans] == ["0-trainer.max_steps-2", "1-trainer.max_steps-4"]
    assert "All 2 sweeps" in captured.err

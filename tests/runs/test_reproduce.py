"""A run is repeated from its record: bit for bit here, and where it is not, the first step and the reason are named."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from tests.files import edit_json
from tests.seeds import needs_usual_seeds
from tests.training.runs import train_together

import lorasweep.runs.reproduce as reproduce_file
from lorasweep.cli import run as run_command
from lorasweep.errors import ConfigError, Diverged, RecordError
from lorasweep.record import RUN_FILE, STEPS_FILE, read_run, read_steps
from lorasweep.runs.reproduce import PACK_TOLERANCE, reproduce_run, restore_solo_config
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone


@pytest.fixture
def repeat(run, tmp_path):
    def act(**given):
        return reproduce_run(run, output=tmp_path / "again", **given)

    return act


@pytest.fixture(autouse=True)
def _inputs_of_the_tests(monkeypatch, inputs):
    """Spares loading model and data for each test; `test_another_process` and the command line's tests load them."""
    monkeypatch.setattr(reproduce_file, "load_inputs", lambda config: inputs)


def edit_step(run, step, name, value):
    rows = [json.loads(line) for line in (run / STEPS_FILE).read_text().splitlines()]
    for row in rows:
        if row["step"] == step and name in row:
            row[name] = value
    (run / STEPS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_repeated_bit_for_bit(run, repeat, tmp_path):
    found = repeat()
    assert (found.verdict, found.holds) == ("identical", True)
    assert str(tmp_path / "again") in found.description
    assert read_run(tmp_path / "again").files == read_run(run).files


def test_attention_that_was_chosen_is_restored(run):
    # another version may choose otherwise, and each implementation rounds otherwise
    record = read_run(run)
    config = {**record.config, "model": {**record.config["model"], "attention": "auto"}}
    chosen = {"attention": {"name": "eager", "reason": "the median example has 15 tokens"}}
    recorded = replace(record, config=config, batching={**record.batching, **chosen})
    assert restore_solo_config(recorded).model.attention == "eager"
    assert restore_solo_config(replace(recorded, batching={})).model.attention == "auto"


def change_losses(run):
    edit_step(run, 3, "loss", 1.0)
    edit_step(run, 4, "loss", -7.0)


def round_loss(run):
    loss = next(row["loss"] for row in read_steps(run) if row.get("step") == 2)
    edit_step(run, 2, "loss", loss * (1 + 1e-5))


def change_weights(run):
    edit_json(run / RUN_FILE, lambda raw: raw["files"]["best/adapter_model.safetensors"].update(sha256="0" * 64))


@pytest.mark.parametrize(
    ("change", "tolerance", "verdict", "said"),
    [
        (change_losses, None, "different", "first step 3: `loss` was 1.0 and is "),
        (change_weights, None, "different", "first weights in best/adapter_model.safetensors: `sha256` was "),
        (round_loss, None, "different", "first step 2: `loss` was "),
        (round_loss, 1e-4, "within tolerance", "step 2: `loss` was"),
    ],
)
def test_the_first_difference_above_the_tolerance_is_named(run, repeat, change, tolerance, verdict, said):
    change(run)
    found = repeat(tolerance=tolerance)
    assert found.verdict == verdict
    assert said in found.description
    assert len(found.description.splitlines()) <= 2  # no hardware, software or data differs


def test_every_other_difference_of_the_records_is_listed(run, repeat):
    def change(raw):
        raw["code"]["commit"] = "an older one"
        raw["packages"]["numpy"], raw["packages"]["torch"] = "0.1", "0.2"
        raw["platform"]["threads"] = 10**6
        raw["environment"]["OMP_NUM_THREADS"] = "99"
        raw["platform"]["cuda"] = "1.0"
        raw["base"]["fingerprint"] = "other"
        raw["data"]["train"]["fingerprint"] = "other"

    edit_json(run / RUN_FILE, change)
    edit_step(run, 1, "loss", 0.0)
    listed = [line.split("`")[1] for line in repeat().description.splitlines()[2:]]
    expected = ["data.train.fingerprint", "base.fingerprint", "packages.torch", "platform.threads", "platform.cuda"]
    assert {*listed} == {*expected, "environment.OMP_NUM_THREADS", "packages.numpy", "code.commit"}


def test_the_first_steps_are_those_of_the_whole_run_and_an_interrupted_repetition_says_nothing(
    repeat, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(reproduce_file.StopSignal, "__call__", lambda self: True)
        found = repeat()
    assert (found.verdict, found.holds) == ("interrupted", False)
    shutil.rmtree(tmp_path / "again")
    found = repeat(steps=3)
    assert found.description.startswith("identical: 3 steps ")
    assert read_run(found.folder).steps_done == 3


def test_a_run_that_diverged_diverges_again(make_config, inputs, tmp_path):
    run = tmp_path / "diverged"
    config = make_config({"optim.lr": 1e30, "optim.clip_norm": None})
    with pytest.raises(Diverged, match="NaN or infinite"):
        train_alone(config, RunFolder(path=run), inputs=inputs)
    found = reproduce_run(run, output=tmp_path / "again")
    assert found.verdict == "identical"
    assert read_run(found.folder).status == "failed"


def test_a_run_of_a_pack_is_repeated_alone_within_the_tolerance_of_rounding(make_config, inputs, tmp_path):
    jobs = {tmp_path / f"slot-{rank}": make_config({"method.rank": rank}) for rank in (1, 4)}
    train_together(jobs, inputs=inputs, checkpoint_file=tmp_path / "pack.ckpt")
    found = reproduce_run(tmp_path / "slot-4", output=tmp_path / "again")
    assert PACK_TOLERANCE["fp32"] == 1e-4
    assert "of 0.0001: 4 steps" in found.description or "identical: 4 steps" in found.description


def change_record(change):
    return lambda run: edit_json(run / RUN_FILE, change)


def change_log(name, value):
    return lambda run: edit_step(run, 2, name, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_record(lambda raw: raw["config"]["optim"].update(lr="fast")), "optim"),
        (change_record(lambda raw: raw["platform"].update(precision=["fp32"])), "precision"),
        (change_record(lambda raw: raw["config"]["model"].update(path="https://***@host")), "secrets"),
        (change_log("loss", {}), r"steps\.jsonl.* all 4 steps .* after step"),
        (change_log("validation", {"loss": {}}), r"steps\.jsonl.* all 4 steps .* after step"),
    ],
)
def test_a_damaged_record_or_log_is_refused_before_the_base_is_loaded(
    run, repeat, monkeypatch, tmp_path, damage, message
):
    monkeypatch.setattr(reproduce_file, "load_inputs", lambda config: pytest.fail("the base was loaded"))
    damage(run)
    with pytest.raises((RecordError, ConfigError), match=message):
        repeat()
    assert not (tmp_path / "again").exists()


@pytest.mark.release
@pytest.mark.slow
@needs_usual_seeds
def test_another_process_trains_the_same_bits(short_words, tmp_path, monkeypatch, capsys):
    """A fresh process trains from the command line, and this one repeats it."""
    command = [sys.executable, "-m", "lorasweep", "train", *short_words, "method.dropout=0.1", "output=one"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.undo()  # model and data are loaded again
    monkeypatch.chdir(tmp_path)
    assert run_command(["reproduce", "one"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("identical: 4 steps of one and outputs/reproduce/one")
    one, two = (tmp_path / name for name in ("one", "outputs/reproduce/one"))
    values = [[row | {"tokens_per_s": None} for row in read_steps(folder)] for folder in (one, two)]
    assert values[0] == values[1]
    assert read_run(one).files == read_run(two).files

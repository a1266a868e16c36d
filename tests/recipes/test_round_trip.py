"""Their file, `new --like`, a sweep, `export --into` their file: only the decided lines are other ones."""

import json

import pytest
import yaml

from lorasweep.cli import run

FILES = {
    "axolotl": """\
base_model: embedded:tiny
datasets: [{path: rows/train.jsonl, type: alpaca}]   # mine
adapter: lora
lora_r: 2
lora_alpha: 4   # twice the rank
lora_target_linear: true
sequence_len: 64

micro_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 4
warmup_steps: 1
learning_rate: 1e-3
bf16: false
""",
    "trl": """\
model_name_or_path: embedded:tiny
dataset_name: rows
use_peft: true
lora_r: "2"
lora_target_modules: [q_proj, v_proj]
max_length: 64
max_steps: 4
per_device_train_batch_size: 4
bf16: false
""",
    "llamafactory": """\
### model
model_name_or_path: embedded:tiny
stage: sft
### data
dataset: mine
dataset_dir: .
cutoff_len: 64
max_steps: 4
per_device_train_batch_size: 4
use_rslora: true
""",
}
DECIDED = {"lora_r", "lora_rank", "lora_alpha", "learning_rate"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "tool", ["axolotl", *(pytest.param(tool, marks=pytest.mark.release) for tool in ("trl", "llamafactory"))]
)
def test_a_round_trip_changes_the_decided_keys_alone(tool, here, capsys):
    (here / "rows").mkdir()
    names = ("prompt", "completion") if tool == "trl" else ("instruction", "output")
    pairs = [(f"What is {n} + 1?", f"It is {n + 1}.") for n in range(60)]
    rows = [{"input": "", **dict(zip(names, pair, strict=True))} for pair in pairs]
    (here / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows/train.jsonl"}}))
    theirs = here / "theirs.yaml"
    theirs.write_text(FILES[tool])
    assert run(["new", "mine.yaml", "--like", "theirs.yaml"]) == 0, capsys.readouterr().err
    short = ["sweep.trials=4", "confirm.seeds=1", "trainer.eval_every_steps=4", "sweep.output=out"]
    assert run(["sweep", "mine.yaml", *short]) == 0, capsys.readouterr().err
    assert run(["export", "out/present", "--format", tool, "--into", "theirs.yaml"]) == 0, capsys.readouterr().err
    assert theirs.read_text() == FILES[tool]  # what the user has
    was = yaml.safe_load(FILES[tool])
    assert run(["export", "out/lora", "--format", tool, "--into", "theirs.yaml"]) == 0, capsys.readouterr().err
    now = yaml.safe_load(theirs.read_text())
    assert {key: value for key, value in now.items() if key not in DECIDED} == {
        key: value for key, value in was.items() if key not in DECIDED
    }
    kept = [line for line in theirs.read_text().splitlines() if "# lorasweep: " not in line]
    assert [line for line in FILES[tool].splitlines() if line.split(":")[0] not in DECIDED] == [
        line for line in kept if line.split(":")[0] not in DECIDED
    ]
    assert float(now["learning_rate"]) > 0

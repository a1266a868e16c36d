"""`export --into` changes the lines of another tool's file that the sweep decided, and nothing else."""

import json
import os
import shutil

import pytest
import yaml
from tests.files import edit_json, set_values
from tests.report.conftest import build_rank_sweep, scatter_seeds

from lorasweep.cli import run
from lorasweep.config.build import as_settings
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.recipes.write import Change, edit_text
from lorasweep.report.facts import read_findings

FILES = {
    "axolotl": """\
# Tunes the toy model.
base_model: embedded:tiny

datasets:
  - path: mine.jsonl   # two columns
    type: alpaca
adapter: lora
lora_r: 32  # as everybody does
lora_alpha: 32
lora_target_linear: true

micro_batch_size: 4
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: linear
learning_rate: 2e-4 # a text for YAML 1.1
warmup_ratio: 0.06
wandb_project:
""",
    "trl": """\
---
model_name_or_path: "embedded:tiny"
dataset_name: mine
use_peft: true

lora_alpha: '32'
lora_r: "32"
lora_dropout: 0.0
per_device_train_batch_size: 16
warmup_steps: 0.06
learning_rate: 1.0e-4
# the end
""",
    "llamafactory": """\
### model
model_name_or_path: embedded:tiny

### method
stage: sft
finetuning_type: lora
lora_target: all

### train
dataset: mine
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: linear
warmup_ratio: 0.06
bf16: true
""",
}
DECIDED = {
    "axolotl": {"lora_r": ("32", 16), "lora_alpha": ("32", 16), "learning_rate": ("2e-4", 0.0102)},
    "trl": {
        "lora_r": ("32", 16),
        "lora_alpha": ("32", 16),
        "learning_rate": ("0.0001", 0.0102),
        "lora_target_modules": (None, "all-linear"),
    },
    "llamafactory": {"lora_rank": (None, 16), "lora_alpha": (None, 16), "learning_rate": ("0.0001", 0.0102)},
}
"""The value in the file, and the new one, of each key that changes."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_rank_sweep(tmp_path_factory.mktemp("built") / "s", {4: 1.72, 16: 1.6605, 64: 1.66}, noise=0.0002)


@pytest.fixture
def sweep(built, here):
    shutil.copytree(built, here / "s")
    return here / "s"


def export(tool, *words, source="s"):
    return run(["export", str(source), "--format", tool, "--into", "theirs.yaml", *words])


def write(text):
    with open("theirs.yaml", "w", encoding="utf-8", newline="") as file:
        file.write(text)


def read():
    with open("theirs.yaml", encoding="utf-8", newline="") as file:
        return file.read()


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("tool", FILES)
def test_only_decided_lines_change_and_each_says_why(sweep, capsys, tool, ending):
    before = FILES[tool].replace("\n", ending)
    write(before)
    assert export(tool) == 0
    shown, after = capsys.readouterr().out, read()
    assert after.count("\r") == after.count("\n") * (ending == "\r\n")
    kept = [line for line in after.splitlines() if "# lorasweep: " not in line]
    assert [line for line in before.splitlines() if line not in kept] == [
        line for line in before.splitlines() if line.split(":")[0] in DECIDED[tool]
    ]
    was, now = yaml.safe_load(before), yaml.safe_load(after)
    for key, (old, new) in DECIDED[tool].items():
        assert (now.pop(key), was.pop(key, None) is None) == (new, old is None)
        line = next(line for line in after.splitlines() if line.startswith(key))
        why = {"lora_r": "rank 16: 1", "lora_rank": "rank 16: 1", "learning_rate": "searched in "}
        expected = why.get(key, "as in the run, not searched")
        assert f"# lorasweep: {'new' if old is None else f'was {old}'}; {expected}" in line
        assert f"{key}: {new} (was {old or 'missing'})" in shown
    assert list(now.items()) == list(was.items())
    assert ("# as everybody does  # lorasweep" in after, "# a text for YAML 1.1  # lorasweep" in after) == (
        (tool == "axolotl",) * 2
    )
    assert (export(tool), read()) == (0, after)
    assert "no lines changed" in capsys.readouterr().out


def test_the_comment_of_a_former_export_is_replaced(sweep):
    write(FILES["axolotl"].replace("# as everybody does", "# mine  # lorasweep: was 8; old"))
    assert export("axolotl") == 0
    (line,) = [line for line in read().splitlines() if line.startswith("lora_r")]
    assert line.startswith("lora_r: 16 # mine  # lorasweep: was 32; rank 16: 1")


FORMS = {
    "flow mapping": "{base_model: x, lora_r: 32}",
    "anchor": "lora_r: &rank 32\nlora_rank_pattern: {a: 8}",
    "alias": "x: &rank 32\nlora_r: *rank",
    "tag": "lora_r: !!int 32",
    "next line": "lora_r:\n  32",
    "complex key": "? lora_r\n: 32",
    "null": "a: null\nlora_r: 32",
    "merged key": "x: &x {a: 1}\ny: {<<: *x, b: yes}\nlora_r: 32",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_key_in_another_form_is_written_and_nothing_else_changes(text):
    changes = [Change(key="lora_r", value=4), Change(key="learning_rate", value=1e-5)]
    edited, _ = edit_text(text, changes, name="theirs.yaml")
    assert yaml.safe_load(edited) == {**yaml.safe_load(text), "lora_r": 4, "learning_rate": 1e-5}


def test_a_key_that_is_there_twice_is_refused():
    with pytest.raises(ConfigError, match=r"theirs\.yaml.*each key once"):
        edit_text("lora_r: 32\nlora_r: 16", [Change(key="lora_r", value=4)], name="theirs.yaml")


DIFFERENT = {
    "base": ("base_model: embedded:tiny", "base_model: other/tiny-2", "`base_model` is other/tiny-2 there"),
    "batch": ("micro_batch_size: 4", "micro_batch_size: 1", "`trainer.batch_size` is 4"),
    "schedule": ("lr_scheduler: linear", "lr_scheduler: constant", "`lr_scheduler` is constant there and linear"),
    "schedule by default": ("lr_scheduler: linear\n", "", "`lr_scheduler` is cosine there"),
    "layers": ("lora_target_linear: true", "lora_target_modules: [q_proj, v_proj]", "`lora_target_modules`"),
    "dora": ("lora_r: 32", "peft_use_dora: true\nlora_r: 32", "`adapter` is peft there and lora"),
    "full": ("adapter: lora\n", "", "`adapter` is full there and lora in the run. Nothing"),
    "optimizer": ("optimizer: adamw_torch", "optimizer: sgd", "`optimizer` is torch.optim.SGD there and adamw"),
    "LoRA+": ("lora_r: 32", "loraplus_lr_ratio: 16\nlora_r: 32", "`loraplus_lr_ratio` is 16.0 there and 1.0"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_file_that_trains_in_another_way_is_refused(sweep, capsys, case):
    old, new, said = DIFFERENT[case]
    text = FILES["axolotl"].replace(old, new)
    write(text)
    assert export("axolotl") == 2
    message = capsys.readouterr().err
    assert said in message
    assert "lorasweep new mine.yaml --like theirs.yaml" in message
    assert read() == text


@pytest.mark.parametrize(("steps", "code"), [(74, 2), (76, 0), (299, 0), (301, 2)])
def test_a_file_is_written_if_its_steps_are_within_twice_those_of_the_run(sweep, capsys, steps, code):
    write(before := f"{FILES['axolotl']}lora_dropout: 0.1\nmax_steps: {steps}\n")
    assert export("axolotl") == code
    assert (f"is {steps} there and 150 in the run. Nothing" in capsys.readouterr().err) is (code == 2)
    assert (read() == before) is (code == 2)


def change_runs(sweep, settings, **values):
    """Gives the runs of the arm `lora` other settings, and fields of their record."""
    for path in sweep.glob("runs/lora*/run.json"):
        own = json.loads(path.read_text())["config"]
        given = {"method.rank": own["method"]["rank"], "optim.lr": own["optim"]["lr"], "method.alpha": 16}
        set_values(path, {"config": as_settings(compose_run({"method": "lora", **given, **settings})), **values})


SCALED = {
    "alpha_over_sqrt_rank": {"lora_alpha": 16, "peft_use_rslora": True},
    "alpha_over_rank": {"lora_alpha": 16},
    "alpha": {"lora_alpha": 256},  # the factor is α itself, which is 256/16 there
}


@pytest.mark.parametrize("rule", SCALED)
@pytest.mark.parametrize("theirs", [None, False, True])
def test_alpha_is_written_with_the_rule_that_gives_it_its_meaning(sweep, rule, theirs):
    change_runs(sweep, {"method.scaling": rule})
    write(FILES["axolotl"] + ("" if theirs is None else f"peft_use_rslora: {str(theirs).lower()}\n"))
    assert export("axolotl") == 0
    found = yaml.safe_load(read())
    assert found["lora_alpha"] == SCALED[rule]["lora_alpha"]
    assert found.get("peft_use_rslora", False) is SCALED[rule].get("peft_use_rslora", False)


def test_a_swept_key_is_written_and_one_without_a_line_there_is_named(sweep, capsys):
    def add(key, value):
        edit_json(sweep / "sweep.json", lambda raw: [one["params"].update({key: value}) for one in raw["settings"]])
        edit_json(sweep / "sweep.json", lambda raw: [arm["space"].update({key: [value]}) for arm in raw["arms"]])
        change_runs(sweep, {key: value})

    write(FILES["axolotl"])
    add("method.dropout", 0.1)
    assert export("axolotl") == 0
    assert "\nlora_dropout: 0.1 # lorasweep: new; " in read()
    add("trainer.batch_size", 8)
    assert export("axolotl") == 2
    assert "`trainer.batch_size=8` has none. Write it by hand" in capsys.readouterr().err


def test_an_alpha_that_is_not_whole_is_refused(sweep, capsys):
    change_runs(sweep, {"method.alpha": 11.3})
    write(FILES["axolotl"])
    assert export("axolotl") == 2
    assert "`method.alpha=11.3`" in capsys.readouterr().err
    assert read() == FILES["axolotl"]


def test_a_smaller_value_that_may_be_enough_is_told_in_the_comment(here):
    sweep = build_rank_sweep(here / "s", {4: 1.72, 16: 1.66, 64: 1.652})
    for rank in (16, 64):
        scatter_seeds(sweep, f"lora-rank-{rank}", 0.012)
    write(FILES["axolotl"])
    assert export("axolotl", source="s/lora") == 0
    assert "not settled: a smaller value may be enough" in read() or "(open)" in read()


def test_a_folder_of_one_run_is_written_too(sweep, capfd):
    write(FILES["axolotl"])
    assert export("axolotl", source="s/runs/lora-0008") == 0
    changed = [line for line in capfd.readouterr().out.splitlines() if "(was " in line]
    assert [(line.split(":")[0], line.split("(was ")[1]) for line in changed] == [
        ("lora_r", "32)"),
        ("lora_alpha", "32)"),
        ("learning_rate", "2e-4)"),
    ]
    assert "; one run, compared with no other" in read()
    set_values(sweep / "runs/lora-0008/run.json", {"status": "interrupted"})
    assert export("axolotl", source="s/runs/lora-0008") == 2
    assert "must be complete" in capfd.readouterr().err


WRONG = {
    "another tool": ("axolotl", FILES["trl"], "s", "is one of TRL"),
    "full fine-tuning": ("axolotl", FILES["axolotl"], "s/full", "`method=full`"),
    "no training": ("axolotl", FILES["axolotl"], "s/frozen", "a method that trains"),
    "no arm": ("axolotl", FILES["axolotl"], "s/lorra", "lora"),
    "no mapping": ("axolotl", "- 1", "s", "theirs.yaml"),
    "no YAML": ("axolotl", "a: [", "s", "theirs.yaml"),
    "code": ("axolotl", "base_model: !!python/name:os.system", "s", "theirs.yaml"),
    "not UTF-8": ("axolotl", FILES["axolotl"].encode("utf-16"), "s", "UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_or_arm_is_one_sentence(sweep, capsys, case):
    tool, text, source, said = WRONG[case]
    content = text if isinstance(text, bytes) else text.encode()
    (sweep.parent / "theirs.yaml").write_bytes(content)
    assert export(tool, source=source) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert (sweep.parent / "theirs.yaml").read_bytes() == content


@pytest.mark.parametrize(
    "words",
    [
        "--format axolotl --out new",
        "--format axolotl --into theirs.yaml --out new",
        "--format axolotl --into s",
    ],
)
def test_a_wrong_request_is_one_sentence_and_writes_nothing(sweep, capsys, words):
    write(FILES["axolotl"])
    assert run(["export", "s", *words.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lorasweep: ")
    assert read() == FILES["axolotl"]
    assert not (sweep.parent / "new").exists()


def test_the_file_keeps_its_mode_and_a_link(sweep):
    file, link = sweep.parent / "real.yaml", sweep.parent / "theirs.yaml"
    file.write_text(FILES["axolotl"])
    link.symlink_to(file)
    file.chmod(0o600)
    assert export("axolotl") == 0
    assert (link.is_symlink(), os.stat(file).st_mode & 0o777) == (True, 0o600)
    assert "lora_r: 16" in file.read_text()


def test_the_page_and_the_summary_have_the_lines_for_each_tool(sweep):
    *_, lora = read_findings(sweep).recommended
    assert lora.recipes["axolotl"]["lines"].splitlines() == [
        "lora_r: 16",
        "lora_alpha: 16",
        "peft_use_rslora: false",
        "learning_rate: 0.0102",
    ]
    assert lora.recipes["llamafactory"]["lines"].startswith("lora_rank: 16\n")
    assert lora.recipes["trl"]["command"] == f"lorasweep export {sweep}/lora-rank-16 --format trl --into FILE.yaml"

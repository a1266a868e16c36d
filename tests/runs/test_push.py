"""What is uploaded to the hub is the exported folder, with a card that says what the run's record knows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM

import lorasweep.runs.push as push_file
from lorasweep.cli import DONE, FAILED, WRONG_REQUEST, run
from lorasweep.config.compose import compose_run
from lorasweep.config.model import ModelConfig
from lorasweep.errors import ConfigError
from lorasweep.models.folder import find_local_path
from lorasweep.record import read_run, write_record
from lorasweep.runs.export import export_run
from lorasweep.runs.model_card import find_hub_base, name_base
from lorasweep.training.restore import restore_base, restore_config, restore_model
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT

TOKENS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))
# fp32, logits up to about 10: sums in another order, through 4 layers
LOGIT_TOLERANCE = 1e-4


class Hub:
    """Stands in for the hub: keeps what is uploaded in a folder, so that no test needs a network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.created, self.commits = folder, [], []
        self.error: Exception | None = None

    def whoami(self):
        if isinstance(self.error, LocalTokenNotFoundError):
            raise self.error
        return {"name": "me"}

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.created.append((repo_id, private))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error is not None:
            raise self.error
        self.commits.append(commit_message)
        shutil.copytree(folder_path, self.folder / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made_up = Hub(tmp_path / "hub")
    monkeypatch.setattr(push_file, "HfApi", lambda: made_up)
    return made_up


@pytest.fixture(scope="module")
def trained(make_config, inputs, tmp_path_factory):
    """The folder of a run that was trained and scored on test data."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train_run(make_config(), RunFolder(path=folder), inputs=inputs)
    record = read_run(folder)
    record.test = {record.metric: 3.25, "loss": None}
    write_record(record, folder)
    return folder


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(input_ids=TOKENS).logits


def own_logits(folder):
    record = read_run(folder)
    config = restore_config(record)
    return logits_of(restore_model(config, restore_base(record, config), folder=folder / "best"))


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_the_exported_folder_is_uploaded_and_loads_from_there(trained, hub, tmp_path, format):
    written = export_run(trained, format=format, out=tmp_path / "out", push="me/model", private=True)
    assert written.address == "https://hub/me/model"
    assert (hub.created, hub.commits) == ([("me/model", True)], ["lorasweep export"])
    uploaded = hub.folder / "me" / "model"
    assert files_of(uploaded) == files_of(tmp_path / "out")
    if format == "peft":
        base = AutoModelForCausalLM.from_pretrained(find_local_path(compose_run({}).model), dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, uploaded)
    else:
        model = AutoModelForCausalLM.from_pretrained(uploaded, dtype="auto")
    assert (logits_of(model) - own_logits(trained)).abs().max() < LOGIT_TOLERANCE
    for content in files_of(uploaded).values():
        assert str(tmp_path).encode() not in content  # no path of this machine
    assert str(find_local_path(compose_run({}).model)).encode() not in b"".join(files_of(uploaded).values())


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_the_card_says_what_the_record_knows(trained, tmp_path, format):
    export_run(trained, format=format, out=tmp_path / "mine")
    record = read_run(trained)
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == {"peft": "peft", "merged": "transformers"}[format]
    assert (data["pipeline_tag"], data["tags"]) == ("text-generation", ["lorasweep", "lora"])
    assert "base_model" not in data  # the embedded model is not on the hub
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == (record.metric, 3.25, "stdlib_docs")
    for fact in (
        *(record.base["fingerprint"], *(split["fingerprint"] for split in record.data.values())),
        *(f"| validation | {record.metric} | {record.score:.6g} |", f"| test | {record.metric} | 3.25 |"),
        *("`embedded:tiny`", "the run is not from a sweep with a report"),
    ):
        assert fact in card.text
    (settings,) = re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)
    shown = yaml.safe_load(settings)
    assert (shown["method.rank"], shown["optim.lr"], shown["trainer.max_steps"]) == (2, 0.01, 4)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert ('"mine"' in code, "PeftModel" in code) == (True, format == "peft")


def test_the_example_of_the_card_loads_the_model(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT asks the hub whether a local folder has a tokenizer
    base = str(find_local_path(compose_run({}).model))
    for format in ("peft", "merged"):
        export_run(trained, format=format, out=tmp_path / format)
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / format / "README.md").read_text(), flags=re.DOTALL)
        names: dict[str, object] = {}
        exec(code.replace("embedded:tiny", base), names)
        assert (logits_of(names["model"].float()) - own_logits(trained)).abs().max() < LOGIT_TOLERANCE
        assert names["tokenizer"]("def f(")["input_ids"]


SENTENCES = {"lora": ["Use LoRA with rank 2.", "It scores 3.1."], "full": ["Use full fine-tuning."]}


@pytest.mark.parametrize("arm", ["lora", "other"])
@pytest.mark.parametrize("is_trial", [True, False])
def test_the_card_has_the_verdict_of_the_sweep(trained, tmp_path, arm, is_trial):
    sweep = tmp_path / "sweep"
    folder = Path(shutil.copytree(trained, sweep / "runs" / "lora-0003" if is_trial else tmp_path / "alone"))
    (sweep / "report").mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    recommended = [{"arm": "lora", "is_settled": True, "sentences": SENTENCES["lora"]}]
    (sweep / "report" / "summary.json").write_text(json.dumps({"sweep": "mine", "recommended": recommended}))
    record = read_run(folder)
    if is_trial:
        record.arm, record.trial = arm, 3
    else:
        record.origin = {"sweep": str(sweep), "name": "mine", "arm": arm, "trial": 3}
    write_record(record, folder)
    export_run(folder, format="peft", out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"rial 3 of arm `{arm}` of the sweep `mine`." in text
    assert "- Use LoRA with rank 2.\n- It scores 3.1." in text
    assert ("The report recommends another arm." in text) is (arm == "other")
    (sweep / "report" / "summary.json").write_text('{"recommended": [3]}')
    shutil.rmtree(tmp_path / "out")
    export_run(folder, format="peft", out=tmp_path / "out")
    assert "not from a sweep with a report" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_is_named_by_its_id_or_its_folder(tmp_path):
    (tmp_path / "my-base").mkdir()
    config = compose_run({}).model

    def named(path: str) -> tuple[str | None, str]:
        model = ModelConfig(**{**vars(config), "path": path})
        return find_hub_base(model), name_base(model)

    assert named("meta-llama/Llama-3.2-1B") == ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B")
    assert named(str(tmp_path / "my-base")) == (None, "my-base")
    assert named("embedded:tiny") == (None, "embedded:tiny")


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", LOGIT_TOLERANCE), ("bf16", 1.0), ("fp16", 0.1)])
def test_a_merged_model_has_the_type_that_was_asked_for(trained, tmp_path, dtype, tolerance):
    written = export_run(trained, format="merged", out=tmp_path / "out", dtype=dtype)
    assert written.dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {parameter.dtype for parameter in model.parameters()} == {types[dtype]}
    assert written.difference < tolerance
    assert f"({dtype}, merged)" in (tmp_path / "out" / "README.md").read_text()


def test_a_type_is_refused_for_an_adapter(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"`--dtype` must be left out with `--format peft`.*'bf16'"):
        export_run(trained, format="peft", out=tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mo del", "me/..model"])
def test_a_wrong_name_is_refused_before_anything_is_written(trained, hub, tmp_path, name):
    with pytest.raises(ConfigError, match=r"`--push` must be USER/NAME"):
        export_run(trained, format="peft", out=tmp_path / "out", push=name)
    assert not (tmp_path / "out").exists()
    assert hub.created == []


def test_errors_of_the_hub_are_one_line(trained, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["export", str(trained), "--format", "peft", "--push", "me/model"]
    hub.error = LocalTokenNotFoundError("Token is required, but no token found.\nmore")
    assert run(words) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.splitlines()
    assert "Token is required, but no token found. Run `hf auth login`" in line
    hub.error = OfflineModeIsEnabled("Cannot reach the hub")
    assert run([*words, "--out", "kept"]) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "'me/model'" in line
    assert "Cannot reach the hub" in line
    assert (tmp_path / "kept" / "adapter_config.json").is_file()  # it can be uploaded later


def test_the_command_uploads_without_a_folder_of_its_own(trained, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["export", str(trained), "--format", "merged", "--dtype", "bf16", "--push", "me/model"]) == DONE
    assert re.match(r"merged, bf16, .*: https://hub/me/model\n", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}
    assert run(["export", str(trained), "--format", "merged"]) == WRONG_REQUEST
    assert "must have `--out D` or `--push USER/NAME`" in capsys.readouterr().err

"""What is exported loads in PEFT and transformers and computes what the run does; what fails leaves nothing behind."""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasweep.runs.export as export_file
from lorasweep.config.compose import compose_run
from lorasweep.errors import RecordError, RunError
from lorasweep.models.load import find_local_path
from lorasweep.record import read_run, write_record
from lorasweep.runs.export import export_run
from lorasweep.training.inputs import build_inputs
from lorasweep.training.restore import restore_base, restore_config, restore_model
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT

TOKENS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))
# fp32, logits up to about 10: sums in another order, through 4 layers, of parts that cancel (PiSSA)
LOGIT_TOLERANCE = 1e-4
LORA = (
    {},
    {"method.init": "pissa", "method.rank_pattern": {"down_proj": 4}},
    {"method.variant": "dora", "method.dropout": 0.1},
)
# the embedded model ties its head to its embeddings
TIED = (
    {"method.targets": ["lm_head", "q_proj"]},
    {"method.targets": ["embed_tokens"]},
    {"method.modules_to_save": ["embed_tokens", "lm_head"]},
)


@pytest.fixture(scope="module")
def trained(make_config, inputs, tmp_path_factory):
    """Trains a run with these settings once and gives its folder."""
    folders = {}

    def train(settings=None, /, *, inputs=inputs):
        key = json.dumps(settings or {}, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("run") / "run"
            train_run(make_config(settings), RunFolder(path=folders[key]), inputs=inputs)
        return folders[key]

    return train


def load_embedded():
    """The base as the runs of this file had it; on disk it is in bf16."""
    folder = find_local_path(compose_run({}).model)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def restored(run):
    record = read_run(run)
    config = restore_config(record)
    return restore_model(config, restore_base(record, config), folder=run / "best")


def logits_of(model, tokens=TOKENS):
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits


def largest_difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("settings", LORA)
def test_peft_loads_the_adapter_onto_its_base_with_the_same_logits(trained, tmp_path, settings):
    run = trained(settings)
    written = export_run(run, format="peft", out=tmp_path / "adapter")
    names = {file.name for file in written.folder.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    base = load_embedded()
    before = logits_of(base)
    model = peft.PeftModel.from_pretrained(base, written.folder)
    own = logits_of(restored(run))
    assert largest_difference(logits_of(model), own) < LOGIT_TOLERANCE
    assert largest_difference(before, own) > 10 * LOGIT_TOLERANCE


def test_an_adapter_that_peft_trained_is_exported_for_peft_and_merged(trained, tmp_path):
    config = {"peft_type": "VERA", "target_modules": ["q_proj", "down_proj"], "r": 8}
    run = trained({"method": "peft", "method.config": config})
    written = export_run(run, format="peft", out=tmp_path / "adapter")
    assert "An adapter (VERA, fp32)" in (written.folder / "README.md").read_text()
    base = load_embedded()
    before = logits_of(base)
    model = peft.PeftModel.from_pretrained(base, written.folder)
    own = logits_of(restored(run))
    assert largest_difference(logits_of(model), own) < LOGIT_TOLERANCE
    assert largest_difference(before, own) > 0
    merged = export_run(run, format="merged", out=tmp_path / "model")
    assert largest_difference(logits_of(AutoModelForCausalLM.from_pretrained(merged.folder)), own) < LOGIT_TOLERANCE


@pytest.mark.parametrize("settings", [LORA[1], {"method": "full"}, {"method": "intrinsic"}])
def test_transformers_loads_the_merged_model_with_the_same_logits(trained, tmp_path, settings):
    run = trained(settings)
    written = export_run(run, format="merged", out=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(written.folder)
    own = logits_of(restored(run))
    assert largest_difference(logits_of(model), own) < LOGIT_TOLERANCE
    assert largest_difference(logits_of(load_embedded()), own) > 10 * LOGIT_TOLERANCE
    assert written.num_bytes == sum(file.stat().st_size for file in written.folder.iterdir())


def test_a_merged_model_is_whole_and_generates(trained, tmp_path):
    export_run(trained(), format="merged", out=tmp_path / "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.use_cache  # training switches it off
    prompt = tokenizer("def f(", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    again = restored(trained()).generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, again)


@pytest.mark.parametrize(("settings", "tied"), [({}, True), (TIED[0], False), (TIED[1], False), (TIED[2], True)])
def test_a_head_is_untied_from_the_embeddings_only_where_one_of_them_changed_alone(trained, tmp_path, settings, tied):
    export_run(trained(settings), format="merged", out=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert largest_difference(logits_of(model), logits_of(restored(trained(settings)))) < LOGIT_TOLERANCE


@pytest.mark.parametrize(("method", "dtype"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_a_run_in_bf16_is_exported_from_its_base_in_bf16(trained, make_config, tmp_path, method, dtype):
    settings = {"method": method, "trainer.precision": "bf16"}
    run = trained(settings, inputs=build_inputs(make_config(settings)))
    written = export_run(run, format="merged", out=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(written.folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if method == "full":
        assert largest_difference(logits_of(model), logits_of(restored(run).double())) < LOGIT_TOLERANCE


def change_record(run, **fields):
    record = read_run(run)
    for name, value in fields.items():
        setattr(record, name, value)
    write_record(record, run)


def damage_best(run):
    file = run / "best" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


BROKEN = [
    (lambda run: shutil.rmtree(run / "best"), "`best`"),
    (damage_best, r"adapter_model\.safetensors.*has changed"),
    (lambda run: (run / "best" / "adapter_config.json").unlink(), r"adapter_config\.json.*is missing"),
    (lambda run: change_record(run, config={"method": {"name": "lora"}}), "settings of this version"),
    (lambda run: change_record(run, platform={"precision": "bf16"}), "bf16.*'embedded:tiny'"),
    (lambda run: change_record(run, base={"fingerprint": "0123"}), "'0123' in fp32"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_run_that_does_not_fit_its_record_is_refused_and_nothing_is_written(trained, tmp_path, damage, message):
    copied = shutil.copytree(trained(), tmp_path / "run")
    damage(copied)
    with pytest.raises(RecordError, match=message):
        export_run(copied, format="merged", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"peft_type": "LORA", "r": "eight"}', '{"peft_type": 1}', "[" * 10_000, "\0"]
)
def test_settings_of_an_adapter_that_are_none_are_refused(trained, tmp_path, content):
    run = shutil.copytree(trained(), tmp_path / "run")
    (run / "best" / "adapter_config.json").write_text(content)
    record = read_run(run)
    record.files = {}  # as a stranger would
    write_record(record, run)
    with pytest.raises(RecordError, match="must be the settings of an adapter"):
        export_run(run, format="peft", out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_disk_that_fills_up_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    def fail(source, target):
        target.write_bytes(b"0")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_file.shutil, "copyfile", fail)
    with pytest.raises(RunError, match=r"`--out`.*No space left on device"):
        export_run(trained(), format="peft", out=tmp_path / "new" / "out")
    assert not any(tmp_path.iterdir())


def test_a_model_that_comes_back_otherwise_is_not_exported(trained, tmp_path, monkeypatch):
    """As one would whose class ties weights whatever its settings say."""
    load = export_file.load_pretrained

    def load_tied(kind, source, **settings):
        model, new_names = load(kind, source, **settings)
        model.lm_head.weight = model.model.embed_tokens.weight
        return model, new_names

    monkeypatch.setattr(export_file, "load_pretrained", load_tied)
    with pytest.raises(RunError, match=r"LlamaForCausalLM.*`--format peft`"):
        export_run(trained({"method": "head"}), format="merged", out=tmp_path / "out")
    assert not any(tmp_path.iterdir())

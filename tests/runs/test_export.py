"""What is exported loads in PEFT and transformers and computes what the run does; what fails leaves nothing behind."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from tests.files import edit_json
from tests.small_runs import SMALL_RUN
from tests.tiny_tokenizer import WORDS, make_word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasweep.runs.export as export_file
from lorasweep.config.compose import compose_run
from lorasweep.errors import RecordError, RunError
from lorasweep.models.paths import find_local_path
from lorasweep.record import read_run, restore_config
from lorasweep.runs.export import export_run, name_base
from lorasweep.training.finished_run import restore_base, restore_model
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
TOKENS = torch.randint(3, 43, (3, 20), generator=torch.Generator().manual_seed(1))
# fp32, logits up to about 10: sums in another order, through 4 layers, of parts that cancel (PiSSA)
LOGIT_TOLERANCE = 1e-4
VERA = {"method": "peft", "method.config": {"peft_type": "VERA", "target_modules": ["q_proj", "down_proj"], "r": 8}}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": "all-linear"}
HEAD = {"method": "full", "method.parameters": "lm_head.*"}
PISSA = {"method": "peft", "method.config": {**LORA, "init_lora_weights": "pissa", "rank_pattern": {"down_proj": 4}}}
DORA = {"method": "peft", "method.config": {**LORA, "use_dora": True, "lora_dropout": 0.1}}


@pytest.fixture(scope="module")
def trained(make_config, inputs, tmp_path_factory):
    """Trains a run with these settings once and gives its folder."""
    folders = {}

    def train(settings=None, /, *, inputs=inputs):
        key = json.dumps(settings or {}, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("run") / "run"
            train_alone(make_config(settings), RunFolder(path=folders[key]), inputs=inputs)
        return folders[key]

    return train


@pytest.fixture
def train_classifier(make_config, tmp_path):
    """Trains a run of a tiny BERT with random weights, a new head and a tokenizer of words."""

    def train(settings):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "bert")
        make_word_tokenizer().save_pretrained(tmp_path / "bert")
        texts = [" ".join(WORDS[(n * 7 + k) % 40] for k in range(2 + n % 9)) for n in range(40)]
        rows = [{"text": text, "label": ("odd", "even", "none")[n % 3]} for n, text in enumerate(texts)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        model = {"model": "classifier", "model.path": str(tmp_path / "bert"), "model.attention": "eager"}
        data = {"data": "table", "data.train": str(tmp_path / "rows.jsonl")}
        common = {key: value for key, value in SMALL_RUN.items() if key.startswith("trainer.")}
        config = compose_run({**model, **data, **common, "trainer.progress": False, "optim.lr": 1e-2, **settings})
        train_alone(config, RunFolder(path=tmp_path / "run"), inputs=load_inputs(config))
        return tmp_path / "run"

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


@pytest.mark.parametrize(("settings", "kind"), [({}, "LoRA"), (PISSA, "LORA"), (DORA, "LORA"), (VERA, "VERA")])
def test_peft_loads_the_adapter_onto_its_base_with_the_same_logits(trained, tmp_path, settings, kind):
    run = trained(settings)
    written = export_run(run, format="peft", out=tmp_path / "adapter")
    names = {file.name for file in written.folder.iterdir()}
    adapter, tokenizer = (
        {"adapter_config.json", "adapter_model.safetensors"},
        {"tokenizer.json", "tokenizer_config.json"},
    )
    assert names == {"README.md", *adapter, *tokenizer}
    assert kind in (written.folder / "README.md").read_text()
    base = load_embedded()
    before = logits_of(base)
    own = logits_of(restored(run))
    assert largest_difference(logits_of(peft.PeftModel.from_pretrained(base, written.folder)), own) < LOGIT_TOLERANCE
    assert largest_difference(before, own) > (0 if kind == "VERA" else 10 * LOGIT_TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({}, True),
        (PISSA, True),
        (DORA, True),
        (VERA, True),
        ({"method": "full"}, True),
        ({"method": "intrinsic"}, True),
        # the embedded model ties its head to its embeddings; they part where one of them changed alone
        ({"method.targets": ["lm_head", "q_proj"]}, False),
        ({"method.modules_to_save": ["embed_tokens", "lm_head"]}, True),
    ],
)
def test_transformers_loads_the_merged_model_with_the_same_logits(trained, tmp_path, settings, tied):
    run = trained(settings)
    written = export_run(run, format="merged", out=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(written.folder)
    assert largest_difference(logits_of(model), logits_of(restored(run))) < LOGIT_TOLERANCE
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.config.use_cache  # training switches it off
    assert written.num_bytes == sum(file.stat().st_size for file in written.folder.iterdir())


def test_a_merged_model_generates_with_its_own_tokenizer(trained, tmp_path):
    export_run(trained(), format="merged", out=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "model")("def f(", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, restored(trained()).generate(**prompt, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(("method", "dtype"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_a_run_in_bf16_is_exported_from_its_base_in_bf16(trained, make_config, tmp_path, method, dtype):
    settings = {"method": method, "trainer.precision": "bf16"}
    run = trained(settings, inputs=load_inputs(make_config(settings)))
    written = export_run(run, format="merged", out=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(written.folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if method == "full":
        assert largest_difference(logits_of(model), logits_of(restored(run).double())) < LOGIT_TOLERANCE


def run_code_of_card(folder):
    """Runs the card's code in the folder's parent, as the card's reader would, and gives the model and tokenizer."""
    names = {}
    exec((folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    return names["model"], names["tokenizer"]


@pytest.mark.parametrize(
    ("settings", "format"),
    [
        ({"method.rank": 2}, "merged"),
        ({"method": "full", "method.parameters": "classifier.*"}, "merged"),
        ({"method.rank": 2}, "peft"),
        (VERA | {"method.config": VERA["method.config"] | {"target_modules": ["query", "value"]}}, "peft"),
    ],
)
def test_the_code_of_the_card_loads_a_classifier_with_its_head(train_classifier, here, monkeypatch, settings, format):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT asks the hub whether a local folder has a tokenizer
    run = train_classifier(settings)
    written = export_run(run, format=format, out=here / "out")
    model, tokenizer = run_code_of_card(written.folder)
    assert tokenizer("w3 w4")["input_ids"][:2] == [6, 7]
    assert largest_difference(logits_of(model), logits_of(restored(run))) < LOGIT_TOLERANCE
    assert list(model.config.id2label.values()) == ["even", "none", "odd"]
    assert ("is MISSING" in (written.folder / "README.md").read_text()) is (format == "peft")


def damage_best(run):
    file = run / "best" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def set_adapter_config(run, content):
    (run / "best" / "adapter_config.json").write_text(content)
    edit_json(run / "run.json", lambda raw: raw.update(files={}))  # as a stranger would


def change_record(**fields):
    return lambda run: edit_json(run / "run.json", lambda raw: raw.update(fields))


BROKEN = [
    ("merged", lambda run: shutil.rmtree(run / "best"), "`best`"),
    ("merged", damage_best, r"adapter_model\.safetensors.*has changed"),
    ("merged", lambda run: (run / "best" / "adapter_config.json").unlink(), r"adapter_config\.json.*is missing"),
    ("merged", change_record(config={"method": {"name": "lora"}}), "settings of this version"),
    ("merged", change_record(platform={"precision": "bf16"}), "bf16.*'embedded:tiny'"),
    ("merged", change_record(base={"fingerprint": "0123"}), "'0123' in fp32"),
    ("peft", lambda run: set_adapter_config(run, "{"), "must be the settings of an adapter"),
]


@pytest.mark.parametrize(("format", "damage", "message"), BROKEN)
def test_a_run_that_does_not_fit_its_record_is_refused_and_nothing_is_written(
    trained, tmp_path, format, damage, message
):
    copied = shutil.copytree(trained(), tmp_path / "run")
    damage(copied)
    with pytest.raises(RecordError, match=message):
        export_run(copied, format=format, out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def fill_disk(source, target):
    target.write_bytes(b"0")
    raise OSError(28, "No space left on device")


def load_tied(kind, source, *, load=export_file.load_pretrained, **settings):
    """Loads a model as one would whose class ties weights whatever its settings say."""
    model, new_names = load(kind, source, **settings)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model, new_names


@pytest.mark.parametrize(
    ("format", "settings", "place", "failure", "message"),
    [
        ("peft", {}, "shutil.copyfile", fill_disk, r"`--out`.*No space left on device"),
        ("merged", HEAD, "load_pretrained", load_tied, r"LlamaForCausalLM.*`--format peft`"),
    ],
)
def test_an_export_that_fails_leaves_nothing_behind(
    trained, tmp_path, monkeypatch, format, settings, place, failure, message
):
    monkeypatch.setattr(f"lorasweep.runs.export.{place}", failure)
    with pytest.raises(RunError, match=message):
        export_run(trained(settings), format=format, out=tmp_path / "new" / "out")
    assert not any(tmp_path.iterdir())


def test_a_template_of_ones_own_is_exported_with_the_tokenizer(make_config, tmp_path):
    talks = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(20)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    data = {"data": "chat", "data.train": str(tmp_path / "talks.jsonl"), "data.template": str(tmp_path / "mine.jinja")}
    trainer = {f"trainer.{key}": value for key, value in {"max_steps": 1, "batch_size": 2, "device": "cpu"}.items()}
    config = compose_run(data | trainer | {"trainer.progress": False, "method.rank": 2})
    train_alone(config, RunFolder(path=tmp_path / "run"), inputs=load_inputs(config))
    for form in ("peft", "merged"):
        written = export_run(tmp_path / "run", format=form, out=tmp_path / form)
        assert (written.folder / "chat_template.jinja").read_text() == TEMPLATE
        assert AutoTokenizer.from_pretrained(written.folder).chat_template == TEMPLATE
    (tmp_path / "mine.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(RecordError, match=r"mine.jinja' has changed"):
        export_run(tmp_path / "run", format="peft", out=tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_the_base_of_a_card_is_the_folder_and_not_the_model_from_which_it_was_trained(tmp_path):
    folder = tmp_path / "mine" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": "org/ancestor"}))
    config = compose_run({"model": "causal_lm", "model.path": str(folder)}).model
    assert name_base(config) == "mine/model"
    assert name_base(replace(config, path="org/base")) == "org/base"

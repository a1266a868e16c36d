"""Classifiers are exported with what tells their labels, and their new head."""

import json

import pytest
import torch
import transformers
from tests.small_runs import SMALL_RUN
from tests.tiny_tokenizer import WORDS, make_word_tokenizer

from lorasweep.config.compose import compose_run
from lorasweep.record import read_run
from lorasweep.runs.export import export_run
from lorasweep.training.inputs import build_inputs
from lorasweep.training.restore import restore_base, restore_config, restore_model
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what PEFT calls
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.randint(3, 43, (3, 9), generator=torch.Generator().manual_seed(1))
# fp32, two small layers: sums in another order
LOGIT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with random weights and a tokenizer of words, and data."""
    folder = tmp_path_factory.mktemp("kinds")
    tokenizer = make_word_tokenizer()
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=64, **SIZES)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    texts = [" ".join(WORDS[(n * 7 + k) % 40] for k in range(2 + n % 9)) for n in range(40)]
    rows = [{"text": text, "label": ("odd", "even", "none")[n % 3]} for n, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def train(folder, tmp_path):
    def train(settings):
        model = {"model": "classifier", "model.path": str(folder / "bert"), "model.attention": "eager"}
        data = {"data": "table", "data.train": str(folder / "rows.jsonl")}
        common = {key: value for key, value in SMALL_RUN.items() if key.startswith("trainer.")}
        config = compose_run({**model, **data, **common, "trainer.progress": False, "optim.lr": 1e-2, **settings})
        train_run(config, RunFolder(path=tmp_path / "run"), inputs=build_inputs(config))
        return tmp_path / "run"

    return train


def own_logits(run):
    record = read_run(run)
    config = restore_config(record)
    return logits_of(restore_model(config, restore_base(record, config), folder=run / "best"))


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("settings", [{"method.rank": 2}, {"method": "head"}])
def test_transformers_loads_the_merged_model(train, tmp_path, settings):
    run = train(settings)
    written = export_run(run, format="merged", out=tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(written.folder)
    assert (logits_of(model) - own_logits(run)).abs().max() < LOGIT_TOLERANCE
    tokenizer = transformers.AutoTokenizer.from_pretrained(written.folder)
    assert tokenizer("w3 w4")["input_ids"][:2] == [6, 7]
    assert sorted(model.config.id2label.values()) == ["even", "none", "odd"]


def run_code_of_card(folder):
    """Runs the card's code in the folder's parent, as the card's reader would, and gives the model and tokenizer."""
    names = {}
    exec((folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    return names["model"], names["tokenizer"]


@pytest.mark.parametrize("method", ["lora", "peft"])
def test_peft_loads_the_adapter_and_the_head(train, tmp_path, monkeypatch, method):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT asks the hub whether a local folder has a tokenizer
    vera = {"method": "peft", "method.config": {"peft_type": "VERA", "r": 4, "target_modules": ["query", "value"]}}
    run = train({"method.rank": 2} if method == "lora" else vera)
    written = export_run(run, format="peft", out=tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = run_code_of_card(written.folder)
    assert tokenizer("w3 w4")["input_ids"][:2] == [6, 7]
    assert (logits_of(model) - own_logits(run)).abs().max() < LOGIT_TOLERANCE

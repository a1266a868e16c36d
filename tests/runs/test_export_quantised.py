"""A run on a quantised base is exported as an adapter for it, or merged into the unquantised weights."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorasweep import cli
from lorasweep.config.compose import compose_run
from lorasweep.lora import inject_lora, load_adapter, merge_lora
from lorasweep.models.load import load_base
from lorasweep.models.pretrained import NF4_ARGUMENTS
from lorasweep.record import read_run, restore_config
from lorasweep.runs.export import export_run
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone

pytest.importorskip("bitsandbytes", reason="bitsandbytes, an optional extra, is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what PEFT calls

TOKENS = torch.randint(257, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(make_config, quantisable_model, tmp_path_factory):
    """A run on the quantised base whose adapter changes it visibly."""
    base = {"model": "causal_lm", "model.path": str(quantisable_model), "model.quantization": "nf4"}
    config = make_config({**base, "optim.lr": 0.1})
    folder = tmp_path_factory.mktemp("quantised") / "run"
    train_alone(config, RunFolder(path=folder), inputs=load_inputs(config))
    return folder


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(input_ids=TOKENS).logits


def test_peft_loads_the_adapter_onto_the_base_as_the_card_says(run, quantisable_model, tmp_path):
    export_run(run, format="peft", out=tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "its linear layers were stored in nf4" in card
    for key, value in NF4_ARGUMENTS.items():
        assert f"{key}={value!r}" in card
    bits = BitsAndBytesConfig(**NF4_ARGUMENTS, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(quantisable_model, quantization_config=bits)
    plain = logits_of(base)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = logits_of(model)
    assert (found - plain).abs().max() > 0.1
    ours = logits_of(load_ours(quantisable_model, run / "best"))
    # PEFT's base computes evaluations in bf16, lorasweep's in the dtype of the base
    torch.testing.assert_close(found, ours, rtol=0.05, atol=0.05 * ours.abs().max().item())


def load_ours(folder, adapter, quantization="nf4"):
    settings = {"model": "causal_lm", "model.path": str(folder), "model.quantization": quantization}
    model = load_base(compose_run(settings).model, dtype=torch.float32).model
    inject_lora(model, restore_config(read_run(adapter.parent)).method)
    load_adapter(model, adapter)
    return model


def test_merging_takes_the_unquantised_weights_and_says_so(run, quantisable_model, tmp_path):
    assert cli.run(["export", str(run), "--format", "merged", "--out", str(tmp_path / "model")]) == 0
    assert "This model has the unquantised weights" in (tmp_path / "model" / "README.md").read_text()
    expected = load_ours(quantisable_model, run / "best", "none")
    merge_lora(expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert getattr(merged.config, "quantization_config", None) is None
    assert torch.equal(logits_of(merged), logits_of(expected))

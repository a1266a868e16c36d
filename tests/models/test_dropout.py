"""`model.dropout` reaches every dropout of a base, those inside functions too."""

import pytest
import torch
from transformers import Wav2Vec2Config

from lorasweep.models.load import Labels, load_base, set_dropout_settings

LABELS = Labels(kind="single_label", names=("a", "b"))
TOKENS = torch.arange(60, 84).reshape(2, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_zero_makes_training_mode_the_same_as_evaluation(save_random, model_config, architecture, attention):
    kind = {"bert": "classifier", "gpt2": "causal_lm"}[architecture]
    labels = LABELS if kind == "classifier" else None

    def outputs(dropout):
        config = model_config(save_random(architecture), kind=kind, dropout=dropout, attention=attention)
        model = load_base(config, dtype=torch.float32, labels=labels).model
        torch.manual_seed(0)
        return model.train()(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits

    assert torch.equal(*outputs(0.0))
    assert not torch.allclose(*outputs(None), atol=1e-6)  # the models' own rate is 0.1


def test_rates_of_whole_layers_are_set_only_to_zero():
    settings = Wav2Vec2Config(layerdrop=0.2, hidden_dropout=0.1)
    set_dropout_settings(settings, 0.3)
    assert (settings.layerdrop, settings.hidden_dropout) == (0.2, 0.3)
    set_dropout_settings(settings, 0.0)
    assert (settings.layerdrop, settings.hidden_dropout) == (0.0, 0.0)

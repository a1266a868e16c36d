"""PEFT's settings are read as ours: the same layers, and nothing dropped silently."""

from __future__ import annotations

import peft
import pytest
from tests.lora.test_peft_exchange import make_llama

from lorasweep.errors import ConfigError
from lorasweep.lora import LoraConfig, inject_lora, lora_state

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

READ = [
    (peft.LoraConfig(target_modules="all-linear"), LoraConfig(alpha=8)),
    (
        peft.LoraConfig(
            r=4,
            lora_alpha=2.5,
            use_rslora=True,
            target_modules=["q_proj", "k_proj"],
            lora_dropout=0.1,
            layers_to_transform=[0, 2],
        ),
        LoraConfig(
            rank=4, alpha=2.5, scaling="alpha_over_sqrt_rank", targets=("k_proj", "q_proj"), dropout=0.1, layers=(0, 2)
        ),
    ),
    (
        peft.LoraConfig(
            target_modules=r".*\.(q|v)_proj",
            exclude_modules=r".*\.0\..*",
            rank_pattern={"mlp.up_proj": 2, "q_.*": 6},
            alpha_pattern={"v_proj": 3},
            modules_to_save=["classifier"],
        ),
        LoraConfig(
            alpha=8,
            targets=r".*\.(q|v)_proj",
            exclude=(r"re:.*\.0\..*",),
            rank_pattern={"mlp.up_proj": 2, r"re:(.*\.)?(q_.*)": 6},
            alpha_pattern={"v_proj": 3.0},
            modules_to_save=("classifier",),
        ),
    ),
    (
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian"),
        LoraConfig(alpha=8, targets=("q_proj",), init="gaussian"),
    ),
]


@pytest.mark.parametrize(("theirs", "ours"), READ)
def test_a_config_of_peft_is_read(theirs, ours):
    assert LoraConfig.from_peft(theirs) == ours


def test_patterns_match_the_same_layers_as_in_peft():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], rank_pattern={r"layers\.1\..*q_proj": 1})
    theirs, ours = peft.get_peft_model(make_llama(), config), make_llama()
    inject_lora(ours, LoraConfig.from_peft(config))
    shapes = {key: t.shape for key, t in peft.get_peft_model_state_dict(theirs).items()}
    assert {key: t.shape for key, t in lora_state(ours).items()} == shapes


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), ["`init_lora_weights` 'olora'"]),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), ["`init_lora_weights` False"]),
        (peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), ["`lora_bias` True", "method=peft"]),
        (peft.LoraConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern="h"), ["`layers_pattern` 'h'"]),
        (
            peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
            ["`target_parameters` .'experts.down_proj'", "method=peft"],
        ),
        (peft.LoraConfig(), ["`target_modules` must name layers, but got None"]),
        (peft.VeraConfig(target_modules=["q_proj"]), ["`peft_type` must be LORA, but got 'VERA'", "method=peft"]),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), ["`peft_type` must be LORA"]),
    ],
)
def test_what_our_layers_cannot_do_is_refused_by_name(theirs, named):
    for part in named:
        with pytest.raises(ConfigError, match=part):
            LoraConfig.from_peft(theirs)

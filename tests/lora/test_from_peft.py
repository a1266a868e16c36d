"""Settings cross between `LoraConfig` and PEFT's: the same layers, the same outputs, and nothing dropped silently."""

import sys

import peft
import pytest
from tests.lora.test_peft_exchange import make_llama

from lorasweep.errors import ConfigError
from lorasweep.lora import LoraConfig, inject_lora, lora_state

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ROUND_TRIPS = [
    LoraConfig(),
    LoraConfig(
        rank=4, alpha=2.5, scaling="alpha_over_sqrt_rank", targets=("k_proj", "q_proj"), dropout=0.1, layers=(0, 2)
    ),
    LoraConfig(targets=r".*\.(q|v)_proj", init="pissa", exclude=(r"re:.*\.0\..*",)),
    LoraConfig(
        variant="dora",
        init="gaussian",
        rank_pattern={"mlp.up_proj": 2, r"re:(.*\.)?(q_.*)": 6},
        alpha_pattern={"v_proj": 3.0},
        exclude=("lm_head", "score"),
        modules_to_save=("classifier",),
    ),
]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_to_peft_and_back_gives_the_same_settings(config):
    theirs = config.to_peft()
    assert isinstance(theirs, peft.LoraConfig)
    assert LoraConfig.from_peft(theirs) == config


def test_mixed_patterns_match_the_same_layers_in_peft():
    config = LoraConfig(
        rank=2, targets=("q_proj", r"re:.*\.1\..*up_proj"), rank_pattern={r"re:.*layers\.1\..*q_proj": 1}
    )
    theirs = peft.get_peft_model(make_llama(), config.to_peft())
    ours = make_llama()
    inject_lora(ours, config)
    shapes = {key: t.shape for key, t in peft.get_peft_model_state_dict(theirs).items()}
    assert {key: t.shape for key, t in lora_state(ours).items()} == shapes


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), ["`init_lora_weights` 'olora'"]),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), ["`init_lora_weights` False"]),
        (
            peft.LoraConfig(target_modules=["q_proj"], lora_bias=True, trainable_token_indices=[1]),
            ["`lora_bias` True", r"`trainable_token_indices` \[1\]", "method=peft"],
        ),
        (peft.LoraConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern="h"), ["`layers_pattern` 'h'"]),
        (peft.LoraConfig(), ["`target_modules` must name layers, but got None"]),
        (peft.VeraConfig(target_modules=["q_proj"]), ["`peft_type` must be LORA, but got 'VERA'", "method=peft"]),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), ["`peft_type` must be LORA"]),
    ],
)
def test_what_our_layers_cannot_do_is_refused_by_name(theirs, named):
    for part in named:
        with pytest.raises(ConfigError, match=part):
            LoraConfig.from_peft(theirs)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(targets=("c_attn[q,v]",)), r"`method.targets` .* 'c_attn\[q,v\]'"),
        (LoraConfig(targets=("all-linear", "lm_head")), "`method.targets` .* 'all-linear'"),
        (LoraConfig(layers=(1,)), r"`method.layers` must be empty with `method.targets=all-linear`.* \[1\]"),
        (LoraConfig(modules_to_save=("re:.*",)), r"`method.modules_to_save` .* 're:\.\*'"),
    ],
)
def test_what_peft_cannot_do_is_refused_by_name(config, named):
    with pytest.raises(ConfigError, match=named):
        config.to_peft()


def test_a_missing_peft_is_one_sentence_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package 'peft'.* `pip install 'lorasweep\[peft\]'`"):
        LoraConfig().to_peft()

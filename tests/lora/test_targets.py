import pytest
import torch
import transformers
from torch import nn

from lorasweep.lora import LoraConfig, find_targets, inject_lora

UP = ("layers.0.up", "layers.1.up")
PROJ = ("layers.0.proj", "layers.1.proj")


REFUSED = [
    ({"targets": ("upp",)}, ["`method.targets`", "'upp' matches none", "Did you mean `up`"]),
    ({"targets": ("up", "prj")}, ["`method.targets`", "'prj' matches none", "Did you mean `proj`"]),
    ({"targets": ("re:layer",)}, ["'re:layer' matches none"]),
    ({"targets": "up"}, ["'re:up' matches none"]),
    ({"targets": ("layers.0",)}, ["must match linear layers, but 'layers.0' matches none"]),
    ({"targets": ("out_proj",)}, ["'out_proj' matches none"]),
    ({"targets": "("}, ["must be a regular expression", "missing"]),
    ({"targets": ("re:(?P<n>a)(?P<n>",)}, ["must be a regular expression"]),
    ({"exclude": ("prj",)}, ["`method.exclude`", "'prj' matches none", "Did you mean `proj`"]),
    ({"rank_pattern": {"upp": 4}}, ["`method.rank_pattern`", "'upp'", "Did you mean `up`"]),
    ({"alpha_pattern": {"out": 4.0}}, ["`method.alpha_pattern` must match layers", "'out'"]),
    ({"targets": ("up", "proj"), "exclude": ("up",)}, ["'up' matches only", "Change `method.exclude`"]),
    ({"targets": ("out",), "modules_to_save": ("out",)}, ["'out' matches only"]),
    ({"rank": 9}, ["`method.rank <= 8` must hold", "layers.0.up", "got 9"]),
    ({"modules_to_save": ("outt",)}, ["`method.modules_to_save`", "'outt' matches none", "Did you mean `out`"]),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_settings_that_do_not_fit_the_model_are_refused_and_change_nothing(model, settings, words):
    model.attention = nn.MultiheadAttention(4, 2)
    before = str(model)
    with pytest.raises(ValueError, match="must ") as raised:
        inject_lora(model, LoraConfig(**{"rank": 2} | settings))
    assert [word for word in words if word not in str(raised.value)] == []
    assert str(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def config(targets="all-linear", *, rank=2):
    return LoraConfig(rank=rank, targets=targets)


def test_all_linear_leaves_out_the_output_head(model):
    coverage = find_targets(model, config())
    assert set(coverage.layers) == {*UP, *PROJ}
    assert coverage.unmatched == ("out",)
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    assert find_targets(attention, config()).layers == ("up",)  # torch never calls the `out_proj` of attention
    for head in ("lm_head", "score", "classifier"):
        model = nn.ModuleDict({"body": nn.Linear(4, 4), head: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))})
        assert find_targets(model, config()).layers == ("body",)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("up",), UP),
        (("up", "proj"), UP + PROJ),
        (("layers.1.up",), ("layers.1.up",)),
        (("1.up", "0.proj"), ("layers.1.up", "layers.0.proj")),
        ((r"re:layers\.\d\.up",), UP),
        ((r"re:.*\.(up|proj)",), UP + PROJ),
        (r"layers\.\d\.up", UP),  # a text is a regular expression
        (r".*\.0\..*", ("layers.0.up", "layers.0.proj")),
        ("out", ("out",)),
        (("all-linear", "out"), ("layers.0.up", "layers.0.proj", "layers.1.up", "layers.1.proj", "out")),
        (("up", "up", "layers.0.up"), UP),
    ],
)
def test_patterns(model, targets, expected):
    assert set(find_targets(model, config(targets)).layers) == set(expected)


def test_a_name_matches_whole_parts_only_and_a_layer_used_twice_appears_once():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"q_proj": shared, "seq_proj": nn.Linear(2, 2), "again": shared})
    assert find_targets(model, config(("q_proj",))).layers == ("q_proj",)
    assert find_targets(model, config()).layers == ("q_proj", "seq_proj")


def test_exclude_leaves_layers_out(model):
    coverage = find_targets(model, LoraConfig(rank=2, exclude=("proj", r"re:layers\.0\..*")))
    assert coverage.layers == ("layers.1.up",)
    assert set(coverage.unmatched) == {"layers.0.up", "layers.0.proj", "layers.1.proj", "out"}


def test_patterns_set_rank_and_strength_by_layer(model):
    settings = {"rank_pattern": {"0.up": 3, "up": 4}, "alpha_pattern": {"re:.*proj": 5.0}}
    coverage = find_targets(model, LoraConfig(rank=2, alpha=1.0, **settings))
    targets = coverage.targets
    assert [(t.rank, t.alpha) for t in targets.values()] == [(3, 1.0), (2, 5.0), (4, 1.0), (2, 5.0)]
    assert coverage.trainable_params == (3 + 2 + 4 + 2) * (8 + 16)


def test_counts_agree_with_what_is_injected(make_model):
    config = LoraConfig(rank=2, targets=("up", "proj"), modules_to_save=("out",))
    with torch.device("meta"):
        unloaded = make_model()
    model, coverage = make_model(), find_targets(unloaded, config)
    assert all(parameter.requires_grad for parameter in unloaded.parameters())  # to look changes nothing
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in model.modules()]
    assert inject_lora(model, config) == coverage
    assert coverage.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_coverage_counts_parameters_and_names_fused_experts(model):
    up_and_proj, head = 2 * (8 * 16 + 16 * 8 + 8), 8 * 11
    total = 11 * 8 + up_and_proj + head
    assert find_targets(model, config()).matched_fraction == pytest.approx(up_and_proj / total)
    saved = LoraConfig(rank=2, targets=("up",), modules_to_save=("out",))
    assert find_targets(model, saved).matched_fraction == pytest.approx((2 * 8 * 16 + head) / total)
    assert "experts" not in find_targets(model, config()).note.text
    model.experts = nn.Module()
    model.experts.down_proj = nn.Parameter(torch.zeros(4, 8, 8))
    coverage = find_targets(model, config())
    assert coverage.matched_fraction == pytest.approx(up_and_proj / (total + 4 * 8 * 8))
    assert coverage.fused_experts == ("experts.down_proj",)
    for words in (
        "with 55 %",
        "leaves out 45 %",
        "`experts.down_proj`",
        "target_modules: [proj, up], target_parameters: [experts.down_proj]",
    ):
        assert words in coverage.note.text


MOE = {"hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 32}
MOE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1, "num_dense_layers": 1}
MODELS_WITH_ROUTERS = {
    "MixtralConfig": {},
    "Qwen2MoeConfig": {"num_experts": 4, "shared_expert_intermediate_size": 8},
    "Qwen3MoeConfig": {"num_experts": 4},
    "GptOssConfig": {"num_local_experts": 4},
    "GraniteMoeConfig": {"num_local_experts": 4},
    "Lfm2MoeConfig": {"num_experts": 4, "layer_types": ["conv", "full_attention"]},
    "DeepseekV3Config": {"n_routed_experts": 8, "n_group": 1, "topk_group": 1},
    "Glm4MoeConfig": {"n_routed_experts": 8},
    "PhimoeConfig": {"num_local_experts": 4},  # its router and those below are linear layers
    "Llama4TextConfig": {"num_local_experts": 4, "intermediate_size_mlp": 8, "interleave_moe_layer_step": 1},
    "AfmoeConfig": {"num_experts": 4},
}


@pytest.mark.parametrize("name", MODELS_WITH_ROUTERS)
def test_routers_and_gates_are_not_adapted_by_all_linear(name):
    with torch.device("meta"):
        config = getattr(transformers, name)(**MOE | MODELS_WITH_ROUTERS[name])
        model = transformers.AutoModelForCausalLM.from_config(config)
    routers = [n for n, _ in model.named_modules() if {"gate", "router", "shared_expert_gate"} & set(n.split("."))]
    layers = find_targets(model, LoraConfig(rank=2)).layers
    assert routers
    assert layers
    assert not set(routers) & set(layers)

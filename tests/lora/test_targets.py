import pytest
import torch
import transformers
from torch import nn

from lorasweep.lora import LoraConfig, find_targets, inject_lora
from lorasweep.lora.patterns import fits_pattern, parse_row_ranges

UP = ("layers.0.up", "layers.1.up")
PROJ = ("layers.0.proj", "layers.1.proj")


def config(targets="all-linear", *, rank=2):
    return LoraConfig(rank=rank, targets=targets)


def test_all_linear_leaves_out_the_output_head(model):
    coverage = find_targets(model, config())
    assert set(coverage.layers) == {*UP, *PROJ}
    assert coverage.unmatched == ("out",)
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


def test_works_on_the_meta_device_and_changes_nothing(make_model):
    with torch.device("meta"):
        model = make_model()
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    assert find_targets(model, config()).trainable_params == 4 * 2 * (8 + 16)
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("upp",), "'upp' matches none. Did you mean `up`"),
        (("up", "prj"), "'prj' matches none. Did you mean `proj`"),
        (("re:layer",), "'re:layer' matches none"),
        ("layers", "'layers' is a ModuleList. Name the layers inside it"),
        ("(", "must be a regular expression, but got an error: missing"),
        (("act",), "'act' is a Tanh. Name another layer"),
        (("zzz",), "'zzz' matches none"),
        (("layers.0",), "'layers.0' is a Block. Name the layers inside it: 'proj', 'up'"),
        ("up", r"'up', a regular expression .* write the list \['up'\]"),
    ],
)
def test_a_pattern_without_a_layer_is_refused(model, targets, message):
    with pytest.raises(ValueError, match=message):
        find_targets(model, config(targets))


def test_layers_choose_blocks_by_index_and_exclude_leaves_layers_out(model):
    assert find_targets(model, LoraConfig(rank=2, layers=(1,))).layers == ("layers.1.up", "layers.1.proj")
    with pytest.raises(ValueError, match=r"`method.layers` .* but got 2. Use \["):
        find_targets(model, LoraConfig(rank=2, layers=(1, 2)))
    coverage = find_targets(model, LoraConfig(rank=2, exclude=("proj", r"re:layers\.0\..*")))
    assert coverage.layers == ("layers.1.up",)
    assert set(coverage.unmatched) == {"layers.0.up", "layers.0.proj", "layers.1.proj", "out"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ("prj",)}, "`method.exclude` must match layers, but 'prj' matches none. Did you mean `proj`"),
        ({"rank_pattern": {"upp": 4}}, "`method.rank_pattern` must .* 'upp' .* Did you mean `up`"),
        ({"alpha_pattern": {"out": 4.0}}, "`method.alpha_pattern` must match layers, but 'out'"),
        ({"targets": ("up", "proj"), "exclude": ("up",)}, "'up' matches only .* Change `method.exclude`"),
        ({"targets": ("out",), "modules_to_save": ("out",)}, "'out' matches only"),
        ({"targets": ("up[0:4]", "up[4:8]")}, "must select one set of rows of layer 'layers.0.up'"),
        ({"targets": ("up", "up[4:8]")}, "must select one set of rows of layer 'layers.0.up'"),
    ],
)
def test_a_setting_without_effect_or_against_another_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        find_targets(model, LoraConfig(**{"rank": 2} | settings))


def test_patterns_set_rank_and_strength_by_layer(model):
    settings = {"rank_pattern": {"0.up": 3, "up": 4}, "alpha_pattern": {"re:.*proj": 5.0}}
    coverage = find_targets(model, LoraConfig(rank=2, alpha=1.0, **settings))
    targets = coverage.targets
    assert [(t.rank, t.alpha) for t in targets.values()] == [(3, 1.0), (2, 5.0), (4, 1.0), (2, 5.0)]
    assert coverage.trainable_params == (3 + 2 + 4 + 2) * (8 + 16)


def test_counts_agree_with_what_is_injected(make_model):
    config = LoraConfig(rank=2, targets=("up[0:4,8:12]", "proj", "embed"), variant="dora", modules_to_save=("out",))
    model, coverage = make_model(), find_targets(make_model(), config)
    assert inject_lora(model, config) == coverage
    assert coverage.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_attention_of_torch_is_refused_by_name():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    assert find_targets(model, config()).layers == ("up",)
    with pytest.raises(ValueError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        find_targets(model, config(("out_proj",)))


def test_a_regular_expression_must_match_the_whole_name():
    assert fits_pattern(r"re:.*\.(q|v)_proj", "layers.0.q_proj")
    assert not fits_pattern(r"re:(q|v)_proj", "layers.0.q_proj")
    assert fits_pattern("c_attn[q,v]", "h.0.c_attn")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("c_attn", ()),
        ("c_attn[q,v]", ((0, 4), (8, 12))),
        ("c_attn[v,q]", ((0, 4), (8, 12))),
        ("c_attn[k]", ((4, 8),)),
        ("c_attn[0:2,6:12]", ((0, 2), (6, 12))),
        ("c_attn[6:12,0:2]", ((0, 2), (6, 12))),
        ("re:c_attn[qk]", ()),
    ],
)
def test_rows(pattern, expected):
    assert parse_row_ranges(pattern, num_rows=12) == expected


@pytest.mark.parametrize(
    ("pattern", "num_rows", "message"),
    [
        ("qkv[q]", 10, "thirds .*if 3 divides 10, but got 'q'"),
        ("qkv[x]", 12, "but got 'x'"),
        ("qkv[3]", 12, "but got '3'"),
        ("qkv[0:4,2:6]", 12, r"within 0:12, .*but got '0:4,2:6'. Write them as `qkv\[0:6\]`"),
        ("qkv[4:4]", 12, "must be separate ranges"),
        ("qkv[5:4]", 12, "must be separate ranges"),
        ("qkv[0:13]", 12, "must be separate ranges"),
        ("qkv[q,q]", 12, "must be separate ranges"),
    ],
)
def test_rows_that_make_no_sense_are_refused(pattern, num_rows, message):
    with pytest.raises(ValueError, match=message):
        parse_row_ranges(pattern, num_rows=num_rows)


@pytest.mark.parametrize("expression", ["(" * 100_000, "a{99999999999999999999}", "(?P<n>a)(?P<n>"])
def test_an_expression_that_can_not_be_compiled_is_refused(expression):
    with pytest.raises(ValueError, match="must be a regular expression, but got an error"):
        fits_pattern(f"re:{expression}", "x")


def test_coverage_counts_parameters_and_names_fused_experts(model):
    up_and_proj, head = 2 * (8 * 16 + 16 * 8 + 8), 8 * 11
    total = 11 * 8 + up_and_proj + head
    assert find_targets(model, config()).matched_fraction == pytest.approx(up_and_proj / total)
    saved = LoraConfig(rank=2, targets=("up",), modules_to_save=("out",))
    assert find_targets(model, saved).matched_fraction == pytest.approx((2 * 8 * 16 + head) / total)
    assert "experts" not in find_targets(model, config()).describe()
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
        assert words in coverage.describe()
    with pytest.raises(ValueError, match=r"'down_proj' matches only parameters of fused experts.*method=peft"):
        find_targets(model, config(("down_proj",)))


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


def test_an_expression_that_takes_years_is_refused():
    with pytest.raises(ValueError, match="must be a regular expression, but got an error"):
        fits_pattern("re:(a|aa)+b", "a" * 200)

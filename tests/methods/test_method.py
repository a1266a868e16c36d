"""What holds for every method: it trains what it says, leaves the shared base alone, and gets back what it saved."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lorasweep.config.method import FullConfig
from lorasweep.errors import ConfigError, RecordError
from lorasweep.methods import bind, copy_sharing_weights

from .conftest import CONFIGS, METHODS, TOKENS, TRAINING, as_base, logits_of, make_base, prepare, train


def test_copy_has_its_own_modules_on_the_same_parameters():
    base = make_base()
    model = copy_sharing_weights(base.model)
    assert type(model) is type(base.model)
    assert all(own is not shared for own, shared in zip(model.modules(), base.model.modules(), strict=True))
    assert all(own is shared for own, shared in zip(model.parameters(), base.model.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config is not base.model.config
    assert not any(module.training for module in model.modules())


def make_loadable(base, name):
    """A model that the method's `load` takes."""
    return copy_sharing_weights(base.model) if METHODS[name].loads_onto_base else prepare(base, name, seed=1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TRAINING)
def test_training_improves_the_copy_which_comes_back_from_its_file_and_the_base_stays_bit_identical(
    name, tied, tmp_path
):
    base = make_base(tied=tied)
    before = copy.deepcopy(base.model.state_dict())
    first = prepare(base, name)
    losses = train(first, name)
    assert losses[-1] < losses[0]
    METHODS[name].save(first, tmp_path / "new" / "best", base=base)
    loaded = make_loadable(base, name)
    METHODS[name].load(loaded, tmp_path / "new" / "best")
    assert torch.equal(logits_of(loaded.eval(), name), logits_of(first.eval(), name))
    assert all(p.requires_grad for g in METHODS[name].trainable_groups(loaded, lr_ratio_b=1.0) for p in g.params)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert train(prepare(base, name), name) == losses  # the next run starts from the same place


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prepared_model_starts_as_the_base_and_trains_in_fp32_what_its_groups_hold(name):
    model = prepare(make_base(), name)
    groups = METHODS[name].trainable_groups(model, lr_ratio_b=1.0)
    grouped = [parameter for group in groups for parameter in group.params]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert set(map(id, grouped)) == set(map(id, trainable))
    assert len(grouped) == len(trainable)
    assert all(parameter.dtype == torch.float32 for parameter in grouped)
    base = make_base(dtype=torch.float32)
    expected = base.model(input_ids=TOKENS[:, :-1]).logits
    assert torch.equal(prepare(base, name)(input_ids=TOKENS[:, :-1]).logits, expected)


def test_number_of_trained_parameters_is_the_methods():
    base = make_base()
    layer = 2 * (4 * (16 + 16) + 3 * (16 + 24))  # rank 2 beside four attention and three MLP layers
    expected = {
        "lora": 2 * layer,
        "full": base.num_parameters,
        "head": 32 * 16,
        "norms": 5 * 16,
        "intrinsic": 40,
        "frozen": 0,
        "peft": 4 * (4 + 16),  # VeRA's two vectors, in two layers of two blocks
    }
    for name, number in expected.items():
        groups = METHODS[name].trainable_groups(prepare(base, name), lr_ratio_b=1.0)
        assert sum(parameter.numel() for group in groups for parameter in group.params) == number


def test_head_lets_go_of_the_embeddings():
    base = make_base(tied=True)
    model = prepare(base, "head")
    assert model.model.embed_tokens.weight is base.model.model.embed_tokens.weight
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.tie_weights()  # transformers calls this when it saves and loads
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert base.model.config.tie_word_embeddings


@pytest.mark.parametrize("name", TRAINING)
def test_missing_or_cut_off_file_is_a_record_error_and_changes_nothing(name, tmp_path):
    base = make_base()
    with pytest.raises(RecordError, match=str(tmp_path / "none")):
        METHODS[name].load(make_loadable(base, name), tmp_path / "none")
    METHODS[name].save(prepare(base, name), tmp_path, base=base)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-10])
    model = make_loadable(base, name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecordError, match=str(tmp_path)):
        METHODS[name].load(model, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_head_of_another_shape_and_a_model_without_one_are_refused(tmp_path):
    base = make_base()
    METHODS["head"].save(prepare(base, "head"), tmp_path, base=base)
    other = prepare(base, "head")
    other.lm_head = nn.Linear(16, 31, bias=False)
    with pytest.raises(RecordError, match=r"'lm_head.weight' differs"):
        METHODS["head"].load(other, tmp_path)
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"`method.parameters` must match .* 'lm_head\.\*' matches none.*'0.bias'"):
        METHODS["head"].prepare(as_base(model), generator=torch.Generator())
    with pytest.raises(ConfigError, match=r"`method.parameters` must be a regular expression"):
        bind(FullConfig(parameters="(")).check(model)


def test_biases_and_norms_train_by_their_names():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = as_base(BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)))
    names = [name for name, _ in base.model.named_parameters()]
    for pattern, wanted in ((".*bias", [".bias"]), (".*(bias|LayerNorm.*)", [".bias", "LayerNorm.weight"])):
        model = prepare(base, "full", config=FullConfig(parameters=pattern))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained == [name for name in names if name.endswith(tuple(wanted))]


@pytest.mark.parametrize("name", ["lora", "intrinsic"])
def test_what_a_method_draws_depends_on_its_generator_alone(name):
    base, drawn = make_base(), []
    for torch_seed, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(torch_seed)
        before = torch.get_rng_state()
        model = prepare(base, name, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append([*model.parameters(), *model.buffers()])
    equal = [all(torch.equal(x, y) for x, y in zip(drawn[0], other, strict=True)) for other in drawn[1:]]
    assert equal == [True, False]


def test_lora_plus_gives_b_its_own_rate():
    model = prepare(make_base(), "lora")
    groups = {group.name: group for group in METHODS["lora"].trainable_groups(model, lr_ratio_b=16.0)}
    assert {name: group.lr_factor for name, group in groups.items()} == {"lora_a": 1.0, "lora_b": 16.0}
    assert all(parameter.shape[0] == 2 for parameter in groups["lora_a"].params)
    assert all(parameter.shape[1] == 2 and not parameter.any() for parameter in groups["lora_b"].params)
    assert len(groups["lora_a"].params) == len(groups["lora_b"].params) == 14


def test_full_keeps_changes_that_bf16_could_not_hold():
    base = make_base()
    model = prepare(base, "full")
    train(model, "full", steps=1, lr=1e-6)
    for name, parameter in model.named_parameters():
        start = base.model.get_parameter(name)
        assert (parameter != start.float()).float().mean() > 0.5, name  # the text has most of the vocabulary
        # kept in bf16 it would not have moved, but where it is about as small as the step
        assert (parameter.bfloat16() == start).float().mean() > 0.95, name

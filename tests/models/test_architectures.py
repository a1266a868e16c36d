"""On each architecture that people use: a run adapts it, learns, saves, and both PEFT and we load what it saved."""

import re

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from tests.slot_gradients import read_slot_gradients
from torch.nn.functional import cross_entropy

from lorasweep.config.method import (
    FrozenConfig,
    FullConfig,
    IntrinsicConfig,
    LoraConfig,
    PeftConfig,
)
from lorasweep.lora import find_targets, inject_packed_lora
from lorasweep.lora.targets import GATE_NAMES
from lorasweep.methods import bind, copy_sharing_weights
from lorasweep.models.load import Labels, fingerprint_weights, load_base

CASES = [
    ("llama", "causal_lm", ()),
    ("gpt2", "causal_lm", ()),
    ("qwen2", "causal_lm", ()),
    ("qwen3", "causal_lm", ()),
    ("qwen3_next", "causal_lm", ()),
    ("qwen3_5", "causal_lm", ()),
    ("qwen3_5_with_images", "causal_lm", ()),
    ("glm4_moe", "causal_lm", ()),
    ("gemma3", "causal_lm", ()),
    ("bert", "classifier", ("classifier",)),
    ("bert_without_pooler", "classifier", ("bert.pooler", "classifier")),
    ("roberta", "classifier", ("classifier",)),
    ("llama", "classifier", ("score",)),
    ("gpt2", "classifier", ("score",)),
    ("qwen3", "classifier", ("score",)),
    ("t5", "classifier", ("classification_head",)),
]
FAMILIES = (("llama", "causal_lm"), ("gpt2", "causal_lm"), ("bert", "classifier"))
"""Those of every push; the others run before a release."""
CASES = [pytest.param(*case, marks=[pytest.mark.release] * (case[:2] not in FAMILIES)) for case in CASES]
HYBRIDS_AND_EXPERTS = ("qwen3_next", "qwen3_5", "qwen3_5_with_images", "glm4_moe")
PEFT = {"causal_lm": AutoPeftModelForCausalLM, "classifier": AutoPeftModelForSequenceClassification}
CONFIGS = {
    "frozen": FrozenConfig(),
    "lora": LoraConfig(rank=4, alpha=8),
    "full": FullConfig(),
    "head": FullConfig(parameters=r"(lm_head|classifier|score|classification_head)\..*"),
    "norms": FullConfig(parameters=r".*(bias|[nN]orm.*|ln_.*)"),
    "intrinsic": IntrinsicConfig(dim=32),
}
LABELS = Labels(kind="single_label", names=("calm", "loud"))
RATES = {"lora": 0.02, "peft": 0.02, "full": 0.005, "head": 0.05}


def make_batch():
    tokens = torch.arange(4 * 9).reshape(4, 9) % 40 + 60
    tokens[:, -1] = 256
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def loss_of(model, kind):
    batch = make_batch()
    logits = model(**batch).logits.float()
    if kind == "classifier":
        return cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def prepare(base, method, *, seed=0):
    return bind(CONFIGS[method]).prepare(base, generator=torch.Generator().manual_seed(seed))


def train(model, kind, method, *, steps=8):
    groups = bind(CONFIGS.get(method, PeftConfig())).trainable_groups(model, lr_ratio_b=1.0)
    optimizer = torch.optim.AdamW([{"params": group.params} for group in groups], lr=RATES[method])
    losses = []
    for _ in range(steps):
        loss = loss_of(model, kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def load(save_random, model_config):
    def load(architecture, kind, *, dtype=torch.float32):
        labels = LABELS if kind == "classifier" else None
        return load_base(model_config(save_random(architecture), kind=kind), dtype=dtype, labels=labels)

    return load


@pytest.mark.parametrize(("architecture", "kind", "head"), CASES)
def test_every_linear_layer_but_heads_and_gates_is_adapted(load, architecture, kind, head):
    coverage = find_targets(load(architecture, kind).model, LoraConfig(rank=2))
    names = {"lm_head"} if kind != "classifier" else {"classifier", "score", "out_proj", "dense"}
    assert {name.rpartition(".")[2] for name in coverage.unmatched} <= names | GATE_NAMES
    assert len(coverage.layers) >= 8  # two layers of two fused projections and two of the MLP at least


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("architecture", "kind", "head"), CASES)
def test_a_run_learns_and_leaves_the_base_as_it_was(load, architecture, kind, head, method):
    base = load(architecture, kind)
    losses = train(prepare(base, method), kind, method)
    # a frozen embedding of random weights leaves LoRA little to gain, and a few steps may overshoot
    assert min(losses) < 0.99 * losses[0]
    assert fingerprint_weights(base.model, exclude=head) == base.fingerprint


@pytest.mark.parametrize("method", [name for name in CONFIGS if name != "frozen"])
@pytest.mark.parametrize(("architecture", "kind", "head"), CASES)
def test_all_methods_compute_in_one_precision(load, architecture, kind, head, method):
    """With a bf16 base, a model that has not yet trained scores like the frozen one, to the last bit.

    The gated norms and the experts of Qwen3-Next and Qwen3.5 multiply bf16 activations by a weight outside of linear
    layers, where autocast rounds an fp32 weight's product later.
    """
    base = load(architecture, kind, dtype=torch.bfloat16)
    logits = []
    for name in ("frozen", method):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bind(CONFIGS[name]).needs_autocast):
            logits.append(prepare(base, name).eval()(**make_batch()).logits)
    frozen, trained = (values.float() for values in logits)
    roundings = 8 if architecture in HYBRIDS_AND_EXPERTS else 0  # at most 4 in each of 2 layers
    assert (trained - frozen).abs().max() <= roundings * torch.finfo(torch.bfloat16).eps * frozen.abs().max()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers
@pytest.mark.parametrize(("architecture", "kind", "head"), CASES)
def test_peft_and_we_load_what_a_run_saved(load, save_random, architecture, kind, head, tmp_path):
    base = load(architecture, kind)
    model = prepare(base, "lora")
    train(model, kind, "lora", steps=3)
    bind(CONFIGS["lora"]).save(model, tmp_path, base=base)
    loaded, ours = PEFT[kind].from_pretrained(tmp_path), prepare(base, "lora", seed=1)
    bind(CONFIGS["lora"]).load(ours, tmp_path)
    with torch.no_grad():
        expected, got, own = (m.eval()(**make_batch()).logits for m in (model, loaded, ours))
    # fp32 sums in another order: PEFT adds the change to the output, we add into it
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(own, expected)


def randomise(model, *, seed):
    """Gives all that trains random values, so that the updates are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.release
@pytest.mark.parametrize("architecture", HYBRIDS_AND_EXPERTS)
def test_a_slot_of_a_pack_gets_the_logits_and_gradients_of_its_solo_run(load, architecture):
    base, configs = load(architecture, "causal_lm"), [LoraConfig(rank=2), LoraConfig(rank=4)]
    pack, lengths = copy_sharing_weights(base.model), torch.tensor([9, 3, 6, 4])
    slots = inject_packed_lora(pack, configs, generators=[torch.Generator().manual_seed(slot) for slot in range(2)])
    for slot, solo in enumerate(slots.models):
        randomise(solo, seed=slot)
    tokens = make_batch()["input_ids"]
    batch = {"input_ids": tokens, "attention_mask": (torch.arange(9) < lengths[:, None]).long()}
    is_real = batch["attention_mask"].bool()
    packed = pack(**batch).logits
    packed[is_real].square().sum().backward()
    for slot, config in enumerate(configs):
        solo = bind(config).prepare(base, generator=torch.Generator().manual_seed(slot))
        randomise(solo, seed=slot)
        rows = {name: values.chunk(2)[slot] for name, values in batch.items()}
        logits = solo(**rows).logits[rows["attention_mask"].bool()]
        logits.square().sum().backward()
        pairs = [(packed.chunk(2)[slot][rows["attention_mask"].bool()], logits)]
        gradients = read_slot_gradients(slots, slot)
        assert len(gradients) == sum(parameter.requires_grad for parameter in solo.parameters())
        pairs += [(gradient, solo.get_parameter(name).grad) for name, gradient in gradients.items()]
        for got, expected in pairs:  # fp32 sums in another order, over up to 1,000 terms
            limit = 1000 * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (got - expected).abs().max() <= limit


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers
def test_fused_experts_train_with_the_settings_that_the_warning_names(load, tmp_path):
    base = load("qwen3_moe", "causal_lm")
    warning = bind(CONFIGS["lora"]).find_coverage(base.model).note.text
    settings = yaml.safe_load(re.search(r"method.config=({.*})`", warning)[1])
    model = bind(PeftConfig(config=settings)).prepare(base, generator=torch.Generator().manual_seed(0))
    changed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".experts." in name for name in changed)
    assert not any(".gate." in name for name in changed)  # the router
    losses = train(model, "causal_lm", "peft")
    assert losses[-1] < losses[0]
    bind(PeftConfig()).save(model, tmp_path / "adapter", base=base)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**make_batch()).logits, model.eval()(**make_batch()).logits)

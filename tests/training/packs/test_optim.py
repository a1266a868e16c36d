from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lorasweep.config.run import OptimConfig
from lorasweep.lora import (
    LoraConfig,
    compact_slots,
    fill_slot,
    inject_lora,
    inject_packed_lora,
    lora_state,
    set_dropout_streams,
    slot_model,
    split_lora_parameters,
)
from lorasweep.lora.packed.layers import packed_layers
from lorasweep.methods import ParameterGroup
from lorasweep.training.optim import build_optimizer
from lorasweep.training.packs.optim import StackedAdamW

ROWS, LENGTH, VOCABULARY = 2, 6, 23
TIGHT = {
    "rtol": 1e-10,
    "atol": 1e-13,
}  # float64: sums of a few hundred terms in another order, carried through 50 steps


def make_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).double().train()


def make_bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config).double().train()


LLAMA_SLOTS = (
    LoraConfig(rank=1, alpha=4),
    LoraConfig(rank=4, alpha=8, scaling="alpha_over_sqrt_rank", targets=("q_proj", "v_proj"), dropout=0.2),
    LoraConfig(rank=3, init="gaussian", targets=("up_proj", "embed_tokens", "k_proj[0:5,9:16]"), dropout=0.5),
    LoraConfig(rank=2, init="orthogonal", targets="o_proj", layers=(1,), modules_to_save=("lm_head",)),
)
BERT_SLOTS = (
    LoraConfig(rank=2, dropout=0.3, exclude=("pooler.dense",), modules_to_save=("classifier",)),
    LoraConfig(rank=5, alpha=3, targets=("query", "value"), modules_to_save=("classifier",)),
    LoraConfig(rank=1, targets="word_embeddings", dropout=0.1, modules_to_save=("classifier", "pooler")),
    LoraConfig(rank=3, targets=("dense",), exclude=("pooler.dense",), dropout=0.1),
)


def settings(**changes: float | None) -> OptimConfig:
    given: dict[str, float | None] = {
        "lr": 1e-2,
        "lr_ratio_b": 1.0,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
    }
    given |= {"lr_ratio_head": 1.0, "layer_decay": 1.0, "ema_decay": None}
    return OptimConfig(name="adamw", **({"clip_norm": None} | given | changes))  # type: ignore[arg-type]


SETTINGS = (
    settings(weight_decay=0.1),
    settings(lr=3e-3, lr_ratio_b=4.0, lr_ratio_head=3.0, beta1=0.8, clip_norm=0.05),
    settings(lr=2e-2, beta2=0.95, eps=1e-6, weight_decay=0.01),
    settings(lr=1e-3, lr_ratio_b=0.5, weight_decay=0.3, clip_norm=1.0),
)


def draw_batches(slot: int, num_steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(50 + slot)
    return [torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(num_steps)]


def row_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """One loss per row, of the next token or of a class."""
    logits = model(input_ids=tokens).logits
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, tokens[:, 0] % logits.shape[1], reduction="none")
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    return losses.mean(1)


def lr_factor(slot: int, step: int) -> float:
    return 1 - step / (60 + 10 * slot)


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class SoloRun:
    """What a run of one slot's configuration does without a pack."""

    def __init__(self, model: nn.Module, config: LoraConfig, optim: OptimConfig, slot: int) -> None:
        inject_lora(model, config, generator=stream(slot))
        self.model, self.optim, self.slot = model.double(), optim, slot
        a, b, other = split_lora_parameters(model)
        groups = [
            ParameterGroup(name="a", params=tuple(a), lr_factor=1.0),
            ParameterGroup(name="b", params=tuple(b), lr_factor=optim.lr_ratio_b),
            ParameterGroup(name="other", params=tuple(other), lr_factor=optim.lr_ratio_head),
        ]
        self.optimizer = build_optimizer(optim, groups)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.losses: list[Tensor] = []
        with torch.random.fork_rng():
            torch.manual_seed(900 + slot)
            self.rng = torch.get_rng_state()

    def train(self, batches: Sequence[Tensor]) -> None:
        with torch.random.fork_rng():
            torch.set_rng_state(self.rng)
            for tokens in batches:
                self._step(tokens)
            self.rng = torch.get_rng_state()

    def _step(self, tokens: Tensor) -> None:
        loss = row_losses(self.model, tokens).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.optim.clip_norm is not None:
            trains = [p for p in self.model.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(trains, self.optim.clip_norm)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * lr_factor(self.slot, len(self.losses))
        self.optimizer.step()
        self.losses.append(loss.detach())


class PackedRun:
    """The same for all slots at once; `seeds` say which solo run each slot is."""

    def __init__(self, model: nn.Module, configs: Sequence[LoraConfig], optims: Sequence[OptimConfig]) -> None:
        self.seeds = list(range(len(configs)))
        inject_packed_lora(model, configs, generators=[stream(seed) for seed in self.seeds])
        self.model = model.double()
        self.streams = [stream(900 + seed) for seed in self.seeds]
        set_dropout_streams(model, self.streams)
        self.optimizer = StackedAdamW(split_lora_parameters(model), optims)
        self.losses: list[list[Tensor]] = [[] for _ in configs]

    def train(self, batches: Sequence[Sequence[Tensor]]) -> None:
        """One list of batches for each slot."""
        for tokens in zip(*batches, strict=True):
            self.step(tokens)

    def step(self, tokens: Sequence[Tensor]) -> None:
        losses = row_losses(self.model, torch.cat(list(tokens))).view(len(tokens), -1).mean(1)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.clip_gradients()
        for slot, seed in enumerate(self.seeds):
            self.optimizer.lr_factors[slot] = lr_factor(seed, len(self.losses[slot]))
            self.losses[slot].append(losses[slot].detach())
        self.optimizer.step()


def assert_same_trial(pack: PackedRun, slot: int, solo: SoloRun) -> None:
    torch.testing.assert_close(torch.stack(pack.losses[slot]), torch.stack(solo.losses), **TIGHT)
    packed, expected = lora_state(slot_model(pack.model, slot)), lora_state(solo.model)
    assert packed.keys() == expected.keys()
    torch.testing.assert_close(packed, expected, **TIGHT)


MODELS = pytest.mark.parametrize(
    ("make", "configs"), [(make_llama, LLAMA_SLOTS), (make_bert, BERT_SLOTS)], ids=["llama", "bert"]
)


@MODELS
def test_a_pack_equals_separate_runs(make: Callable[[], nn.Module], configs: Sequence[LoraConfig]) -> None:
    batches = [draw_batches(slot, 50) for slot in range(len(configs))]
    model = make()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = dict(model.named_parameters())
    pack = PackedRun(model, configs, SETTINGS)
    pack.train(batches)
    for slot, config in enumerate(configs):
        solo = SoloRun(make(), config, SETTINGS[slot], slot)
        solo.train(batches[slot])
        assert_same_trial(pack, slot, solo)
        assert solo.losses[-1] != solo.losses[0]
    assert all(torch.equal(frozen[name], value) for name, value in base.items())


@MODELS
def test_padded_parts_stay_zero(make: Callable[[], nn.Module], configs: Sequence[LoraConfig]) -> None:
    pack = PackedRun(make(), configs, [dataclasses.replace(s, weight_decay=0.1) for s in SETTINGS])
    pack.train([draw_batches(slot, 20) for slot in range(len(configs))])
    for layer in packed_layers(pack.model).values():
        for slot, change in enumerate(layer.targets):
            width = 0 if change is None else change.total_rank
            assert not layer.lora_a[slot, width:].any()
            assert not layer.lora_b[slot, :, width:].any()
            if change is not None:
                assert layer.lora_b[slot].any()
                assert layer.b_mask is None or not layer.lora_b[slot][~layer.b_mask[slot]].any()


@MODELS
def test_slots_that_join_and_leave_are_their_solo_runs(
    make: Callable[[], nn.Module], configs: Sequence[LoraConfig]
) -> None:
    first, second, third, late = configs
    late_settings = SETTINGS[3]
    pack = PackedRun(make(), [first, second, third], SETTINGS[:3])
    batches = [draw_batches(seed, 30) for seed in range(4)]
    pack.train([b[:10] for b in batches[:3]])

    fill_slot(pack.model, 1, late, generator=stream(3))  # a new trial in place of the second
    pack.optimizer.replace_parameters(split_lora_parameters(pack.model))
    pack.optimizer.reset_slot(1, late_settings)
    pack.seeds[1], pack.losses[1], pack.streams[1] = 3, [], stream(903)
    set_dropout_streams(pack.model, pack.streams)
    pack.train([batches[0][10:20], batches[3][:10], batches[2][10:20]])

    compact_slots(pack.model, [2, 1])  # the first leaves, the others change places
    pack.optimizer.replace_parameters(split_lora_parameters(pack.model), kept_slots=[2, 1])
    pack.seeds, pack.losses = [2, 3], [pack.losses[2], pack.losses[1]]
    assert pack.optimizer.num_steps == [20, 10]
    pack.train([batches[2][20:30], batches[3][10:20]])

    for slot, (seed, config, num_steps) in enumerate([(2, third, 30), (3, late, 20)]):
        solo = SoloRun(make(), config, SETTINGS[seed], seed)
        solo.train(batches[seed][:num_steps])
        assert_same_trial(pack, slot, solo)


def test_a_slot_of_nan_leaves_the_others_bit_identical() -> None:
    batches = [draw_batches(slot, 8) for slot in range(4)]
    healthy, broken = (PackedRun(make_llama(), LLAMA_SLOTS, SETTINGS) for _ in range(2))
    with torch.no_grad():
        for layer in packed_layers(broken.model).values():
            layer.lora_a[1] = float("nan")
            layer.lora_b[1] = float("inf")
    for pack in (healthy, broken):
        pack.train(batches)
    assert torch.stack(broken.losses[1]).isnan().all()
    for slot in (0, 2, 3):
        assert broken.losses[slot] == healthy.losses[slot]
        expected = lora_state(slot_model(healthy.model, slot))
        own = lora_state(slot_model(broken.model, slot))
        assert all(torch.equal(value, expected[key]) for key, value in own.items())

    fill_slot(broken.model, 1, LLAMA_SLOTS[1], generator=stream(1))  # and the slot can be used again
    broken.optimizer.reset_slot(1, SETTINGS[1])
    broken.losses[1] = []
    broken.train(batches)
    assert torch.stack(broken.losses[1]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_slot_equals_torch_adamw(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 5), (4, 6, 3), (4, 2, 7), (4, 7))  # A, B, a head and its bias
    stacked = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    optimizer = StackedAdamW((stacked[:1], stacked[1:2], stacked[2:]), SETTINGS)
    copies = [[nn.Parameter(p[slot].detach().clone()) for p in stacked] for slot in range(4)]
    solos = []
    for config, (a, b, *other) in zip(SETTINGS, copies, strict=True):
        groups = [((a,), 1.0), ((b,), config.lr_ratio_b), (tuple(other), config.lr_ratio_head)]
        named = [ParameterGroup(name="g", params=params, lr_factor=factor) for params, factor in groups]
        solos.append(build_optimizer(config, named))
    for _ in range(100):
        grads = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        for index, (parameter, grad) in enumerate(zip(stacked, grads, strict=True)):
            parameter.grad = grad
            for slot in range(4):
                copies[slot][index].grad = grad[slot].clone()
        norms = optimizer.clip_gradients()
        for slot, config in enumerate(SETTINGS):
            norm = nn.utils.clip_grad_norm_(copies[slot], config.clip_norm or float("inf"))
            torch.testing.assert_close(norm, norms[slot])
        for one in (optimizer, *solos):
            one.step()
    # the same operations in the same order; a fused multiply-add may round once less
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
    for index, parameter in enumerate(stacked):
        expected = torch.stack([copies[slot][index] for slot in range(4)])
        torch.testing.assert_close(parameter, expected, **tolerance)


def test_a_parameter_without_a_gradient_stays() -> None:
    used, unused = (nn.Parameter(torch.ones(2, 3, 4)) for _ in range(2))
    optimizer = StackedAdamW(([used, unused], [], []), [settings(weight_decay=0.5)] * 2)
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2, 3, 4))
    assert (used < 1).all()

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorasweep.config.compose import compose_run
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
from lorasweep.lora.inject import replace_dropout
from lorasweep.methods import ParameterGroup
from lorasweep.training.optim import build_optimizer, build_schedule
from lorasweep.training.packs.slot_run import SlotOptimizer, step_slots

ROWS, LENGTH, VOCABULARY = 2, 6, 23
TIGHT = {"rtol": 1e-10, "atol": 1e-13}  # float64: sums of a few hundred terms in another order, through 50 steps


def make_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=16)
    return LlamaForCausalLM(config).double().train()


LLAMA_SLOTS = (
    LoraConfig(rank=1, alpha=4),
    LoraConfig(rank=4, alpha=8, scaling="alpha_over_sqrt_rank", targets=("q_proj", "v_proj"), dropout=0.2),
    LoraConfig(rank=3, targets=("up_proj", "k_proj"), dropout=0.5),
    LoraConfig(rank=2, targets=("o_proj",), layers=(1,), modules_to_save=("lm_head",)),
)


def settings(**changes):
    given = {"lr": 1e-2, "weight_decay": 0.0, "clip_norm": None} | changes
    return compose_run({"schedule": "linear", "trainer.max_steps": 60, **{f"optim.{k}": v for k, v in given.items()}})


SETTINGS = (
    settings(weight_decay=0.1),
    settings(lr=3e-3, lr_ratio_b=4.0, beta1=0.8, clip_norm=0.05),
    settings(lr=2e-2, beta2=0.95, eps=1e-6, weight_decay=0.01),
    settings(lr=1e-3, lr_ratio_b=0.5, weight_decay=0.3, clip_norm=1.0),
)


def draw_batches(slot, num_steps):
    generator = torch.Generator().manual_seed(50 + slot)
    return [torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(num_steps)]


def row_losses(model, tokens):
    """One loss per row, of the next token."""
    logits = model(input_ids=tokens).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    return losses.mean(1)


def stream(seed):
    return torch.Generator().manual_seed(seed)


class SoloRun:
    """What a run of one slot's configuration does without a pack."""

    def __init__(self, model, config, run, slot):
        inject_lora(model, config, generator=stream(slot))
        replace_dropout(model)
        self.model, self.clip_norm = model.double(), run.optim.clip_norm
        a, b, other = map(tuple, split_lora_parameters(model))
        groups = [
            ParameterGroup(name="a", params=a, lr_factor=1.0),
            ParameterGroup(name="b", params=b, lr_factor=run.optim.lr_ratio_b),
            ParameterGroup(name="other", params=other, lr_factor=1.0),
        ]
        self.optimizer = build_optimizer(run.optim, groups)
        self.schedule = build_schedule(run, self.optimizer)
        self.losses: list[Tensor] = []
        with torch.random.fork_rng():
            torch.manual_seed(900 + slot)
            self.rng = torch.get_rng_state()

    def train(self, batches):
        with torch.random.fork_rng():
            torch.set_rng_state(self.rng)
            for tokens in batches:
                self._step(tokens)
            self.rng = torch.get_rng_state()

    def _step(self, tokens):
        loss = row_losses(self.model, tokens).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.detach())


class PackedRun:
    """The same for all slots at once; `seeds` say which solo run each slot is."""

    def __init__(self, model, configs, runs):
        self.seeds = list(range(len(configs)))
        inject_packed_lora(model, configs, generators=[stream(seed) for seed in self.seeds])
        self.model = model.double()
        self.streams = [stream(900 + seed) for seed in self.seeds]
        set_dropout_streams(model, self.streams)
        self.optimizers = [self.build_optimizer(slot, run) for slot, run in enumerate(runs)]
        self.losses: list[list[Tensor]] = [[] for _ in configs]

    def build_optimizer(self, slot, run):
        return SlotOptimizer(slot_model(self.model, slot), run)

    def train(self, batches):
        """One list of batches for each slot."""
        for tokens in zip(*batches, strict=True):
            losses = row_losses(self.model, torch.cat(list(tokens))).view(len(tokens), -1).mean(1)
            losses.sum().backward()
            step_slots(self.optimizers)
            for slot in range(len(tokens)):
                self.losses[slot].append(losses[slot].detach())


def assert_same_trial(pack, slot, solo):
    torch.testing.assert_close(torch.stack(pack.losses[slot]), torch.stack(solo.losses), **TIGHT)
    packed, expected = lora_state(slot_model(pack.model, slot)), lora_state(solo.model)
    assert packed.keys() == expected.keys()
    torch.testing.assert_close(packed, expected, **TIGHT)


def test_slots_that_join_and_leave_are_their_solo_runs():
    first, second, third, late = LLAMA_SLOTS
    pack = PackedRun(make_llama(), [first, second, third], SETTINGS[:3])
    batches = [draw_batches(seed, 30) for seed in range(4)]
    pack.train([b[:10] for b in batches[:3]])

    fill_slot(pack.model, 1, late, generator=stream(3))  # a new trial in place of the second
    slot_model(pack.model, 1).double()
    pack.optimizers[1] = pack.build_optimizer(1, SETTINGS[3])
    pack.seeds[1], pack.losses[1], pack.streams[1] = 3, [], stream(903)
    set_dropout_streams(pack.model, pack.streams)
    pack.train([batches[0][10:20], batches[3][:10], batches[2][10:20]])

    compact_slots(pack.model, [2, 1])  # the first leaves, the others change places
    pack.optimizers = [pack.optimizers[2], pack.optimizers[1]]
    pack.seeds, pack.losses = [2, 3], [pack.losses[2], pack.losses[1]]
    pack.train([batches[2][20:30], batches[3][10:20]])

    for slot, (seed, config, num_steps) in enumerate([(2, third, 30), (3, late, 20)]):
        solo = SoloRun(make_llama(), config, SETTINGS[seed], seed)
        solo.train(batches[seed][:num_steps])
        assert_same_trial(pack, slot, solo)


FP32_RUNS = (
    settings(weight_decay=0.1, clip_norm=0.5),
    settings(lr=3e-3, lr_ratio_b=4.0, beta1=0.8),
    settings(lr=2e-2, beta2=0.95, eps=1e-6, clip_norm=2.0),
)
SCALES = (0.01, 0.5, 3.0, 0.02, 1.0)
"""Size of the gradients in each step, so that some steps are clipped and others are not."""


def draw_gradients(parameters, scale, seed):
    """Returns gradients whose elements have sizes from 0.5 to 1.5, times a scale."""
    generator = stream(seed)
    return [
        scale
        * (0.5 + torch.rand(p.shape, generator=generator))
        * (2 * torch.randint(2, p.shape, generator=generator) - 1)
        for p in parameters
    ]


@pytest.mark.parametrize("rank", [1, 4])
def test_slots_in_fp32_step_like_torchs_clipping_and_adamw(rank):
    def get_trained(model):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    alone, slots, optimizers = [], [], []
    for seed, run in enumerate(FP32_RUNS):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        inject_lora(model, LoraConfig(rank=rank, modules_to_save=("1",)))
        slots.append(copy.deepcopy(model))
        a, b, other = map(tuple, split_lora_parameters(model))
        groups = [("a", a, 1.0), ("b", b, run.optim.lr_ratio_b), ("other", other, 1.0)]
        groups = [ParameterGroup(name=name, params=params, lr_factor=factor) for name, params, factor in groups]
        optimizer = build_optimizer(run.optim, groups)
        alone.append((model, optimizer, build_schedule(run, optimizer)))
        optimizers.append(SlotOptimizer(slots[-1], run))
    for step, scale in enumerate(SCALES):
        rates = [schedule.get_last_lr()[0] for *_, schedule in alone]
        for slot, (model, optimizer, schedule) in enumerate(alone):
            gradients = draw_gradients(get_trained(model), scale, seed=10 * step + slot)
            for own, theirs, grad in zip(get_trained(slots[slot]), get_trained(model), gradients, strict=True):
                own.grad.copy_(grad)
                theirs.grad = grad.clone()
            if (limit := FP32_RUNS[slot].optim.clip_norm) is not None:
                nn.utils.clip_grad_norm_(get_trained(model), limit)
            optimizer.step()
            schedule.step()
        assert step_slots(optimizers) == rates
        assert not any(slot.gradient.any() for slot in optimizers)
    for slot, (model, _, _) in enumerate(alone):
        run = FP32_RUNS[slot]
        eps, count = torch.finfo(torch.float32).eps, sum(p.numel() for p in get_trained(model))
        # The norms are sums of `count` squares in another order, so each gradient differs by `count` roundings, and the
        # mean and the root of Adam too. Their ratio is at most 1 / sqrt(1 - beta2), whatever the gradients are.
        largest = run.optim.lr * run.optim.lr_ratio_b / (1 - run.optim.beta2) ** 0.5
        bound = len(SCALES) * (largest * 2 * (count + 8) * eps + 4 * eps)
        for own, theirs in zip(get_trained(slots[slot]), get_trained(model), strict=True):
            torch.testing.assert_close(own, theirs, rtol=0, atol=bound)

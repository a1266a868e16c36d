"""DPO equals its formula, alone and in packs; the base is its zero; the base's numbers survive kills."""

import math
from dataclasses import replace

import pytest
import torch
from tests.slot_gradients import read_slot_gradients
from tests.small_runs import SMALL_RUN
from tests.tasks.preferences.pairs import compute_log_p, make_pairs, make_preference_inputs, make_small
from tests.training.runs import settings_of, train
from torch.nn.functional import logsigmoid

from lorasweep.config.compose import compose_run
from lorasweep.data.batching import BatchDataset, ProcessShare, StepBatchSampler
from lorasweep.data.rows import move_batch
from lorasweep.errors import ConfigError
from lorasweep.objectives.objective import ExampleScores
from lorasweep.sweep.cost import estimate_cost
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.measure import scale_up, train_briefly
from lorasweep.tasks.preferences.dpo import Dpo
from lorasweep.tasks.splits import build_objective
from lorasweep.tasks.task import read_source
from lorasweep.training.evaluation import evaluate_model, score_split
from lorasweep.training.finished_run import restore_model
from lorasweep.training.inputs import InputsCache, inputs_key
from lorasweep.training.pack_size import PackSize
from lorasweep.training.prepare import prepare_model, prepare_slots
from lorasweep.training.reference import REFERENCE_FOLDER
from lorasweep.training.step import SlotNumbers, compute_losses

RUN = SMALL_RUN | {"objective": "dpo", "trainer.batch_size": 6, "optim.lr": 3e-3, "logger": "none"}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
"""float64: sums of some hundred terms in another order."""


def make_config(settings=None, /, *, beta=0.1):
    return compose_run(RUN | {"objective.beta": beta} | (settings or {}))


def make_inputs(config, *, dtype=torch.float32, model=None, folder=None, number=24):
    """Inputs with a small random model, whose reference is computed."""
    inputs = make_preference_inputs(config, number=number)
    base = replace(inputs.base, model=make_small(dtype) if model is None else model)
    return replace(inputs, base=base).prepare(config, folder=folder)


def compute_plainly(model, base, split, index, *, beta, smoothing):
    """Returns loss and margin of one pair by the formula."""
    rows = 2 * index, 2 * index + 1
    chosen, rejected = (compute_log_p(model, split, row).sum() - compute_log_p(base, split, row).sum() for row in rows)
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin), margin


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("by_chunk", [False, True])
def test_loss_gradient_and_metrics_are_those_of_the_formula(smoothing, by_chunk, exact_norms):
    config = make_config({"objective.label_smoothing": smoothing}, beta=0.5)
    inputs = make_inputs(config, dtype=torch.float64)
    objective, split = replace(inputs.data.objective, by_chunk=by_chunk), inputs.data.train
    model = make_small(torch.float64).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, dtype=torch.float64)
    indices = [3, 0, 7]
    batch = move_batch(split.batch(indices), torch.device("cpu")) | {"beta": torch.full((6,), 0.5)}
    found = objective.losses(model, batch)
    gradients = torch.autograd.grad(found.sum(), [*model.parameters()])
    plain = [
        compute_plainly(model, inputs.base.model, split, index, beta=0.5, smoothing=smoothing) for index in indices
    ]
    expected, margins = (torch.stack(values) for values in zip(*plain, strict=True))
    wanted = {"preference_accuracy": (margins > 0).double().mean(), "reward_margin": margins.mean()}
    wanted = {name: float(value.detach()) for name, value in (wanted | {"loss": expected.mean()}).items()}
    torch.testing.assert_close(found, expected, **TIGHT)
    for one, two in zip(gradients, torch.autograd.grad(expected.sum(), [*model.parameters()]), strict=True):
        torch.testing.assert_close(one, two, **TIGHT)
    with torch.no_grad():
        scores = objective.score(model, batch)
    values = {name: float(value) for name, value in objective.compute(scores).items()}
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    shift = values["chosen_shift"] - values["rejected_shift"]
    assert 0.5 * shift == pytest.approx(values["reward_margin"], rel=1e-9)
    before = float(batch["reference"].view(-1, 2)[:, 0].double().mean())
    assert values["chosen_log_probability"] == pytest.approx(before + values["chosen_shift"], rel=1e-9)
    for name, value in values.items():
        by_pair, weights = objective.per_example(name, scores)
        assert (len(by_pair), float((by_pair * weights).sum() / weights.sum())) == (3, pytest.approx(value))


def test_a_tie_counts_half():
    margins = torch.tensor([0.5, 0.0, -0.5, 0.0], dtype=torch.float64)
    scores = ExampleScores(loss=margins, items=torch.ones(4), prediction=margins, details=torch.zeros(4, 4))
    assert Dpo().per_example("preference_accuracy", scores)[0].tolist() == [1.0, 0.5, 0.0, 0.5]
    assert Dpo().compute(scores)["preference_accuracy"] == 0.5


@pytest.mark.parametrize("settings", [{}, {"trainer.eval_batch_size": 7}])
def test_the_frozen_base_has_exactly_a_half_and_ln_2(settings, tmp_path):
    config = make_config({"method": "frozen", "trainer.precision": "fp32"} | settings)
    inputs = make_inputs(make_config(), number=200)
    record = train(tmp_path / "run", config, inputs=inputs)
    record_values = {name: value for name, value in record.best.items() if name != "step"}
    assert (
        record_values.items()
        >= {
            "preference_accuracy": 0.5,
            "reward_margin": 0.0,
            "loss": pytest.approx(math.log(2), rel=1e-15),
            "chosen_shift": 0.0,
            "rejected_shift": 0.0,
        }.items()
    )
    values = score_split(inputs.base.model, inputs.data, config=config, inputs=inputs).values
    same = [name for name in values if "log_probability" not in name]  # of answers of other pairs
    assert {name: values[name] for name in same} == {name: record_values[name] for name in same}


@pytest.mark.parametrize("method", ["lora", "peft"])  # one that is put onto the base, and one that PEFT restores
def test_restored_weights_are_no_frozen_base(method, tmp_path):
    config = make_config(settings_of(method) | {"optim.lr": 3e-2})
    inputs = make_inputs(config)
    record = train(tmp_path, config, inputs=inputs)
    restored = restore_model(config, inputs.base, folder=tmp_path / "best")
    values, _ = evaluate_model(
        restored, inputs.data.validation, objective=inputs.data.objective, config=config, inputs=inputs
    )
    assert values["reward_margin"] != 0
    best = {name: value for name, value in record.best.items() if name != "step"}
    # fp32, in batches of another shape: PEFT and a head compute the saved weights in another order
    assert values == pytest.approx(best, rel=1e-4, abs=1e-5)


def sample_step(split, *, seed=0, **settings):
    return StepBatchSampler(split, num_steps=1, seed=seed, group_by_length=True, **settings).get_step(0)


def compute(model, micros, *, inputs, configs):
    """Returns the losses of the slots' micro-batches, and does the backward pass."""
    objective = inputs.data.objective
    batch = SlotNumbers(configs, objective).add_to(BatchDataset(inputs.data.train)[micros])
    losses = compute_losses(model, batch, objective=objective)
    losses.sum().backward()
    return losses.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_slots_with_other_betas_have_the_losses_and_gradients_of_runs_alone(checkpointing, exact_norms):
    settings = {"trainer.activation_checkpointing": checkpointing, "trainer.accumulate": 2}
    configs = [make_config(settings | {"method.rank": rank}, beta=beta) for rank, beta in ((2, 0.05), (3, 0.5))]
    inputs = make_inputs(configs[0], dtype=torch.float64)
    packs = [prepare_slots(each, inputs.base) for each in (configs, configs[:1], configs[1:])]
    for number, (pack, slots) in enumerate(packs):
        pack.double()
        slots.weights.double()
        for slot, solo in enumerate(slots.models, start=max(number - 1, 0)):
            generator = torch.Generator().manual_seed(slot)
            for values in (parameter.detach() for parameter in solo.parameters() if parameter.requires_grad):
                values.copy_(0.1 * torch.randn(values.shape, generator=generator, dtype=torch.float64))
    steps = [sample_step(inputs.data.train, batch_size=6, seed=seed, accumulate=2) for seed in (0, 1)]
    for micros in zip(*steps, strict=True):
        found, *alone = (
            compute(pack, part, inputs=inputs, configs=each)
            for (pack, _), part, each in zip(
                packs, (micros, micros[:1], micros[1:]), (configs, configs[:1], configs[1:]), strict=True
            )
        )
        torch.testing.assert_close(found, torch.cat(alone), **TIGHT)
    for slot, (_, slots) in enumerate(packs[1:]):
        gradients = read_slot_gradients(packs[0][1], slot)
        assert all(gradient.any() for gradient in gradients.values())
        torch.testing.assert_close(gradients, read_slot_gradients(slots, 0), **TIGHT)


def test_processes_and_micro_batches_share_pairs_and_never_part_them():
    split, config = make_pairs("train", number=11, seed=3), make_config()
    [micro] = sample_step(split, batch_size=7)
    shares = [ProcessShare(rank, 2).select(micro) for rank in range(2)]
    assert sorted(index for share in shares for index in share.indices) == sorted(micro.indices)
    inputs = make_inputs(config)
    model = prepare_model(config, inputs.base)

    def compute_sum(micros):
        return sum(compute(model, (micro,), inputs=inputs, configs=[config]).item() for micro in micros)

    whole = compute_sum([micro])
    assert compute_sum(shares) == pytest.approx(whole, rel=1e-5)
    assert compute_sum(sample_step(inputs.data.train, batch_size=7, accumulate=3)) == pytest.approx(whole, rel=1e-5)


def read_files(folder):
    return sorted((folder / REFERENCE_FOLDER).glob("*.safetensors"))


@pytest.fixture
def calls(monkeypatch):
    """The pairs that the base scores."""
    seen, true = [], Dpo.compute_reference

    def compute(objective, model, batch):
        seen.append(len(batch["input_ids"]) // 2)
        return true(objective, model, batch)

    monkeypatch.setattr(Dpo, "compute_reference", compute)
    return seen


def test_a_second_process_reads_the_numbers_of_the_first(tmp_path, calls):
    config = make_config()
    first = make_inputs(config, folder=tmp_path)
    calls.clear()
    second = make_inputs(config, folder=tmp_path)
    assert calls == []
    assert torch.equal(second.data.train.columns["reference"], first.data.train.columns["reference"])
    make_inputs(make_config({"trainer.eval_batch_size": 3}), folder=tmp_path)  # other batches round in another way
    assert sum(calls) == 48


def test_another_base_or_precision_has_its_own_numbers(tmp_path, calls):
    config = make_config()
    first = make_inputs(config, folder=tmp_path)
    other = make_small()
    other.lm_head.weight.data += 0.1
    inputs = make_preference_inputs(config)
    for base in (
        replace(inputs.base, model=other, fingerprint="other"),
        replace(inputs.base, model=make_small(torch.bfloat16)),
    ):
        calls.clear()
        second = replace(inputs, base=base).prepare(config, folder=tmp_path)
        assert sum(calls) == 48
        assert not torch.equal(first.data.train.columns["reference"], second.data.train.columns["reference"])


def test_the_test_split_is_scored_at_its_first_use_and_nothing_twice(tmp_path, calls):
    config = make_config()
    inputs = make_inputs(config, folder=tmp_path)
    assert sum(calls) == 2 * 24
    assert inputs.prepare(config, folder=tmp_path) is inputs
    assert inputs.data.test() is inputs.data.test()
    assert sum(calls) == 3 * 24
    assert len(read_files(tmp_path)) == 3


@pytest.mark.parametrize(
    ("key", "values"), [("beta", [0, -1.0, "much", None, math.inf]), ("label_smoothing", [-0.1, 0.5, "much"])]
)
def test_a_number_outside_of_its_range_is_refused(key, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"`objective\.{key}"):
            compose_run(RUN | {f"objective.{key}": value})


def test_other_data_has_no_preferences():
    with pytest.raises(ConfigError, match=r"`objective\.beta` is a setting of `objective=dpo`"):
        compose_run(SMALL_RUN | {"objective.beta": 0.5})
    config = compose_run(RUN)
    with pytest.raises(ConfigError, match=r"`objective` must be one of default for `data=stdlib_docs`, but got 'dpo'"):
        build_objective(config.objective, data=config.data, source=read_source(config.data), model=make_small())


def test_data_that_must_be_retained_is_compared_with_the_base_too(tmp_path, calls):
    config, inputs_cache = make_config(), InputsCache()
    inputs, pairs = make_inputs(config), make_preference_inputs(config)
    calls.clear()
    inputs_cache._inputs[inputs_key(config)] = inputs
    inputs_cache._other_splits[config.data, inputs_key(config)] = pairs.data
    assert inputs_cache.load_splits(config.data, config) is pairs.data  # a check needs no numbers of the base
    inputs_cache.folder = tmp_path
    splits = inputs_cache.load_splits(config.data, config)
    values = score_split(prepare_model(config, inputs.base), splits, config=config, inputs=inputs).values
    # the adapter changes nothing yet, so a margin is rounding alone: fp32, 8 tokens of 6 nats
    assert (values["reward_margin"], sum(calls)) == (pytest.approx(0.0, abs=1e-5), len(pairs.data.test()))
    assert inputs_cache.load_splits(config.data, config) is splits


def test_a_plan_measures_without_the_numbers_of_the_base_and_counts_their_time(calls):
    config = make_config()
    inputs = make_preference_inputs(config)
    training = train_briefly(config, inputs, slots=1)
    assert training.record.status == "interrupted"
    assert calls == []
    definition = read_definition({"name": "pairs", "settings": RUN, "arms": {"lora": {"settings": {"method": "lora"}}}})
    arm, inputs_cache = definition.arms[0], InputsCache()
    inputs_cache._inputs[inputs_key(arm.base)] = inputs
    size = PackSize(1, "")
    rates = scale_up(training, size, [arm], definition=definition, inputs_cache=inputs_cache)
    tokens = sum(int(split.lengths.sum()) for split in (inputs.data.train, inputs.data.validation, inputs.data.test()))
    per_token = training.evaluating_s / int(inputs.data.validation.lengths.sum())  # one batch
    assert rates.reference_s == pytest.approx(per_token * tokens)
    without = estimate_cost(definition, [replace(rates, reference_s=0.0)])
    assert estimate_cost(definition, [rates]).low_s == pytest.approx(without.low_s + rates.reference_s)

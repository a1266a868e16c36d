"""ORPO equals its formula, needs no frozen base, and its runs share packs."""

from dataclasses import replace

import pytest
import torch
from tests.small_runs import SMALL_RUN
from tests.tasks.preferences.pairs import compute_log_p, make_preference_inputs, make_small
from tests.training.runs import train
from torch.nn.functional import logsigmoid

from lorasweep.config.compose import compose_run
from lorasweep.data.rows import move_batch

RUN = SMALL_RUN | {"objective": "orpo", "objective.beta": 0.3, "trainer.batch_size": 6, "optim.lr": 3e-3}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
"""float64: sums of some hundred terms in another order."""


def compute_plainly(model, split, index, *, beta):
    """Returns loss and margin of one pair by the formula."""
    log_p = [compute_log_p(model, split, row).mean() for row in (2 * index, 2 * index + 1)]
    log_odds = [value - (1 - value.exp()).log() for value in log_p]
    margin = log_odds[0] - log_odds[1]
    return -log_p[0] - beta * logsigmoid(margin), margin


@pytest.mark.parametrize("by_chunk", [False, True])
def test_loss_gradient_and_metrics_are_those_of_the_formula(by_chunk, exact_norms):
    config = compose_run(RUN)
    inputs = make_preference_inputs(config)
    objective, split = replace(inputs.data.objective, by_chunk=by_chunk), inputs.data.train
    model = make_small(torch.float64).requires_grad_(True)
    indices = [3, 0, 7]
    batch = move_batch(split.batch(indices), torch.device("cpu")) | {"beta": torch.full((6,), 0.3, dtype=torch.float64)}
    found = objective.losses(model, batch)
    plain = [compute_plainly(model, split, index, beta=0.3) for index in indices]
    expected, margins = (torch.stack(values) for values in zip(*plain, strict=True))
    torch.testing.assert_close(found, expected, **TIGHT)
    parameters = [*model.parameters()]
    for one, two in zip(*(torch.autograd.grad(x.sum(), parameters) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, two, **TIGHT)
    with torch.no_grad():
        values = objective.compute(objective.score(model, batch))
    wanted = {"preference_accuracy": (margins > 0).double().mean(), "reward_margin": margins.mean()}
    wanted = {name: float(value.detach()) for name, value in (wanted | {"loss": expected.mean()}).items()}
    assert {name: float(values[name]) for name in wanted} == pytest.approx(wanted, rel=1e-12)
    assert values["chosen_log_probability"] < 0


def test_a_run_learns_without_numbers_of_the_base(tmp_path):
    config = compose_run(RUN | {"trainer.max_steps": 20, "trainer.eval_every_steps": 20, "logger": "none"})
    inputs = make_preference_inputs(config)
    assert inputs.prepare(config, folder=tmp_path) is inputs
    base = train(tmp_path / "base", compose_run(RUN | {"method": "frozen", "logger": "none"}), inputs=inputs)
    trained = train(tmp_path / "run", config, inputs=inputs)
    assert trained.best["reward_margin"] > base.best["reward_margin"] + 0.5
    assert trained.best["loss"] < base.best["loss"]

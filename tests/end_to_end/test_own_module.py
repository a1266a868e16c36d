"""A whole sweep of a user's own module: LoRA, full fine-tuning and the frozen base, up to the verdicts."""

import pytest
from tests.small_runs import rates
from tests.training.test_own_module import DIGITS

import lorasweep

ARMS = {
    "frozen": {"settings": {"method": "frozen"}},
    "full": {"settings": {"method": "full"}, "space": {"optim.lr": rates(1e-3, 3e-2), "module.dropout": [0.1, 0.5]}},
    "lora": {
        "settings": {"method": "lora"},
        "space": {"method.rank": [1, 4], "optim.lr": rates(3e-3, 1e-1)},
        "confirm_each": "method.rank",
    },
}
SHORT = {"sweep.trials": 4, "confirm.seeds": 2, "confirm.margin": 0.1, "trainer.max_steps": 20, "sweep.seed": 1}


@pytest.mark.slow
def test_a_sweep_of_a_users_module_ends_with_verdicts(tmp_path):
    settings = {key: value for key, value in DIGITS.items() if key not in ("optim.lr", "trainer.eval_every_steps")}
    sweep = {"name": "own", "settings": settings | SHORT, "arms": ARMS}
    result = lorasweep.run_sweep(sweep, output=tmp_path / "sweep", progress=None)
    trials = result.trials_dataframe()
    assert set(trials["state"]) <= {"complete", "stopped"}
    assert result.best("full").params["module.dropout"] in (0.1, 0.5)
    assert trials[result.metric].notna().all()
    assert len(result.confirm_dataframe()) == 2 * 4
    report = result.table()
    assert "lora-rank-1" in report
    assert "lora-rank-4" in report
    assert "seeds alone" not in report  # the module records the scores of examples
    commands = [command for one in result.findings.recommended for command in one.commands.values()]
    assert [command for command in commands if "export" in command] == []  # it is no model of transformers

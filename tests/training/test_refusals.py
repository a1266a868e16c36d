"""What a run can't do as asked is refused in one sentence, before anything is written."""

import pytest

from lorasweep.errors import ConfigError
from lorasweep.training.prepare import check_run

TIMER, CSV = "lightning.pytorch.callbacks.Timer", "lightning.pytorch.loggers.CSVLogger"
RPROP = {"optim._target_": "torch.optim.Rprop", "optim.weight_decay": 0.1}
EARLY = {"callbacks": "early_stopping", "callbacks.early_stopping.mode": "best"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "linear", "schedule.power": 2}, ["`schedule.power`", "warmup_fraction"]),
        ({"schedule": "cosine", "schedule.min_lr_rate": 1.5}, ["`schedule.min_lr_rate < 1`", "1.5"]),
        ({"schedule._target_": "torch.optim.SGD"}, ["`schedule._target_`", "LRScheduler"]),
        ({"schedule": "one_cycle", "schedule.total_steps": -1}, ["`schedule`", "-1"]),
        (RPROP, ["`optim.weight_decay` must be 0", "'torch.optim.Rprop'", "0.1"]),
        ({"optim": "sgd", "optim.momentun": 0.5}, ["`optim`", "'torch.optim.SGD'", "momentun"]),
        ({"optim": "sgd", "optim.momentum": -1}, ["`optim`", "Invalid momentum value: -1"]),
        ({"optim._target_": "torch.nn.Linear"}, ["`optim._target_`", "torch.optim.optimizer.Optimizer"]),
        ({"logger": "csv", "logger.csv.flush": 1}, ["`logger.csv`", CSV, "flush"]),
        ({"logger.a._target_": TIMER}, ["`logger.a._target_`", TIMER]),
        ({"callbacks.a._target_": CSV}, ["`callbacks.a._target_`", CSV]),
        (EARLY, ["`callbacks.early_stopping`", "best"]),
    ],
)
def test_a_setting_that_a_run_cant_have_is_refused(here, make_config, inputs, settings, words):
    with pytest.raises(ConfigError) as refused:
        check_run(make_config(settings), inputs.base)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(here.iterdir()) == []

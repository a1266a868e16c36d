"""Settings of a run of the embedded model that takes a fraction of a second, and of searches."""

SMALL_RUN = {
    "data.block_length": 32,
    "data.max_validation_blocks": 4,
    "data.max_test_blocks": 4,
    "trainer.batch_size": 2,
    "trainer.eval_batch_size": 4,
    "trainer.max_steps": 4,
    "trainer.eval_every_steps": 2,
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
}
TWO_STEPS = SMALL_RUN | {"trainer.max_steps": 2, "trainer.eval_every_steps": 1}


def rates(low, high):
    """A range of learning rates."""
    return {"low": low, "high": high, "log": True}


OWN_MODULE = {
    "module._target_": "mine.Module",
    "datamodule._target_": "mine.Data",
    "metric.name": "val_acc",
    "metric.direction": "maximize",
}
"""Settings of a run of a user's LightningModule, which need not be there to be read."""
MINI = {
    "name": "mini",
    "settings": TWO_STEPS | {"worker.pack_size": 1, "confirm.seeds": 0},
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2},
    },
}
"""A sweep file's content: three trials of two steps."""

"""Optimizers, callbacks and intervals of evaluations that a user chose work in a pack as in runs alone."""

import pytest
from lightning.pytorch.callbacks import Callback
from tests.training.runs import evaluations, losses, train, train_together

MIXED = (
    {"optim": "sgd", "optim.momentum": 0.9, "optim.lr": 0.3, "method.rank": 4, "seed": 3},
    {"optim._target_": "torch.optim.RMSprop", "optim.alpha": 0.9, "optim.lr": 3e-3, "optim.lr_ratio_b": 2},
    {"method.rank": 20, "optim.lr": 3e-3, "optim.weight_decay": 0.1},
    {"optim": "adafactor", "optim.lr": 3e-2, "method.rank": 3},
)
STEPS = {"trainer.max_steps": 7, "trainer.eval_every_steps": 3}
"""The last steps have no evaluation of their own, so the end of the run has one."""


@pytest.fixture
def train_pack(tmp_path, inputs):
    """Trains runs in one pack, of which the first is stopped at step 3. Returns their folders."""

    def train_pack(configs):
        folders = {tmp_path / f"packed{slot}": config for slot, config in enumerate(configs)}
        ended = train_together(
            folders,
            inputs=inputs,
            checkpoint_file=tmp_path / "pack.ckpt",
            on_evaluation=lambda runs: [
                "poor" if run.step == 3 and run.run.run_folder.path.name == "packed0" else None for run in runs
            ],
        )
        assert list(ended.values()) == ["stopped", *["complete"] * (len(configs) - 1)]
        return list(folders)

    return train_pack


def test_each_slot_has_its_own_optimizer_also_in_a_smaller_pack_and_ends_with_an_evaluation(
    tmp_path, train_pack, make_config, inputs
):
    configs = [make_config(STEPS | own) for own in (MIXED[0], *MIXED)]
    packed = train_pack(configs)
    for slot, config in enumerate(configs[1:], 1):
        alone = tmp_path / f"alone{slot}"
        train(alone, config, inputs=inputs)
        # fp32 kernels sum in another order for other shapes; Adam's first steps divide by |g|, which magnifies it
        for (step, loss, lr), (other_step, other, other_lr) in zip(losses(packed[slot]), losses(alone), strict=True):
            assert (step, loss, lr) == (other_step, pytest.approx(other, rel=1e-4), other_lr)
        found, expected = evaluations(packed[slot]), evaluations(alone)
        assert [step for step, _ in found] == [step for step, _ in expected] == [3, 6, 7]
        assert [one["loss"] for _, one in found] == pytest.approx([one["loss"] for _, one in expected], rel=1e-4)


SEEN = []


class Recorder(Callback):
    """A user's callback that has a state."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, *batch):
        self.steps += 1
        SEEN.append((self.steps, pl_module.step_losses.tolist()))

    def on_validation_end(self, trainer, pl_module):
        SEEN[-1] += ([float(trainer.callback_metrics[f"validation/loss/{n}"]) for n in range(pl_module.num_slots)],)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_callbacks_see_all_slots_of_a_pack_and_resume_in_a_smaller_one(train_pack, make_config):
    SEEN.clear()
    names = {"callbacks": ["lr_monitor", "device_stats"], "callbacks.device_stats.cpu_stats": True, "logger": "csv"}
    shared = STEPS | names | {"callbacks.own._target_": f"{__name__}.Recorder"}
    packed = train_pack([make_config(shared | own) for own in MIXED[:3]])
    by_step = [{step: loss for step, loss, _ in losses(folder)} for folder in packed]
    assert [step for step, *_ in SEEN] == [1, 2, 3, 4, 5, 6, 7]
    for step, losses_of_slots, *scores in SEEN:
        kept = (1, 0, 2) if step <= 3 else (1, 2)  # in the order of ranks
        assert losses_of_slots == [by_step[slot][step] for slot in kept]
        if scores:
            assert scores == [[dict(evaluations(packed[slot]))[step]["loss"] for slot in kept]]
    assert "lr-" in next(packed[1].rglob("metrics.csv")).read_text()
    assert "cpu_percent" in next(packed[2].rglob("metrics.csv")).read_text()

"""TrainingModule and DataModule under a user's own Trainer: Lightning's parts work, and the numbers are our own."""

import shutil
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils._pytree import tree_leaves

import lorasweep
from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import read_steps
from lorasweep.training.inputs import SHARED_INPUTS
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone

pytestmark = [
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),  # where Slurm is installed
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning with a newer torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the splits are in memory
]
MAX_STEPS = 6


@pytest.fixture(scope="module")
def words(short_words):
    """The words of a run of a few seconds, with dropout."""
    return [*short_words, f"trainer.max_steps={MAX_STEPS}", "method.dropout=0.1"]


@pytest.fixture(scope="module")
def data(words):
    """Keeps base model and data in memory for all tests."""
    return lorasweep.DataModule(words)


class Losses(lightning.Callback):
    """Keeps the loss of every optimizer step."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step:
            self.steps[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


@pytest.fixture
def make_trainer(tmp_path):
    """Makes a Trainer that a user may have written."""

    def make(*callbacks, **settings):
        defaults = {"max_steps": MAX_STEPS, "val_check_interval": 2, "accelerator": "cpu", "logger": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        has_checkpoint = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        return lightning.Trainer(
            **{**defaults, **quiet, "enable_checkpointing": has_checkpoint, **settings},
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
        )

    return make


@pytest.fixture(scope="module")
def own_run(words, data, tmp_path_factory):
    """The same run as `lorasweep train` trains it."""
    folder = tmp_path_factory.mktemp("own") / "run"
    config = compose_run(parse_overrides(words))
    train_alone(config, RunFolder(path=folder), inputs=SHARED_INPUTS.load(config))
    return folder


def losses_of(folder):
    return {row["step"]: row["loss"] for row in read_steps(folder) if "loss" in row}


def scores_of(folder):
    return [row["validation"] for row in read_steps(folder) if "validation" in row]


def test_the_numbers_are_those_of_lorasweep_train(words, data, own_run, make_trainer):
    losses, module = Losses(), lorasweep.TrainingModule(words)
    trainer = make_trainer(losses)
    trainer.fit(module, data)
    assert losses.steps == losses_of(own_run)
    last = {name: float(trainer.callback_metrics[f"validation/{name}"]) for name in scores_of(own_run)[-1]}
    assert last == scores_of(own_run)[-1]


def test_the_best_checkpoint_is_small_loads_and_scores_the_same(words, data, make_trainer, tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path / "kept", monitor="validation/loss")
    trainer = make_trainer(best, LearningRateMonitor(), logger=CSVLogger(tmp_path, name="csv"), log_every_n_steps=1)
    trainer.fit(lorasweep.TrainingModule(words), data)
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    assert all("lora" in name for name in checkpoint["state_dict"])
    tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)  # no view keeps a whole pack
    assert Path(best.best_model_path).stat().st_size < data.splits.train.sequences["input_ids"].values.nbytes + 400_000
    assert checkpoint["hyper_parameters"]["config"]["method"]["rank"] == 2
    logged = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "lr-AdamW" in logged
    assert "validation/loss" in logged

    loaded = lorasweep.TrainingModule.load_from_checkpoint(best.best_model_path)
    (scores,) = make_trainer().validate(loaded, data, verbose=False)
    assert scores["validation/loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)


def test_a_run_that_is_resumed_continues_to_the_bit(words, data, own_run, make_trainer, tmp_path):
    every = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    make_trainer(every).fit(lorasweep.TrainingModule(words), data)
    losses, path = Losses(), (tmp_path / "kept" / "step=3.ckpt").rename(tmp_path / "three.ckpt")
    shutil.rmtree(tmp_path / "kept")
    make_trainer(losses, every).fit(lorasweep.TrainingModule(words), data, ckpt_path=path)
    assert losses.steps == {step: loss for step, loss in losses_of(own_run).items() if step > 3}


def test_micro_batches_that_lightning_accumulates_add_up_to_a_step(words, make_trainer):
    kept = []
    for accumulate in (1, 2):
        given, losses = [*words, "method.dropout=0", f"trainer.accumulate={accumulate}"], Losses()
        module, data = lorasweep.TrainingModule(given), lorasweep.DataModule(given)
        make_trainer(losses, accumulate_grad_batches=accumulate, max_steps=3, val_check_interval=1.0).fit(module, data)
        kept.append([loss for _, loss in sorted(losses.steps.items())])
    assert kept[0] == pytest.approx(kept[1], rel=1e-5)  # sums of other order


def test_a_gradient_is_clipped_as_the_settings_say_unless_the_trainer_does(words, data, make_trainer):
    norms = []

    class Norms(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    for given in (None, 1e-3):
        make_trainer(Norms(), gradient_clip_val=given, max_steps=1, val_check_interval=1.0).fit(
            lorasweep.TrainingModule([*words, "optim.clip_norm=1e-2"]), data
        )
    assert norms == pytest.approx([1e-2, 1e-3], rel=1e-3)


def test_test_data_is_scored(words, data, make_trainer):
    module = lorasweep.TrainingModule(words)
    (scores,) = make_trainer().test(module, data, verbose=False)
    assert {"test/loss", "test/bits_per_byte", "test/perplexity"} == set(scores)
    split = data.splits.test()
    with torch.no_grad():
        loss = module.objective.score(module.model, split.batch(range(len(split))))
    assert scores["test/loss"] == pytest.approx(float(loss.loss.sum() / loss.items.sum()), rel=1e-5)
    assert module(input_ids=split.batch([0])["input_ids"]).logits.shape[0] == 1


def test_wrong_uses_are_refused_in_one_sentence(words, data, make_trainer):
    module = lorasweep.TrainingModule(words)
    with pytest.raises(ConfigError, match=r"Trainer\(max_steps=...\).* max_epochs=3 alone"):
        make_trainer(max_steps=-1, max_epochs=3).fit(module, data)
    with pytest.raises(ConfigError, match=r"Trainer\(accumulate_grad_batches=1\).* got 2"):
        make_trainer(accumulate_grad_batches=2).fit(module, data)
    with pytest.raises(ConfigError, match="`data` must be the same in TrainingModule and DataModule"):
        make_trainer().fit(lorasweep.TrainingModule([*words, "data.block_length=16"]), data)
    with pytest.raises(ConfigError, match=r"`method.rankk` is not a setting"):
        lorasweep.TrainingModule(["method.rankk=8"])


@pytest.fixture
def checkpoint(words, data, make_trainer, tmp_path):
    """A checkpoint, to be changed."""
    trainer = make_trainer(max_steps=1, val_check_interval=1.0)
    trainer.fit(lorasweep.TrainingModule(words), data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(base="0" * 64), RecordError, "the base model must be the one"),
        (lambda c: c["state_dict"].popitem(), RecordError, "must have exactly the parameters"),
        (lambda c: c["state_dict"].update(more=torch.zeros(1)), RecordError, "'more' differs"),
        (
            lambda c: c["hyper_parameters"]["config"]["model"].update(trust_remote_code=True),
            ConfigError,
            "`model.trust_remote_code` of a recorded run must not name code",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, change, error, message):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)
    with pytest.raises(error, match=message):
        lorasweep.TrainingModule.load_from_checkpoint(checkpoint)

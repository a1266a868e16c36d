"""Batches as Lightning gets them: right tokens, right order, and nothing drawn from a shared random stream."""

import random
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer

from lorasweep.config.compose import compose_run
from lorasweep.data.blocks import BlockSplit, cut_blocks
from lorasweep.data.build_splits import DataSplits
from lorasweep.data.tasks import LanguageModelling
from lorasweep.training.data_module import DataModule


def make_part(name, *, blocks):
    tokens = cut_blocks(torch.arange(blocks * 4 + 1), block_length=4)
    return BlockSplit(name=name, tokens=tokens, documents=1, bytes=1, bytes_per_token=1.0, fingerprint=name)


def make_module(*, test=None, **settings):
    splits = DataSplits(
        train=make_part("train", blocks=10),
        validation=make_part("validation", blocks=5),
        task=LanguageModelling(bytes_per_token=1.0),
        metric="loss",
        test=test or (lambda: make_part("test", blocks=3)),
    )
    config = compose_run({"trainer.batch_size": 4, "trainer.eval_batch_size": 2, "trainer.max_steps": 6, **settings})
    return DataModule(config, splits=splits)


def test_accumulation_splits_the_same_batches():
    whole = torch.stack([batch["input_ids"] for batch in make_module().train_dataloader()])
    split = torch.stack([batch["input_ids"] for batch in make_module(**{"trainer.accumulate": 2}).train_dataloader()])
    assert split.shape == (12, 2, 4)
    assert torch.equal(split.reshape(whole.shape), whole)


def test_resumed_run_gets_the_remaining_batches():
    whole = [batch["input_ids"] for batch in make_module().train_dataloader()]
    module = make_module()
    module.trainer = SimpleNamespace(global_step=4, max_steps=6, accumulate_grad_batches=1, global_rank=0, world_size=1)
    rest = [batch["input_ids"] for batch in module.train_dataloader()]
    assert torch.equal(torch.stack(rest), torch.stack(whole[4:]))


def test_test_part_is_not_read_by_training():
    def read():
        raise AssertionError("the test split was read")

    module = make_module(test=read)
    list(module.train_dataloader())
    list(module.val_dataloader())
    with pytest.raises(AssertionError, match="was read"):
        module.test_dataloader()


def test_loading_leaves_every_shared_random_stream_alone():
    before = torch.get_rng_state(), random.getstate()
    module = make_module()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


class Collector(LightningModule):
    """Trains one number and keeps the batches it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.validated = 0

    def training_step(self, batch):
        self.seen.append(batch["input_ids"])
        return self.weight * 2

    def validation_step(self, batch):
        self.validated += batch["targets"].numel()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The `srun` command is available")  # where Slurm is installed
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning with a newer torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # where there are more than 3 cores
def test_trainer_takes_the_batches_as_they_come(tmp_path):
    module, data = Collector(), make_module(**{"trainer.accumulate": 2})
    trainer = Trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    expected = [batch["input_ids"] for batch in make_module(**{"trainer.accumulate": 2}).train_dataloader()]
    assert torch.equal(torch.stack(module.seen), torch.stack(expected))
    assert module.validated == 20

"""Batches as Lightning gets them: right tokens, right order, and nothing drawn from a shared random stream."""

import random

import pytest
import torch

from lorasweep.config.compose import compose_run
from lorasweep.data.build_splits import DataSplits
from lorasweep.data.examples import BlockSplit, cut_blocks
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

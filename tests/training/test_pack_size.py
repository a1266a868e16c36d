"""How many runs train together is a rule of row lengths, device and trials left."""

from types import SimpleNamespace

import pytest
import torch

import lorasweep.training.pack_size as pack_size_file
from lorasweep.training.pack_size import MAX_SLOTS, choose_pack_size


@pytest.mark.parametrize(
    ("device", "precision", "trials", "tokens", "slots", "reason"),
    [
        ("cpu", "fp32", 100, 10, MAX_SLOTS["cpu"], "8 is the maximum on cpu"),
        ("cuda", "bf16", 100, 10, MAX_SLOTS["cuda"], "32 is the maximum on cuda"),
        ("cpu", "bf16", 5, 10, 5, "trials left is 5"),
        ("cpu", "bf16", 1, 10, 1, "trials left is 1"),
        ("cpu", "bf16", 100, 1024, 4, "in bf16 may have 4,096 tokens"),
        ("cpu", "fp32", 100, 1024, 2, "in fp32 may have 2,048 tokens"),
        ("cpu", "bf16", 100, 9999, 1, "in bf16 may have 4,096 tokens"),
        ("cuda", "bf16", 100, 4096, 4, "in bf16 may have 16,384 tokens"),
    ],
)
def test_the_tightest_limit_decides_and_is_named(monkeypatch, device, precision, trials, tokens, slots, reason):
    monkeypatch.setattr(pack_size_file, "get_device", lambda trainer: torch.device(device))
    train = SimpleNamespace(lengths=torch.tensor([tokens - 1, tokens + 1]))  # the mean counts
    inputs = SimpleNamespace(precision=precision, splits=SimpleNamespace(train=train))
    config = SimpleNamespace(trainer=SimpleNamespace(batch_size=2, accumulate=2))
    chosen = choose_pack_size(config, inputs=inputs, trials_left=trials)
    assert chosen.slots == slots
    assert chosen.reason.startswith("Trials run alone" if slots == 1 else f"Packs have up to {slots} slots")
    assert reason in chosen.reason

"""No secret of the environment or of a setting is in any file that a run, a grid or a sweep leaves."""

from __future__ import annotations

import pytest
import yaml

SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "PGPASSWORD": "open-sesame-1",
    "STORAGE_URL": "postgresql://me:open-sesame-2@host/db",
    "TORCH_AUTH_TOKEN": "open-sesame-3",
}
BARE = [*SECRETS.values(), "open-sesame"]
SHORT = {
    "data.block_length": 32,
    "data.max_validation_blocks": 2,
    "trainer.batch_size": 2,
    "trainer.eval_batch_size": 2,
    "trainer.max_steps": 2,
    "trainer.eval_every_steps": 1,
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
}
MINI = {
    "name": "mini",
    "description": "Stored at postgresql://me:open-sesame-2@host/db",
    "settings": SHORT | {"confirm.seeds": 0, "worker.pack_size": 1, "pruner": "none"},
    "arms": {"lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2}},
}
SET_SECRETS = f"os.environ.update({SECRETS!r})"
BREAK = """
import lorasweep.training.module as file
def fail(*_, **__):
    raise OSError("postgresql://me:open-sesame-2@host/db refused open-sesame-1")
file.prepare_model = fail
"""
"""An error that tells a secret, in the middle of training."""


def find_secrets(folder):
    """The files below a folder that hold one, also in what is binary."""
    return {
        f"{path.relative_to(folder)}: {secret}"
        for path in folder.rglob("*")
        if path.is_file()
        for secret in BARE
        if secret.encode() in path.read_bytes()
    }


@pytest.mark.slow
def test_no_file_of_a_run_or_a_sweep_holds_a_secret(tmp_path, finish):
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(MINI))
    short = [f"{key}={value}" for key, value in SHORT.items()]
    broken = {"code": 1, "before": SET_SECRETS + BREAK}
    finish("sweep", "mini.yaml", "sweep.output=sweep", before=SET_SECRETS)
    finish("train", *short, "output=run", before=SET_SECRETS)
    finish("train", *short, "output=broken", **broken)
    assert "***@host/db refused ***" in (tmp_path / "broken" / "run.json").read_text()
    failed = finish("sweep", "mini.yaml", "sweep.output=failed", "sweep.max_failures=1", **broken)
    grid = ["train", "-m", *short, "seed=0,1", "model=causal_lm", "model.path=https://me:open-sesame@host"]
    refused = finish(*grid, code=2, before=SET_SECRETS)
    assert "`model.path`" in refused
    assert not any(secret in failed + refused for secret in BARE)
    (tmp_path / "mini.yaml").unlink()  # the user's own
    assert len(list(tmp_path.rglob("run.json"))) >= 4
    assert len(list(tmp_path.rglob("events.*"))) >= 3
    assert find_secrets(tmp_path) == set()

"""No secret of the environment or of a setting is in any file that a run, a grid or a sweep leaves."""

import pytest
import yaml
from tests.small_runs import TWO_STEPS

SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "PGPASSWORD": "open-sesame-1",
    "STORAGE_URL": "postgresql://me:open-sesame-2@host/db",
    "TORCH_AUTH_TOKEN": "open-sesame-3",
}
BARE = [*SECRETS.values(), "open-sesame"]
MINI = {
    "name": "mini",
    "description": "Stored at postgresql://me:open-sesame-2@host/db",
    "settings": TWO_STEPS | {"confirm.seeds": 0, "worker.pack_size": 1},
    "arms": {"lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2}},
}
SET_SECRETS = f"os.environ.update({SECRETS!r})"
BREAK = """
import itertools
import lorasweep.training.module as file
calls, true = itertools.count(1), file.prepare_slots
def fail(*arguments):
    if next(calls) == {call}:
        raise OSError("postgresql://me:open-sesame-2@host/db refused open-sesame-1")
    return true(*arguments)
file.prepare_slots = fail
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
    short = [f"{key}={value}" for key, value in TWO_STEPS.items()]
    finish("sweep", "mini.yaml", "sweep.output=sweep", before=SET_SECRETS + BREAK.format(call=2))
    failed = finish("train", *short, "output=broken", code=1, before=SET_SECRETS + BREAK.format(call=1))
    assert "***@host/db refused ***" in (tmp_path / "broken" / "run.json").read_text()
    grid = ["train", "-m", *short, "seed=0,1", "model=causal_lm", "model.path=https://me:open-sesame@host"]
    refused = finish(*grid, code=2, before=SET_SECRETS)
    assert "`model.path`" in refused
    assert not any(secret in failed + refused for secret in BARE)
    (tmp_path / "mini.yaml").unlink()  # the user's own
    assert len(list(tmp_path.rglob("run.json"))) == 3
    assert list(tmp_path.rglob("events.*"))
    assert find_secrets(tmp_path) == set()

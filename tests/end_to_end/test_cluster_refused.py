"""What a cluster's storage or scheduler can't do is said in one sentence, and nothing is made or queued before that."""

from __future__ import annotations

import pytest
import yaml
from tests.servers.daemon import find_free_port
from tests.servers.postgres import PASSWORD

SWEEP = {
    "name": "refused",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 4,
        "data.max_test_blocks": 4,
        "trainer.batch_size": 2,
        "trainer.eval_batch_size": 4,
        "trainer.max_steps": 2,
        "trainer.eval_every_steps": 2,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "confirm.seeds": 0,
        "worker.pack_size": 1,
    },
    "arms": {"frozen": {"settings": {"method": "frozen"}}},
}


@pytest.fixture
def refuse(tmp_path, finish):
    """Types a sweep that must be refused before anything is written, and returns the one sentence."""
    (tmp_path / "refused.yaml").write_text(yaml.safe_dump(SWEEP))

    def run(*words, before=""):
        said = finish("sweep", "refused.yaml", "sweep.output=sweep", *words, code=2, before=before)
        lines = [line for line in said.splitlines() if line.strip()]
        assert len(lines) == 1, said
        assert not (tmp_path / "sweep").exists()
        assert PASSWORD not in said
        return lines[0]

    return run


@pytest.mark.slow
def test_a_wrong_password_is_refused_and_not_shown(refuse, postgres):
    said = refuse("storage=postgresql", f"storage.url='{postgres.url_with_wrong_password}'")
    assert "password authentication failed" in said
    assert "wrong-one" not in said


@pytest.mark.slow
def test_a_database_that_does_not_answer_is_refused(refuse):
    said = refuse("storage=postgresql", f"storage.url='postgresql://me:secret-one@127.0.0.1:{find_free_port()}/sweeps'")
    assert "`storage.url` must be a database that answers" in said
    assert "secret-one" not in said


@pytest.mark.slow
def test_a_database_that_is_not_there_is_refused(refuse, postgres):
    assert '"nowhere" does not exist' in refuse("storage=postgresql", f"storage.url='{postgres.server.url('nowhere')}'")


@pytest.mark.slow
def test_an_address_of_another_kind_is_refused(refuse):
    said = refuse("storage=postgresql", "storage.url='mysql://me@127.0.0.1/sweeps'")
    assert "must be postgresql://USER@HOST/DATABASE" in said


@pytest.mark.slow
def test_a_database_without_an_address_is_refused(refuse):
    assert "LORASWEEP_STORAGE_URL is not set" in refuse("storage=postgresql")


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_folder_is_refused(tmp_path, finish):
    said = finish("worker", str(tmp_path / "elsewhere"), code=2)
    assert "elsewhere" in said


@pytest.mark.slow
def test_a_worker_that_knows_another_database_is_refused(tmp_path, finish, postgres):
    (tmp_path / "refused.yaml").write_text(yaml.safe_dump(SWEEP))
    give = "os.environ['LORASWEEP_STORAGE_URL'] = {!r}".format
    finish("sweep", "refused.yaml", "sweep.output=sweep", "storage=postgresql", before=give(postgres.url))
    other = postgres.server.create_database()
    said = finish("worker", "sweep", code=2, before=give(other))
    assert "must be the database of the sweep" in said


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_a_partition_that_slurm_does_not_have_is_refused_and_nothing_is_queued(refuse, postgres, slurm):
    words = ["worker=slurm", "worker.partition=nowhere", "worker.time_min=5", "worker.cpus=1"]
    give = f"os.environ.update({slurm.environment!r}, LORASWEEP_STORAGE_URL={postgres.url!r})"
    said = refuse(*words, "storage=postgresql", before=give)
    assert "nowhere" in said
    assert "main" in said
    assert not slurm.jobs()

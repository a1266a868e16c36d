"""Workers that meet in a real database: each trial once, also where the server is restarted, and its lock is one."""

from __future__ import annotations

import gc
import threading
import time
from types import SimpleNamespace

import pytest
from tests.sweep.test_sharing import serve

from lorasweep.config.sweep import DatabaseStorage
from lorasweep.errors import ConfigError, WorkerError
from lorasweep.record import read_sweep
from lorasweep.sweep import join_sweep, reopen_sweep
from lorasweep.sweep.database import PASSWORD_VARIABLE, URL_VARIABLE, DatabaseStudies

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (PASSWORD_VARIABLE, URL_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    gc.collect()  # a connection that was left open is the fault of this test


@pytest.fixture(params=["postgresql", "mysql"])
def database(request):
    """A new database of each kind."""
    if request.param == "mysql":
        return SimpleNamespace(url=request.getfixturevalue("mariadb"))
    return request.getfixturevalue("postgres")


def kind_of(database):
    return database.url.partition(":")[0].partition("+")[0].replace("mariadb", "mysql")


@pytest.fixture
def content(content):
    content["settings"] |= {"sampler": "random", "worker.lease_s": 5, "confirm.seeds": 2}
    content["arms"]["lora"]["trials"] = 12
    return content


def begin_in(begin, content, database, *words, folder="shared"):
    where = (f"storage={kind_of(database)}", f"storage.url='{database.url}'")
    return begin(content, *where, *words, folder=folder)


def rows(path):
    record = read_sweep(path)
    return (
        sorted((row.arm, row.number, str(row.params), row.value, row.state) for row in record.trials),
        sorted((row.arm, row.seed, row.value, row.state) for row in record.confirm),
    )


def test_workers_share_a_sweep_and_find_what_one_finds_in_a_journal(begin, work, runs, content, database):
    alone = begin(content, folder="alone")
    assert work(alone)
    folder = begin_in(begin, content, database)
    failures: list[BaseException] = []
    other = threading.Thread(target=serve, args=(folder.path, work, failures))
    other.start()
    assert work(folder)
    other.join()
    assert failures == []
    assert rows(folder.path) == rows(alone.path)
    assert not (folder.path / "journal.log").exists()


def test_a_server_that_is_restarted_under_two_workers_costs_no_trial(begin, work, runs, content, postgres):
    content["arms"]["lora"]["trials"] = 30
    alone = begin(content, folder="alone")
    assert work(alone)
    runs.begun.clear()
    plain = runs.score
    runs.score = lambda config, step: (time.sleep(0.02), plain(config, step))[1]
    folder = begin_in(begin, content, postgres)
    failures: list[BaseException] = []
    folder.close()
    workers = [threading.Thread(target=serve, args=(folder.path, work, failures)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for begun in (4, 12, 20):
        while len(runs.begun) < begun and not failures:
            time.sleep(0.01)
        postgres.server.restart()  # in this thread: a server ends with the one that started it
    for worker in workers:
        worker.join()
    assert failures == []
    assert rows(folder.path) == rows(alone.path)


def test_a_sweep_in_a_database_is_taken_up_again(begin, work, runs, content, database):
    folder = begin_in(begin, content, database)
    assert not work(folder, stop_at=8)
    assert work(reopen_sweep(folder.path))
    assert len(read_sweep(folder.path).trials) == 16


def test_two_sweeps_may_have_one_database(begin, work, runs, content, database):
    first = begin_in(begin, content, database, folder="first")
    second = begin_in(begin, content, database, folder="second")
    assert work(first)
    assert work(second)
    assert rows(first.path) == rows(second.path)


def test_no_file_of_the_sweep_has_the_password(begin, work, runs, content, postgres):
    from tests.servers.postgres import PASSWORD  # noqa: PLC0415 (of this server only)

    folder = begin_in(begin, content, postgres)
    assert work(folder)
    texts = [path.read_text(errors="replace") for path in folder.path.rglob("*") if path.is_file()]
    assert texts
    assert not any(PASSWORD in text for text in texts)


def test_a_wrong_password_is_refused_before_anything_is_written(begin, content, postgres, tmp_path):
    with pytest.raises(ConfigError, match=r"`storage.url` must be a database that answers, .* password auth"):
        begin(content, "storage=postgresql", f"storage.url='{postgres.url_with_wrong_password}'", folder="refused")
    assert not (tmp_path / "refused").exists()


def test_another_database_is_not_that_of_the_sweep(begin, work, runs, content, postgres, monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, postgres.url)
    folder = begin(content, "storage=postgresql", folder="shared")
    folder.close()
    monkeypatch.setenv(URL_VARIABLE, postgres.server.create_database())
    with pytest.raises(ConfigError, match=r"`storage.url` must be the database of the sweep in .*, but it has no s"):
        join_sweep(folder.path)


@pytest.fixture
def studies():
    """Connects to a database as a worker does."""
    opened = []

    def connect(database, **changes):
        settings = {"name": kind_of(database), "url": database.url, "retry_s": 20.0} | changes
        opened.append(DatabaseStudies(DatabaseStorage(**settings), prefix="made-up/"))
        return opened[-1]

    yield connect
    for one in opened:
        one.rest()


def test_the_lock_is_held_by_one_worker_at_a_time(database, studies):
    inside, most, order = 0, 0, []

    def enter():
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        order.append(1)

    workers = [studies(database) for _ in range(4)]
    threads = [threading.Thread(target=lambda w=worker: [w.exclusively(enter) for _ in range(3)]) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, len(order)) == (1, 12)


def test_what_is_done_under_a_lock_that_is_lost_begins_again(postgres, studies):
    worker, attempts = studies(postgres), []

    def act():
        attempts.append(1)
        if len(attempts) == 1:
            postgres.server.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"
            )
        worker.check_exclusive()
        return "done"

    assert worker.exclusively(act) == "done"
    assert len(attempts) == 2


def test_a_server_that_stays_away_ends_the_worker_in_a_sentence(postgres, studies):
    worker = studies(postgres, retry_s=1.0)
    postgres.server.stop()
    try:
        with pytest.raises(WorkerError, match=r"the database must answer within `storage.retry_s` = 1 s, but .* Noth"):
            worker.exclusively(lambda: None)
        worker.stop_waiting_when(lambda: True)
        began = time.monotonic()
        with pytest.raises(WorkerError, match=r"the database must answer"):
            worker.storage.get_all_studies()
        assert time.monotonic() - began < 1
    finally:
        postgres.server.start()
    assert worker.exclusively(lambda: 7) == 7


def test_a_worker_at_rest_has_no_connection(postgres, studies):
    worker = studies(postgres)
    worker.exclusively(worker.storage.get_all_studies)
    worker.rest()
    deadline = time.monotonic() + 10
    count = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{postgres.name}' AND pid <> pg_backend_pid()"
    while postgres.server.query(count) != [["0"]]:
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""The studies that a page shows are read as they are on disk, and can't be written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorasweep.config.sweep import DatabaseStorage
from lorasweep.dashboard import studies
from lorasweep.errors import RecordError
from lorasweep.sweep.storage import JOURNAL_FILE, JournalStudies


def test_a_page_sees_what_workers_write_after_it_began(folder):
    seen, written = studies.open_read_only(folder), JournalStudies(folder).storage
    (study,) = seen.get_all_studies()
    assert len(seen.get_all_trials(study._study_id)) == 3
    written.create_new_trial(study._study_id)
    assert len(seen.get_all_trials(study._study_id)) == 4


def test_a_page_leaves_half_a_line_to_the_workers(folder):
    with (folder / JOURNAL_FILE).open("ab") as journal:
        journal.write(b'{"op_code":')
    before = (folder / JOURNAL_FILE).read_bytes()
    (study,) = studies.open_read_only(folder).get_all_studies()
    assert study.study_name == "lora"
    assert (folder / JOURNAL_FILE).read_bytes() == before


def test_the_storage_of_a_page_refuses_to_write(folder):
    seen, before = studies.open_read_only(folder), (folder / JOURNAL_FILE).read_bytes()
    (study,) = seen.get_all_studies()
    with pytest.raises(RecordError, match="a sweep's journal must stay as its workers write it"):
        seen.delete_study(study._study_id)
    assert (folder / JOURNAL_FILE).read_bytes() == before


def test_a_missing_journal_is_one_sentence_and_not_made(folder, monkeypatch):
    (folder / JOURNAL_FILE).unlink()
    definition = SimpleNamespace(driver=SimpleNamespace(storage=None))
    monkeypatch.setattr(studies, "restore_definition", lambda *_, **__: definition)
    with pytest.raises(RecordError, match=rf"a sweep's folder must contain {JOURNAL_FILE}"):
        studies.open_read_only(folder)
    assert not (folder / JOURNAL_FILE).exists()


def test_a_sweep_in_a_database_is_read_from_there(folder, monkeypatch):
    (folder / JOURNAL_FILE).unlink()
    definition = SimpleNamespace(
        driver=SimpleNamespace(storage=DatabaseStorage(name="postgresql", url=None, retry_s=1.0))
    )
    monkeypatch.setattr(studies, "restore_definition", lambda *_, **__: definition)
    opened = []

    def open_studies(config, *_, prefix):
        opened.append((config.name, prefix))
        return SimpleNamespace(storage="the database's")

    monkeypatch.setattr(studies, "open_studies", open_studies)
    assert studies.open_read_only(folder) == "the database's"
    assert opened == [("postgresql", "")]


@pytest.mark.parametrize(
    ("host", "method", "expected"),
    [
        ("127.0.0.1:80", "GET", "200"),
        ("localhost", "HEAD", "200"),
        ("localhost:80", "POST", "405"),
        ("127.0.0.1", "DELETE", "405"),
        ("127.0.0.1.example:80", "GET", "403"),
        ("", "GET", "403"),
    ],
)
def test_only_requests_that_read_and_come_from_here_reach_the_page(host, method, expected):
    statuses = []

    def app(environ, start_response):
        start_response("200 OK", [])
        return [b""]

    environ = {"HTTP_HOST": host, "REQUEST_METHOD": method}
    studies.read_only(app)(environ, lambda status, headers: statuses.append(status[:3]))
    assert statuses == [expected]

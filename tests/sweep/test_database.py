"""Addresses of databases: the password is used and never written down, and what is wrong is said before anything is."""

from __future__ import annotations

import os
import socket

import pytest

from lorasweep.config.sweep import DatabaseStorage
from lorasweep.errors import ConfigError
from lorasweep.sweep import read_definition
from lorasweep.sweep.database import PASSWORD_VARIABLE, URL_VARIABLE, DatabaseStudies, keep_password, storage_address

SECRET = "correct-horse"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (PASSWORD_VARIABLE, URL_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def storage(url, name="postgresql"):
    return DatabaseStorage(name=name, url=url, retry_s=0)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (f"postgresql://ann:{SECRET}@db/sweeps", "postgresql://db/sweeps?user=ann"),
        (
            f"postgresql+psycopg://ann:{SECRET}@db:5432/sweeps?sslmode=require",
            "postgresql+psycopg://db:5432/sweeps?sslmode=require&user=ann",
        ),
        (f"mysql://ann:{SECRET}@db/sweeps", "mysql://db/sweeps?user=ann"),
        (f"postgresql://ann@db/sweeps?password={SECRET}", "postgresql://db/sweeps?user=ann"),
    ],
)
def test_the_password_of_an_address_is_kept_apart(given, kept):
    assert keep_password(given).startswith(kept)
    assert SECRET not in keep_password(given)
    assert os.environ[PASSWORD_VARIABLE] == SECRET


def test_the_name_of_a_user_is_no_secret_and_stays():
    assert keep_password("postgresql://ann@db/sweeps") == "postgresql://db/sweeps?user=ann"
    assert keep_password("postgresql://db/sweeps?user=ann") == "postgresql://db/sweeps?user=ann"
    assert PASSWORD_VARIABLE not in os.environ


@pytest.mark.parametrize("in_file", [True, False])
def test_a_sweep_is_written_down_without_the_password(write_file, content, in_file):
    url = f"postgresql://ann:{SECRET}@db/sweeps"
    if in_file:
        content["settings"] |= {"storage": "postgresql", "storage.url": url}
    words = [] if in_file else ["storage=postgresql", f"storage.url={url}"]
    definition = read_definition(write_file(content), words)
    assert SECRET not in str(definition.raw)
    assert definition.driver.storage == DatabaseStorage(
        name="postgresql", url="postgresql://db/sweeps?user=ann", retry_s=300.0
    )
    assert os.environ[PASSWORD_VARIABLE] == SECRET


def test_the_address_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, f"postgresql://ann:{SECRET}@db/sweeps")
    assert storage_address(storage(None)) == "postgresql://db/sweeps?user=ann"


def test_a_database_without_an_address_is_refused():
    with pytest.raises(
        ConfigError, match=r"`storage.url` must be postgresql://USER@HOST/DATABASE, but is null and LORA"
    ):
        storage_address(storage(None))


@pytest.mark.parametrize("url", ["sqlite:///x.db", "db.example", "mysql://ann@db/x", f"oracle://ann:{SECRET}@db/x"])
def test_an_address_of_another_kind_is_refused(url):
    with pytest.raises(ConfigError, match=r"`storage.url` must be postgresql://USER@HOST/DATABASE, but got") as caught:
        storage_address(storage(url))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["postgresql", "mysql"])
def test_a_database_that_does_not_answer_is_one_sentence_without_the_password(name):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        url = f"{name}://ann:{SECRET}@127.0.0.1:{port}/sweeps"
        with pytest.raises(
            ConfigError, match=r"`storage.url` must be a database that answers, but .* does not"
        ) as caught:
            DatabaseStudies(storage(url, name), prefix="s/")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)

"""The database that tests use asks for a password and is the same one after a restart."""

from __future__ import annotations

import subprocess

from .daemon import find_program


def test_a_database_outlives_a_crash_of_its_server(postgres):
    postgres.query("CREATE TABLE kept (number INTEGER)")
    postgres.query("INSERT INTO kept VALUES (7)")
    postgres.server.restart(immediately=True)
    assert postgres.query("SELECT number FROM kept") == [["7"]]


def test_databases_of_two_tests_are_two(postgres):
    other = postgres.server.create_database()
    assert other != postgres.url


def test_a_wrong_password_is_refused(postgres):
    program = find_program("psql")
    done = subprocess.run([program, postgres.url_with_wrong_password, "-c", "SELECT 1"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "password authentication failed" in done.stderr

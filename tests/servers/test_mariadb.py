"""The database that tests use for MySQL's protocol knows its one user."""

from __future__ import annotations

import os
import subprocess
from urllib.parse import urlsplit

from .daemon import find_program


def test_a_new_database_answers_who_knows_the_password(mariadb):
    where = urlsplit(mariadb)
    words = [
        find_program("mariadb"),
        "--no-defaults",
        "--host=127.0.0.1",
        f"--port={where.port}",
        f"--user={where.username}",
    ]
    words += [where.path.lstrip("/"), "--skip-column-names", "--execute=SELECT DATABASE()"]
    for password, code in ((where.password, 0), ("wrong", 1)):
        done = subprocess.run(words, env=os.environ | {"MYSQL_PWD": password}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr

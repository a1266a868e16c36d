"""A dashboard is for this machine alone, changes nothing, and leaves no process."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import lorasweep
from lorasweep.cli import run
from lorasweep.dashboard import pages
from lorasweep.errors import ConfigError, WorkerError

TIMEOUT_S = 240.0  # for a machine that does much else
LOCALHOST = "0100007F"
"""127.0.0.1 as the kernel writes it."""
LISTENING = "0A"


@contextmanager
def dashboard(folder, *options):
    """Runs `lorasweep dashboard`, and yields its process and where its pages are once both are served."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lorasweep", "dashboard", str(folder), *options],
        env={**os.environ, "PYTHONPATH": str(Path(lorasweep.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, ports = "", {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(ports) < 2:
            assert time.monotonic() < deadline, said
            if select.select([process.stdout], [], [], 1)[0]:
                line = process.stdout.readline()
                assert line, said
                said += line
                if found := re.fullmatch(r"(\S+): http://127\.0\.0\.1:(\d+)/\n", line):
                    ports[found[1]] = int(found[2])
        yield process, ports
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(port, path, method="GET", **headers):
    """The status and body of one answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body="{}" if method != "GET" else None, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def processes_below(pid):
    """The processes that a process started, and those that they started."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(below for child in children for below in processes_below(child))]


def listening_of(pid):
    """The local addresses, as the kernel writes them, on which a process listens."""
    links = [os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir() if handle.is_symlink()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    tables = [Path("/proc/net") / name for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == LISTENING and row[9] in inodes]


def is_there(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + TIMEOUT_S
    while left := [pid for pid in pids if is_there(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_both_pages_are_served_to_this_machine_alone_change_nothing_and_end_with_a_signal(folder):
    before = contents(folder)
    with dashboard(folder) as (process, ports):
        board, studies = ports["TensorBoard"], ports["optuna-dashboard"]
        children = processes_below(process.pid)
        assert len(children) == 2
        listening = [address for child in children for address in listening_of(child)]
        assert sorted(listening) == sorted(f"{LOCALHOST}:{port:04X}" for port in (board, studies))

        assert b"<title>TensorBoard</title>" in ask(board, "/")[1]
        runs = []
        while "runs/lora-0000/hparams" not in runs:  # it reads the folder while it serves
            runs = json.loads(ask(board, "/data/runs")[1])
        status, page = ask(studies, "/dashboard")
        assert (status, b"<title>Optuna Dashboard</title>" in page) == (200, True)
        (study,) = json.loads(ask(studies, "/api/studies")[1])["study_summaries"]
        assert study["study_name"] == "lora"
        detail = json.loads(ask(studies, f"/api/studies/{study['study_id']}")[1])
        assert [trial["values"] for trial in detail["trials"]] == [[1.0], [0.5], [0.75]]
        assert ask(studies, f"/api/studies/{study['study_id']}/param_importances")[0] == 200

        for method in ("POST", "PUT", "DELETE"):
            assert ask(studies, f"/api/studies/{study['study_id']}", method)[0] == 405
        assert ask(studies, "/api/studies", Host="elsewhere.example:80")[0] == 403
        assert contents(folder) == before

        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        wait_until_gone(children)


@pytest.mark.slow
def test_pages_end_with_a_dashboard_that_is_killed(folder):
    with dashboard(folder) as (process, _):
        children = processes_below(process.pid)
        process.kill()
        process.wait()
        wait_until_gone(children)


def test_a_folder_that_is_no_sweep_is_one_sentence(tmp_path, capsys):
    assert run(["dashboard", str(tmp_path)]) == 2
    assert "sweep.json" in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_anything_starts(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="`--port` must be a port"):
        serve(folder, port=taken.getsockname()[1])


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_what_is_no_port_is_refused(folder, port):
    with pytest.raises(ConfigError, match=r"`--optuna-port` must be from 1 to 65535, but got"):
        serve(folder, optuna_port=port)


def serve(folder, *, said=None, stop_requested=lambda: True, **ports):
    say = (said if said is not None else []).append
    pages.serve_pages(folder, **{"port": None, "optuna_port": None} | ports, say=say, stop_requested=stop_requested)


def test_without_optuna_dashboard_tensorboard_is_served_alone(folder, monkeypatch):
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda name: None)
    started = []
    monkeypatch.setattr(pages, "_start", lambda name, *_, **__: started.append(name) or start_page("pass", name))
    said = []
    serve(folder, said=said)
    assert started == ["TensorBoard"]
    assert said[0] == "optuna-dashboard is not installed; for it, type `pip install 'lorasweep[dashboard]'`"
    with pytest.raises(ConfigError, match=r"`--optuna-port` must be left out where optuna-dashboard is not installed"):
        serve(folder, optuna_port=1)


def start_page(code, name):
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return pages.Page(name=name, process=process, output=process.stdout, errors=process.stderr)


def test_a_page_that_ends_by_itself_is_told_of_and_the_last_one_is_an_error(folder, monkeypatch, tmp_path):
    real = pages.MODULES
    (tmp_path / "first.py").write_text("import sys; sys.exit('no room')")
    (tmp_path / "second.py").write_text("import sys; print('http://x/', flush=True); sys.stdin.readline() or 1 / 0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pages, "MODULES", dict(zip(real, ["second", "first"], strict=True)))
    said, started, start = [], [], pages._start
    monkeypatch.setattr(pages, "_start", lambda *given, **named: started.append(start(*given, **named)) or started[-1])

    def say(sentence):
        said.append(sentence)
        if {"TensorBoard: http://x/", "optuna-dashboard ended by itself: no room"} <= {*said}:
            started[0].process.kill()

    with pytest.raises(WorkerError, match=r"each ended by itself, the last saying: exit code -9\."):
        pages.serve_pages(folder, port=None, optuna_port=None, say=say, stop_requested=lambda: False)
    assert len(said) == 3

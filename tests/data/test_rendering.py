"""Templates are rendered in a process that the system limits, that Ctrl-C does not wait for, and that ends with us."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorasweep.data import rendering
from lorasweep.data.rendering import render
from lorasweep.errors import ConfigError

TALK = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
    "tools": None,
    "answers": [1],
}
DOUBLED = (
    "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(60) %}"
    "{% set n.a = (n.a, n.a) %}{% set n.b = (n.b, n.b) %}{% endfor %}"
)
"""Two trees of 60 levels whose comparison visits 2**60 leaves in C."""
IN_C = {
    "equal": "{{ n.a == n.b }}",
    "sorted": "{{ [n.a, n.b] | sort }}",
    "hashed": "{{ {n.a: 1} }}",
    "found": "{{ n.a in [n.b] }}",
}


def make_template(text):
    return {"text": text, "arguments": {}, "today": "2024-07-26", "eos_token": "", "special_tokens": []}


def render_talks(text, *, number=1, budget=None):
    return list(render(make_template(text), [TALK] * number, budget={} if budget is None else budget))


@pytest.fixture
def fresh_child():
    """Lets the next rendering start a child, whose limits come from this process now."""
    rendering._end_child(*rendering._start_child(os.getpid()))
    yield
    rendering._end_child(*rendering._start_child(os.getpid()))


@pytest.mark.parametrize("name", IN_C)
def test_a_template_that_computes_for_ever_in_c_is_ended(monkeypatch, name):
    monkeypatch.setattr(rendering, "MAX_RENDER_S", 0.05)
    with pytest.raises(ConfigError, match=r"more than 0\.05 s.*'hi'"):
        render_talks(DOUBLED + IN_C[name])
    monkeypatch.undo()
    assert render_talks("{{ messages | length }}") == [[["1", "2", None]]]


def test_ctrl_c_does_not_wait_for_a_template(monkeypatch):
    # a shell's background jobs ignore Ctrl-C
    monkeypatch.setattr(rendering, "MAX_RENDER_S", 60)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    child, connection = rendering._start_child(os.getpid())
    receive = connection.recv_bytes

    def receive_and_type_ctrl_c():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        return receive()

    monkeypatch.setattr(connection, "recv_bytes", receive_and_type_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        render_talks(DOUBLED + IN_C["equal"])
    signal.signal(signal.SIGINT, handler)
    assert child.returncode == -signal.SIGKILL
    assert render_talks("{{ messages | length }}") == [[["1", "2", None]]]


@pytest.mark.skipif(not rendering.STATM_FILE.exists(), reason="only Linux limits the address space")
def test_memory_is_limited_under_any_ulimit(fresh_child):
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**45, old[1]))
    try:
        with pytest.raises(ConfigError, match="MemoryError"):
            render_talks("{% set x = 'x' * 4000000000 %}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def test_output_is_limited_for_a_conversation_and_for_all_together(monkeypatch):
    with pytest.raises(ConfigError, match="writes too much"):
        render_talks("{% set x = 'x' * 20000000 %}{{ x }}")
    monkeypatch.setattr(rendering, "MAX_BUDGET", {"seconds": 60.0, "characters": 2**20})
    budget = {}
    with pytest.raises(ConfigError, match="writes too much"):
        render_talks("{{ 'x' * 100000 }}", number=100, budget=budget)
    assert 0 <= budget["characters"] < 200_000  # what was left before the conversation that failed


def test_time_is_limited_for_all_conversations_together():
    spent = {"seconds": -1e6, "characters": 1e6}
    with pytest.raises(ConfigError, match="takes too long"):
        render_talks("{{ messages | length }}", budget=spent)
    budget = {}
    render_talks("{{ messages | length }}", number=50, budget=budget)
    assert budget["seconds"] > 0  # templates need less than a conversation adds


def test_conversations_are_told_apart_in_requests_of_many():
    talks = [
        {**TALK, "messages": [{"role": "user", "content": f"{n} {'x' * (n % 7 * 10_000)}"}, TALK["messages"][1]]}
        for n in range(60)
    ]
    found = list(render(make_template("{{ messages[0].content[:2] }}"), talks, budget={}))
    assert [int(prompt) for ((prompt, _, _),) in found] == list(range(60))
    with pytest.raises(ConfigError, match="begins with '41 "):
        list(render(make_template("{{ 1 // (messages[0].content[:2] | int - 41) }}"), talks, budget={}))


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_the_child_imports_no_torch():
    render_talks("{{ messages | length }}")
    assert "libtorch" not in Path(f"/proc/{rendering._start_child(os.getpid())[0].pid}/maps").read_text()


PARENT = """
import os, sys
from lorasweep.data import rendering
rendering.MAX_RENDER_S = 1
process, _ = rendering._start_child(os.getpid())
talk = {"messages": [{"role": "user", "content": "hi"}], "tools": None, "answers": [0]}
template = {"text": "", "arguments": {}, "today": "2024-07-26", "eos_token": "", "special_tokens": []}
list(rendering.render(template, [talk], budget={}))
print(process.pid, flush=True)
if sys.argv[1]:
    rendering.render({**template, "text": sys.argv[1]}, [talk], budget={}).__next__()
sys.stdin.read()
"""


def is_running(folder):
    """Whether the process of this folder of /proc runs. One whose parent has not yet read its exit code does not."""
    try:
        return folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize("template", ["", DOUBLED + IN_C["equal"]])
def test_the_child_of_a_killed_process_ends(template):
    command = [sys.executable, "-c", PARENT, template]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        child = Path("/proc", parent.stdout.readline().strip())
        assert child.exists()
        parent.kill()
    while is_running(child):
        time.sleep(0.1)  # a person, or the limit of the machine that tests, ends a wait for ever

"""Damages files at random, and checks that their reader reads or refuses them, in time, and writes nothing."""

import copy
import json
import os
import signal
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lorasweep.cli import run
from lorasweep.errors import LoraSweepError
from lorasweep.outcome import DONE, FAILED, WRONG_REQUEST

MAX_CASE_S = 30
"""Seconds that a reader may take for a file of a few kilobytes, on a slow machine."""
EXAMPLES = int(os.environ.get("LORASWEEP_FUZZ_EXAMPLES", 0))
"""Number of random examples of each test; `make soak` sets it. 0: a few examples, the same in each run."""
RANDOM = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[*HealthCheck],
)

HOSTILE_NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**9, 10**18, 10**400, -(10**18), 1e-300, 1e308, float("nan"), float("inf")]
HOSTILE_TEXTS = ["", "x", "x" * 2000, "../../outside", "/dev/zero", "\ud800", "NaN", "${oc.env:HOME}"]
HOSTILE_TEXTS += ["re:(a?(a?)?)*", "\n"]
HOSTILE = [*HOSTILE_NUMBERS, *HOSTILE_TEXTS, None, True, False, [], {}, [[]], [None], {"a": {"b": [1]}}, {"": 0}]
NESTED = "[" * 100_000


def fuzz(test):
    """Marks a test of random examples, which `make soak` runs."""
    return pytest.mark.soak(RANDOM(test))


class TooSlow(BaseException):
    """A reader takes too long. No `except Exception` of a reader can hide this."""


@contextmanager
def refusal_allowed(*, unchanged=None, error=LoraSweepError):
    """Allows the code inside to refuse with this class of error. The files below `unchanged` must stay as they are."""
    unchanged = unchanged or Path("nothing")

    def stop(number, frame):
        raise TooSlow(f"the reader took more than {MAX_CASE_S} s")

    before, handler = list_files(unchanged), signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_CASE_S)
    try:
        with suppress(error), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning is no error outside of tests
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert list_files(unchanged) == before


def feed(*words, capsys=None):
    """Runs a command on hostile files. It must end in time with exit code 0, or with another one and one sentence."""
    with refusal_allowed(error=()):
        code = run([str(word) for word in words])
    written = capsys.readouterr() if capsys else None
    if written and code != DONE:
        assert code in (FAILED, WRONG_REQUEST)
        assert [line[:10] for line in written.err.splitlines() if line.strip()] == ["lorasweep:"], written.err
    return code


def list_files(folder):
    """Returns size and time of the last change of each file and folder below a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@st.composite
def damage_bytes(draw, content):
    """Returns content of which one part was replaced, repeated, removed or cut off."""
    start = draw(st.integers(0, len(content)))
    length = draw(st.one_of(st.integers(0, 8), st.integers(0, len(content))))
    inserted = draw(st.one_of(st.binary(max_size=16), st.just(content[:length])))
    return content[:start] + inserted + content[start + length :]


@st.composite
def damage_json(draw, content):
    """Returns JSON in which up to three values were replaced, added or removed."""
    root = {"": copy.deepcopy(content)}
    for _ in range(draw(st.integers(1, 3))):
        places = list(_iterate_places(root))
        container, key = places[draw(st.integers(0, len(places) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        value = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        if action == "remove" and container is not root:
            del container[key]
        elif action == "add" and isinstance(container[key], dict):
            container[key][draw(st.text(max_size=3))] = value
        elif action == "add" and isinstance(container[key], list):
            container[key].append(value)
        else:
            container[key] = value
    return json.dumps(root[""])


def damage(content):
    """Returns damaged versions of a JSON file: as text and as bytes."""
    as_json = damage_json(json.loads(content)).map(str.encode)
    return st.one_of(as_json, as_json, damage_bytes(content), st.just(NESTED.encode()))


def _iterate_places(container):
    """Yields each container in nested values, with each of its keys or indices."""
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        yield container, key
        if isinstance(value, dict | list):
            yield from _iterate_places(value)

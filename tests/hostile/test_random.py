"""A stranger's file that is damaged at random ends each command with a result or with one sentence."""

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.files import set_values
from tests.fuzzing import EXAMPLES, RANDOM, damage, damage_bytes, feed

from .test_runs import COMMANDS

SWEEP_FILES = ["sweep.json", "*/*/run.json", "*/*/test_scores.csv", "*/*/steps.jsonl", "journal.log"]
RUN_FILES = ["runs/lora-0000/run.json", "runs/lora-0000/best/*"]
READERS = {
    "compare": (["compare", "theirs"], SWEEP_FILES),
    "status": (["status", "theirs"], ["sweep.json"]),
    "resume": (["sweep", "--resume", "theirs", "--cfg", "job"], ["sweep.json"]),
    "train": (["train", "--from", "theirs/lora", "--cfg", "job"], ["sweep.json"]),
    **{name: (words, RUN_FILES) for name, words in COMMANDS.items()},
}


@st.composite
def damage_file(draw, path):
    content = path.read_bytes()
    if path.suffix == ".json":
        return draw(damage(content))
    if path.suffix == ".csv" and draw(st.booleans()):
        cells = [line.split(",") for line in content.decode().splitlines()]
        row, column = draw(st.integers(0, len(cells) - 1)), draw(st.integers(0, len(cells[0]) - 1))
        cells[row][column] = draw(st.sampled_from(["", "nan", "inf", "-1", "1e308", "1e400", "9" * 5000, '"', "\0"]))
        return "\n".join(map(",".join, cells)).encode()
    return draw(damage_bytes(content))


@pytest.mark.soak
@settings(RANDOM, max_examples=EXAMPLES or 3)  # a sweep is recorded first, and a command takes up to 0.5 s
@given(data=st.data())
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_ends_in_a_result_or_in_a_sentence(theirs, reader, capsys, data):
    words, patterns = READERS[reader]
    files = [path for pattern in patterns for path in sorted(theirs.glob(pattern)) if path.is_file()]
    path = data.draw(st.sampled_from(files))
    before = {file: file.read_bytes() for file in (path, theirs / "runs/lora-0000/run.json")}
    try:
        path.write_bytes(data.draw(damage_file(path)))
        if path.parent.name == "best" and data.draw(st.booleans()):  # a stranger can write any hash of a file
            set_values(theirs / "runs/lora-0000/run.json", {"files": {}})
        feed(*words, capsys=capsys)
    finally:
        for file, content in before.items():
            file.write_bytes(content)
        for made in theirs.parent.glob("out"):
            shutil.rmtree(made)

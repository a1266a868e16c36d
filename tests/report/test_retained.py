"""What was forgotten: changes on retained data sets against the frozen base, in every output."""

import csv
import json

import pytest
from tests.files import edit_json

from lorasweep.config.data import ScoreMetric
from lorasweep.record import RETAINED_SCORES_FILE, RetainedRow, read_run, read_sweep, write_record
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.report.terminal import list_lines

from .conftest import report

BASE = 1.5
LOWER = ScoreMetric(name="bits_per_byte", direction="minimize")
HIGHER = ScoreMetric(name="score", direction="maximize")


def retain(folder, forgotten, metric=LOWER):
    """Adds scores on a retained data set to a confirmed sweep: the base's score, plus what each subject forgot.

    Both of its test examples change alike, and seeds by at most 0.001.
    """
    record = read_sweep(folder)
    record.retained = [RetainedRow(name="code", metric=metric)]
    for run in record.confirm:
        of_run = read_run(folder / run.run)
        score = BASE + forgotten[run.subject] + (0 if run.subject == "frozen" else 0.0005 * (-1) ** (run.seed or 0))
        of_run.retained = {"code": {metric.name: score}}
        lines = [f"{n},{score + (-1) ** n!r},1.0,document {n}" for n in range(2)]
        path = folder / run.run / RETAINED_SCORES_FILE.format("code")
        path.write_text("\n".join(["row,score,weight,group", *lines, ""]))
        write_record(of_run, folder / run.run)
    write_record(record, folder)
    return folder


FORGOTTEN = {"frozen": 0.0, "full": 0.3, "lora": 0.004}


def find(folder):
    return {answer.subject: answer for answer in load_sweep_data(folder).retained["code"]}


def test_subjects_are_judged_by_the_margin_against_the_frozen_base(confirmed):
    found = find(retain(confirmed, FORGOTTEN))
    assert {name: answer.verdict for name, answer in found.items()} == {"full": "worse", "lora": "equivalent"}
    assert found["full"].value == pytest.approx(0.3, abs=0.0005)
    low, high = found["full"].interval
    assert low < found["full"].value < high
    assert high - low < 0.01  # the difference of the two examples is that of the base too
    assert (found["full"].reference, found["full"].num_seeds) == ("frozen", 5)


def test_the_direction_is_that_of_the_data(confirmed):
    folder = retain(confirmed, FORGOTTEN, HIGHER)
    assert find(folder)["full"].verdict == "better"
    folder = retain(confirmed, {**FORGOTTEN, "full": -0.3}, HIGHER)
    assert find(folder)["full"].verdict == "worse"


def test_one_seed_or_a_missing_score_is_no_verdict(confirmed):
    folder = retain(confirmed, FORGOTTEN)
    runs = [run for run in read_sweep(folder).confirm if run.subject == "lora"]
    for run in runs[1:]:
        edit_json(folder / run.run / "run.json", lambda raw: raw.update(retained={}))
    data = load_sweep_data(folder)
    answer = next(one for one in data.retained["code"] if one.subject == "lora")
    assert (answer.num_seeds, answer.verdict, answer.blocker) == (1, "open", "one seed")
    assert all(any(run.run in problem and "`code`" in problem for problem in data.problems) for run in runs[1:])


def test_every_output_has_it(confirmed):
    folder = retain(confirmed, FORGOTTEN)
    findings = report(folder)
    with (folder / "report" / "answers.csv").open() as file:
        rows = {row["subject"]: row for row in csv.DictReader(file) if row["name"] == "retained"}
    assert {*rows} == {"full", "lora"}
    assert (rows["full"]["arm"], rows["full"]["verdict"]) == ("code", "worse")
    assert float(rows["full"]["low"]) < float(rows["full"]["value"]) < float(rows["full"]["high"])
    answer = findings.answers[-1]
    (question, headline, lines) = [*list_lines(findings)][-1]
    assert question == "What was forgotten of code?"
    assert headline.startswith("`full` forgot more than 0.01. (difference against `frozen` in bits per byte")
    assert answer.state == "settled"
    assert {row.subject: row.value for row in answer.rows} == {n: float(row["value"]) for n, row in rows.items()}
    assert [line.split()[-1] for line in lines] == ["equivalent", "worse"]
    stored = json.loads((folder / "report" / "summary.json").read_text())["answers"][-1]
    assert {row["subject"]: row["verdict"] for row in stored["rows"]} == {"full": "worse", "lora": "equivalent"}
    assert question in (folder / "report" / "index.html").read_text()

"""The files that a report consists of."""

import csv
import json

from lorasweep.report import write_report


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_have_a_line_per_trial_evaluation_and_confirm_run(confirmed):
    summary = write_report(confirmed)
    trials = read_csv(confirmed / "report/trials.csv")
    assert len(trials) == 25
    assert {"method.rank", "method.alpha", "optim.lr", "bits_per_byte", "run", "reason"} <= set(trials[0])
    failed = next(row for row in trials if row["state"] == "failed")
    assert (failed["bits_per_byte"], failed["reason"]) == ("", "The loss became NaN at step 12.")
    curves = read_csv(confirmed / "report/curves.csv")
    assert len(curves) == 1 + 11 * 7 + 6 * 3 + 6 * 7
    assert curves[0] == {"arm": "frozen", "trial": "0", "step": "0", "bits_per_byte": "2.031"}
    runs = read_csv(confirmed / "report/confirmed.csv")
    assert [row["subject"] for row in runs] == ["frozen", *["lora"] * 5, *["full"] * 5]
    assert {row["is_better_than_untrained"] for row in trials if row["arm"] == "full"} == {"True"}
    assert failed["is_better_than_untrained"] == ""
    assert json.loads((confirmed / "report/summary.json").read_text()) == json.loads(json.dumps(summary.as_json()))

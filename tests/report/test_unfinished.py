"""A report of a sweep that is not complete names the best trial so far, and draws no conclusion from its first ones."""

from tests.files import edit_json

from lorasweep.report.caveats import list_faults
from lorasweep.report.facts import read_findings
from lorasweep.report.text import describe_full_setting, describe_headline

from .conftest import build_rank_sweep


def test_the_best_setting_so_far_is_that_of_the_best_rank_and_ends_of_ranges_are_not_judged(tmp_path):
    sweep = build_rank_sweep(tmp_path, {1: 1.9, 4: 1.7, 16: 1.6, 64: 2.0})
    fields = {"confirm": [], "settings": [], "looks_done": []}

    def stop(raw):
        raw.update(status="interrupted", **fields)
        for trial in raw["trials"]:  # the best one of the highest rank is the worst of all
            if trial["params"].get("method.rank") == 64:
                trial["search_score"] = 5.0

    edit_json(sweep / "sweep.json", stop)
    findings = read_findings(sweep)
    data = findings.data
    scores = {one.name: one.search_score for one in data.subjects if one.arm == "lora"}
    best = data.find_subject(min(scores, key=scores.__getitem__))
    assert best.best.params["method.rank"] != 64
    (setting,) = [answer for answer in findings.answers if answer.name == "setting"]
    assert f"Best so far: {describe_full_setting(best)}." in describe_headline(setting, data)
    assert list_faults(data) == []

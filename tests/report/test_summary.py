"""What `summary.json` and the sentences say."""

import pytest

from lorasweep.report.summary import summarize

from .conftest import edit_json


def shares_of(summary):
    return [arm["share_of_full_gain"] for arm in summary.as_json()["arms"]]


def test_share_of_full_gain_is_mirrored_when_maximizing(sweep):
    def negate(raw):
        raw["direction"] = "maximize"
        for trial in raw["trials"]:
            trial["value"] = None if trial["value"] is None else -trial["value"]

    before = shares_of(summarize(sweep))
    edit_json(sweep / "sweep.json", negate)
    assert shares_of(summarize(sweep)) == pytest.approx(before)

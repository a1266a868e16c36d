"""The answers: a headline, a row for each value, and the same values in terminal, page and JSON."""

import html
import json
import re
import shutil

import pytest
from tests.files import edit_json

from lorasweep.config.sweep import ENOUGH_TRIALS
from lorasweep.report.facts import list_subject_rows, read_findings
from lorasweep.report.page import render_page
from lorasweep.report.terminal import list_lines
from lorasweep.report.text import list_cells, list_columns, list_notes, list_warnings
from lorasweep.report.write import build_summary

from .conftest import build_rank_sweep, drop_full


def find_answers(findings, name):
    return [answer for answer in findings.answers if answer.name == name]


def list_headlines(findings):
    return [headline for _, headline, _ in list_lines(findings)]


def find_numbers(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


@pytest.mark.parametrize("fixed", [None, 1.8])
def test_terminal_page_and_json_show_the_same_values_in_the_same_order(tmp_path, fixed):
    sweep = build_rank_sweep(tmp_path, {1: 1.9, 4: 1.70, 16: 1.662}, fixed=fixed, examples=12)
    findings = read_findings(sweep)
    stored = json.loads(json.dumps(build_summary(findings)))["answers"]
    shown = [[*find_numbers(line)] for _, _, lines in list_lines(findings) for line in lines]
    page = render_page(findings, [])
    tables = re.findall(r'<table class="verdicts">.*?</table>', page, re.DOTALL)
    rows = [row for table in tables for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
    on_page = [find_numbers(html.unescape(re.sub("<[^>]*>", " ", row))) for row in rows]
    assert on_page == shown
    rows = [row for answer in stored for row in answer["rows"]]
    cells = [(answer, *cell) for answer in findings.answers for cell in list_cells(answer, findings.data)]
    assert len(rows) == len(cells) == len(shown) > 5
    for row, (answer, _, value, verdict) in zip(rows, cells, strict=True):
        shift = 1 if row["is_share"] and row["name"] not in ("as_good_as_full", "setting") else 0
        scale = 100 if row["is_share"] else 1
        numbers = [scale * (number - shift) for number in (row["value"], *(row["interval"] or ()))]
        assert find_numbers(value)[: len(numbers)] == pytest.approx(numbers, rel=0.05, abs=0.06)
        assert verdict == row["verdict"]
        assert answer.state == "settled"
    questions = [re.sub("[`]", "", question) for question, *_ in list_lines(findings)]
    assert questions == [answer["question"].replace("`", "") for answer in stored]
    terms = re.findall(r"<dt>(.*?)</dt>", page[page.index('id="answers"') : page.index("</section>")])
    assert [re.sub("<[^>]*>", "", term) for term in terms] == questions


def test_other_pairs_are_answers_of_their_own(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.7, 16: 1.662})

    def ask(raw):
        pair = {"name": "pair", "arm": "lora", "key": None, "subjects": ["lora-rank-4"], "reference": "lora-rank-16"}
        raw["questions"].append(pair)

    edit_json(sweep / "sweep.json", ask)
    findings = read_findings(sweep)
    (answer,) = find_answers(findings, "pair")
    ((name, value, verdict),) = list_cells(answer, findings.data)
    assert (name, verdict) == ("rank 4", "worse")
    assert value.startswith("-10 %")


def test_the_setting_has_a_row_on_what_is_untried(tmp_path):
    findings = read_findings(build_rank_sweep(tmp_path, {1: 1.8, 4: 1.7, 16: 1.662}))
    (answer,) = find_answers(findings, "setting")
    (row,) = answer.rows
    assert (row.subject, row.verdict, answer.state) == ("lora-rank-16", "settled", "settled")
    assert row.value == pytest.approx(0.001 / findings.data.evidence.gain)
    (recommended,) = build_summary(findings)["recommended"]
    assert recommended["params"] == {"method.rank": 16, "optim.lr": 0.0102}
    assert "Rank 16, α 16 (not searched), learning rate 0.0102 (predicted)." in list_headlines(findings)


def test_a_setting_that_few_trials_found_says_so(tmp_path):
    def keep_few(raw):
        of_lora = [row for row in raw["trials"] if row["arm"] == "lora"]
        raw["trials"] = [row for row in raw["trials"] if row not in of_lora[ENOUGH_TRIALS - 1 :]]

    sweep = build_rank_sweep(tmp_path, {1: 1.8, 4: 1.7, 16: 1.662})
    edit_json(sweep / "sweep.json", keep_few)
    (headline,) = [one for one in list_headlines(read_findings(sweep)) if one.startswith("Rank 16, α 16")]
    assert headline.endswith(f"(predicted), on {ENOUGH_TRIALS - 1} trials alone.")


@pytest.mark.parametrize("has_full", [True, False])
@pytest.mark.parametrize(("score", "verdict"), [(1.8, "worse"), (1.5, "better")])
def test_present_settings_are_compared_with_those_that_the_sweep_found(tmp_path, score, verdict, has_full):
    sweep = build_rank_sweep(tmp_path, {4: 1.662, 16: 1.66}, fixed=score, examples=12)
    if not has_full:
        drop_full(sweep)
    findings = read_findings(sweep)
    (answer,) = find_answers(findings, "present")
    first, *others = answer.rows
    difference = findings.data.evidence.estimate_difference("present", first.reference)
    assert (first.subject, first.verdict, first.is_share, answer.state) == ("present", verdict, False, "settled")
    assert first.value == pytest.approx(difference.value)
    assert first.value == pytest.approx(score - 1.66, abs=0.01)
    assert first.interval == pytest.approx(difference.find_interval(findings.data.evidence.confidence))
    assert [row.reference for row in others] == ["full"] * has_full
    (headline,) = [headline for question, headline, _ in list_lines(findings) if "present" in question]
    assert "Present: rank 32, α 16, learning rate 0.001. Found: rank" in headline
    assert "present" not in [row.subject for row in findings.answers[0].rows]
    assert any("the same test scores chose" in note for note in list_notes(findings))


def test_a_sweep_that_grew_when_test_scores_were_known_warns_and_promises_nothing(tmp_path):
    sweep, promise = build_rank_sweep(tmp_path, {4: 1.7}, examples=12), "is at most 5 %"
    findings = read_findings(sweep)
    assert any(promise in note for note in list_notes(findings))
    assert not any("after test scores were known" in warning for warning in list_warnings(findings))
    change = {"at": "", "stage": "confirm", "settings": {"confirm.seeds": 10}, "trials": {}}
    edit_json(sweep / "sweep.json", lambda raw: raw.update(changes=[change]))
    findings = read_findings(sweep)
    assert not any(promise in note for note in list_notes(findings))
    assert any("more seeds after test scores were known" in warning for warning in list_warnings(findings))


def test_present_settings_are_open_without_a_confirm_stage(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.662}, fixed=1.8)
    edit_json(sweep / "sweep.json", lambda raw: raw.update(settings=[], confirm=[], questions=[], looks=[]))
    (answer,) = find_answers(read_findings(sweep), "present")
    assert (answer.state, answer.missing) == ("open", "not confirmed")


@pytest.mark.parametrize(
    ("optim", "has_law"),
    [
        ({"name": "adamw"}, True),
        ({"_target_": "torch.optim.Adam"}, True),
        ({"name": "sgd"}, False),
        ({"_target_": "torch.optim.SGD"}, False),
    ],
)
def test_the_rate_at_another_alpha_is_said_only_of_adam(finished_and_confirmed, tmp_path, optim, has_law):
    sweep = shutil.copytree(finished_and_confirmed, tmp_path / "sweep")
    for run in sweep.glob("runs/*/run.json"):
        edit_json(run, lambda raw: raw["config"].update(optim={"lr": 1e-3, **optim}))
    assert any("lr = u/√α" in note for note in list_notes(read_findings(sweep))) is has_law


def test_share_of_full_gain_is_mirrored_when_maximizing(sweep):
    def list_shares():
        return [row["share_of_full_gain"] for row in list_subject_rows(read_findings(sweep).data)]

    def negate(raw):
        raw["search_metric"]["direction"] = "maximize"
        for trial in raw["trials"]:
            trial["search_score"] = None if trial["search_score"] is None else -trial["search_score"]

    before = list_shares()
    edit_json(sweep / "sweep.json", negate)
    assert list_shares() == pytest.approx(before)


def test_shares_of_a_gain_that_is_not_shown_are_nowhere(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.60, 64: 1.75}, seeds=2)

    def take_the_gain(raw):
        for number, row in enumerate(row for row in raw["confirm"] if row["arm"] == "full"):
            row["test_scores"]["bits_per_byte"] = 2.031 + (-0.02, 0.019)[number]

    edit_json(sweep / "sweep.json", take_the_gain)
    findings = read_findings(sweep)
    full, rank, _ = findings.answers
    assert list_cells(rank, findings.data) == [("rank 4", "-0.15 [-0.22, -0.08]", "sufficient")]
    assert {row.blocker for row in full.rows} == {"no gain"}
    text = str([*list_lines(findings), *list_notes(findings), *list_warnings(findings)])
    assert "% of full's gain" not in text.replace("shares of its gain", "")
    assert not any(row["share_of_full_gain"] for row in list_subject_rows(findings.data))


def test_why_the_looks_ended_is_a_note(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.7, 16: 1.662}, noise=0.05)
    looks = [{"seeds": 5, "open": ["lora-rank-4"], "is_last": True}]
    edit_json(sweep / "sweep.json", lambda raw: raw.update(looks=[3, 5, 10], looks_done=looks))
    assert any("5 were used; more had nothing to settle" in note for note in list_notes(read_findings(sweep)))


def test_a_report_without_full_fine_tuning_has_no_place_for_it(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.662, 16: 1.66})
    assert "LoRA against full fine-tuning" in render_page(read_findings(sweep), [])
    drop_full(sweep)
    findings = read_findings(sweep)
    assert "LoRA against full fine-tuning" not in render_page(findings, [])
    assert "of full's gain" not in list_columns(findings.data)

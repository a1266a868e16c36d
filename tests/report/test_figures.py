"""The figures' own arithmetic: ranges, fronts, the selection of trials, and what each panel shows."""

import shutil

import pytest
from tests.files import edit_json

from lorasweep.report.figures import draw_score_by_lr, draw_scores_by_value
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import build_rank_sweep

RANK_SCORES = {1: 1.74, 4: 1.69, 16: 1.668, 64: 1.663}


@pytest.fixture(scope="module")
def ranked_folder(tmp_path_factory):
    """Returns the folder of a confirmed sweep with one lora arm that confirms each rank; no test may change it."""
    return build_rank_sweep(tmp_path_factory.mktemp("ranks") / "sweep", RANK_SCORES, examples=40)


@pytest.fixture
def ranked(ranked_folder):
    return load_sweep_data(ranked_folder)


@pytest.fixture
def ranked_copy(ranked_folder, tmp_path):
    return shutil.copytree(ranked_folder, tmp_path / "sweep")


def find_traces(figure, **marker):
    """Returns the traces whose markers have these settings."""
    return [trace for trace in figure.data if all(trace.marker[key] == value for key, value in marker.items())]


def list_bars(figure):
    """Returns the ends of the bars of intervals, in the order of the figure."""
    bars = [trace for trace in figure.data if trace.error_y.array]
    return [(bar.y[0] - bar.error_y.arrayminus[0], bar.y[0] + bar.error_y.array[0]) for bar in bars]


def test_diverged_score_does_not_flatten_the_others_and_stays_visible_at_the_edge(sweep):
    def diverge(raw):
        next(trial for trial in raw["trials"] if trial["arm"] == "lora")["search_score"] = 90.0

    edit_json(sweep / "sweep.json", diverge)
    (figure,) = draw_score_by_lr(load_sweep_data(sweep)).figures
    assert figure.layout.yaxis.range[1] < 2.3
    (outside,) = find_traces(figure, symbol="triangle-up")
    assert outside.y == (figure.layout.yaxis.range[1],)
    assert "90" in outside.text[0]
    assert not find_traces(figure, symbol="triangle-down")


def test_dots_rings_bars_and_band_over_rank_are_those_of_the_evidence(
    ranked,
):
    panel = draw_scores_by_value(ranked)
    (figure,) = panel.figures
    assert panel.title == "Test score by rank"
    dots, rings = find_traces(figure, size=11), find_traces(figure, symbol="circle-open")
    for (rank, dot), ring in zip(zip(RANK_SCORES, dots, strict=True), rings, strict=True):
        found = ranked.evidence.mean(f"lora-rank-{rank}")
        assert found
        assert (dot.x[0], dot.y[0]) == (f"rank {rank}", found.value)
        assert tuple(ring.y) == pytest.approx(found.values)
        assert all(link.startswith("../runs/lora-confirm-") for link in ring.customdata)
    evidence = ranked.evidence
    full, base = evidence.mean("full"), evidence.mean("frozen")
    assert full
    assert base
    assert evidence.margin
    for rank, bar in zip(RANK_SCORES, list_bars(figure), strict=True):
        difference = evidence.estimate_difference(f"lora-rank-{rank}", "full")
        assert difference
        ends = difference.find_interval(evidence.confidence)
        assert ends
        assert bar == pytest.approx((full.value + ends[0], full.value + ends[1]))
    (band,) = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert (band.y0, band.y1) == pytest.approx((full.value - evidence.margin, full.value + evidence.margin))
    assert [shape.y0 for shape in figure.layout.shapes if shape.type == "line"] == [full.value, base.value]
    assert [note.text.split()[0] for note in figure.layout.annotations] == ["full", "frozen"]


def test_bars_are_whole_and_the_names_of_equal_lines_are_apart(ranked_copy):
    def level(raw):
        rows = [row for row in raw["confirm"] if row["arm"] == "full"]
        for number, row in enumerate(rows):
            row["test_scores"]["bits_per_byte"] = 2.031 + 0.5 * (number - 2)  # the base's score in the mean

    edit_json(ranked_copy / "sweep.json", level)
    for run in ranked_copy.glob("runs/*/test_scores.csv"):
        run.unlink()
    (figure,) = draw_scores_by_value(load_sweep_data(ranked_copy)).figures
    low, high = figure.layout.yaxis.range
    assert all(low < first < last < high for first, last in list_bars(figure))
    assert {note.yanchor for note in figure.layout.annotations} == {"top", "bottom"}


def test_the_smallest_sufficient_rank_has_a_mark_only_if_it_is_settled(ranked, ranked_copy):
    verdicts = {answer.subject: answer.verdict for answer in ranked.evidence.answers if answer.name == "smallest"}
    assert verdicts["lora-rank-4"] == "insufficient"
    assert verdicts["lora-rank-16"] == "sufficient"
    (mark,) = find_traces(draw_scores_by_value(ranked).figures[0], symbol="diamond-open")
    assert mark.x[0] == "rank 16"

    def keep_one_seed(raw):
        raw["confirm"] = [row for row in raw["confirm"] if row["seed"] == 0]

    edit_json(ranked_copy / "sweep.json", keep_one_seed)
    assert not find_traces(draw_scores_by_value(load_sweep_data(ranked_copy)).figures[0], symbol="diamond-open")


def test_an_arm_with_confirm_each_has_its_rates_by_value_and_predicted_settings_as_diamonds(ranked, ranked_copy):
    full, lora = draw_score_by_lr(ranked).figures
    assert {trace.legendgroup for trace in full.data} == {"full"}
    subjects = [f"lora-rank-{rank}" for rank in RANK_SCORES]
    diamonds = find_traces(lora, symbol="diamond-open")
    assert [mark.legendgroup for mark in diamonds] == subjects
    assert [mark.x[0] for mark in diamonds] == [row.params["optim.lr"] for row in ranked.record.settings[2:]]
    dots = [len(trace.x) for trace in lora.data if trace.showlegend]
    assert dots == [5] * 4
    assert lora.layout.xaxis.title.text == "learning rate (log scale)"

    def sweep_alpha(raw):
        for row in (*raw["trials"], *raw["settings"]):
            if row["arm"] == "lora":
                row["params"]["method.alpha"] = 4 * row["params"]["method.rank"]

    edit_json(ranked_copy / "sweep.json", sweep_alpha)
    lora = draw_score_by_lr(load_sweep_data(ranked_copy)).figures[1]
    assert lora.layout.xaxis.title.text == "u = lr · √α (log scale)"
    (first, *_) = find_traces(lora, symbol="diamond-open")
    assert first.x[0] == pytest.approx(ranked.record.settings[2].params["optim.lr"] * 2)


def test_the_axis_of_test_scores_names_no_validation_metric(ranked_copy):
    def rename(raw):
        raw["search_metric"]["name"] = "val_acc"
        for run in raw["confirm"]:
            run["test_scores"] = {"val_acc": run["test_scores"].pop("bits_per_byte")}

    edit_json(ranked_copy / "sweep.json", rename)
    (figure,) = draw_scores_by_value(load_sweep_data(ranked_copy)).figures
    assert figure.layout.yaxis.title.text == "acc, test data"

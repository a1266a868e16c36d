"""Settings that train the same function are told apart from those that only look alike, and training agrees."""

from __future__ import annotations

import pytest

from lorasweep.record import read_steps, read_sweep
from lorasweep.sweep.definition.duplicates import describe_function, is_scale_free
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunPlace

FREE = {"optim.clip_norm": None}


def same(make_config, first, second):
    return describe_function(make_config(first)) == describe_function(make_config(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({}, {"trainer.progress": True}),
        ({"seed": 3}, {"seed": 0, "seeds.init": 3, "seeds.data_order": 3, "seeds.dropout": 3}),
        ({"method.alpha": 4.0}, {"method.alpha": 4}),
        ({"method.rank": 3, "method.alpha": 0.1 * 3}, {"method.rank": 3, "method.alpha": 0.3}),
        (
            {"method.rank": 4, "method.alpha": 8},
            {"method.rank": 4, "method.alpha": 4, "method.scaling": "alpha_over_sqrt_rank"},
        ),
        (FREE | {"method.alpha": 8}, FREE | {"method.alpha": 2, "optim.lr_ratio_b": 4}),
        (
            FREE | {"method.alpha": 8, "method.alpha_pattern": {"q_proj": 16}},
            FREE | {"method.alpha": 2, "method.alpha_pattern": {"q_proj": 4}, "optim.lr_ratio_b": 4},
        ),
        (
            FREE | {"method.alpha": 8, "method.rank_pattern": {"q_proj": 1}},
            FREE | {"method.alpha": 2, "method.rank_pattern": {"q_proj": 1}, "optim.lr_ratio_b": 4},
        ),
    ],
)
def test_the_same_function_in_other_words_is_detected(make_config, first, second):
    assert same(make_config, first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"method.rank": 3}),
        ({}, {"seed": 1}),
        ({}, {"optim.lr": 0.02}),
        ({"seeds.init": 4294967295}, {"seeds.init": 4294967294}),
        ({"method.alpha": 8}, {"method.alpha": 2, "optim.lr_ratio_b": 4}),  # the norm that is clipped differs
        (FREE | {"method.alpha": 8}, FREE | {"method.alpha": 2, "optim.lr_ratio_b": 2}),
        (
            FREE | {"optim.weight_decay": 0.1, "method.alpha": 8},
            FREE | {"optim.weight_decay": 0.1, "method.alpha": 2, "optim.lr_ratio_b": 4},
        ),
        (
            FREE | {"method.init": "orthogonal", "method.alpha": 8},
            FREE | {"method.init": "orthogonal", "method.alpha": 2, "optim.lr_ratio_b": 4},
        ),
        (
            FREE | {"method.alpha": 8, "method.alpha_pattern": {"q_proj": 16}},
            FREE | {"method.alpha": 2, "method.alpha_pattern": {"q_proj": 16}, "optim.lr_ratio_b": 4},
        ),
        (
            {"method.rank": 4, "method.alpha": 8, "method.rank_pattern": {"q_proj": 1}},
            {
                "method.rank": 4,
                "method.alpha": 4,
                "method.rank_pattern": {"q_proj": 1},
                "method.scaling": "alpha_over_sqrt_rank",
            },
        ),
        ({"method": "full"}, {"method": "head"}),
    ],
)
def test_another_function_is_not_taken_for_the_same(make_config, first, second):
    assert not same(make_config, first, second)


def test_other_methods_have_no_scale_to_be_free_of(make_config):
    assert not is_scale_free(make_config({"method": "full", "optim.clip_norm": None}))


def losses(make_config, inputs, folder, settings):
    config = make_config({"trainer.max_steps": 8, "optim.eps": 1e-20, "optim.lr": 0.01, **settings})
    train_run(config, RunPlace(folder=folder), inputs=inputs)
    return [row["loss"] for row in read_steps(folder) if "loss" in row]


def test_adam_trains_both_wordings_alike_and_clipping_parts_them(make_config, inputs, tmp_path):
    first, second = {"method.alpha": 64}, {"method.alpha": 4, "optim.lr_ratio_b": 16}
    free = [losses(make_config, inputs, tmp_path / f"free-{n}", FREE | s) for n, s in enumerate((first, second))]
    assert free[0] == pytest.approx(free[1], rel=1e-4)  # fp32, rounded differently over 8 steps
    clip = {"optim.clip_norm": 0.1}
    clipped = [losses(make_config, inputs, tmp_path / f"clip-{n}", clip | s) for n, s in enumerate((first, second))]
    assert clipped[0] != pytest.approx(clipped[1], rel=1e-4)


def test_a_trial_that_was_proposed_before_is_marked_with_the_first(begin, work, runs, content):
    content["settings"]["sampler"] = "random"
    content["arms"] = {"lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 6}}
    folder = begin(content)
    assert work(folder)
    rows = read_sweep(folder.path).trials
    first = {}
    for row in rows:
        expected = first.setdefault(row.params["method.rank"], row.number)
        assert row.duplicate_of == (None if expected == row.number else expected)
    assert sum(row.duplicate_of is not None for row in rows) == 4


def test_a_sweep_that_goes_on_knows_what_was_proposed_before(begin, work, runs, content, take_up):
    content["settings"]["sampler"] = "random"
    content["arms"] = {"lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 6}}
    whole, stopped = begin(content, folder="whole"), begin(content, folder="stopped")
    assert work(whole)
    assert not work(stopped, stop_at=9)
    take_up(stopped.path)
    marks = [[row.duplicate_of for row in read_sweep(folder.path).trials] for folder in (whole, stopped)]
    assert marks[0] == marks[1]

"""Settings of data are complete and without effectless ones, and every kind comes down to text, table or chat."""

from __future__ import annotations

from typing import get_args

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.config.data import (
    GLUE_COLUMNS,
    METRICS_OF_TASK,
    GlueTask,
    HubMetric,
    LabelMetric,
    LabelTask,
    TextMetric,
    longest_row,
    resolve_data,
)
from lorasweep.errors import ConfigError

TABLE = {"data": "table", "data.train": "a.csv"}
CHAT = {"data": "chat", "data.train": "a.jsonl"}
TEXT = {"data": "text", "data.train": "a.txt"}
HUB = {"data": "hub", "data.path": "owner/name"}
GLUE = {"data": "glue"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "table"}, "`data.train` must be set, but is missing."),
        ({"data": "hub"}, "`data.path` must be set, but is missing."),
        ({**TABLE, "data.train": " "}, "`data.train` must name where its rows are, but is empty."),
        ({**TEXT, "data.test": ""}, "`data.test` must name where its rows are, but is empty."),
        (
            {**TABLE, "data.test": "a.csv"},
            "must be different, but got 'a.csv', None and 'a.csv'. Use null to take a split",
        ),
        ({**HUB, "data.validation": "train"}, "must be different, but got 'train', 'train' and None."),
        (
            {**TABLE, "data.text_pair": "text"},
            "`data.text` and `data.text_pair` must be two columns, but both are 'text'.",
        ),
        (
            {**CHAT, "data.prompt": "a", "data.completion": "a"},
            "`data.prompt` and `data.completion` must be two columns",
        ),
        (
            {**CHAT, "data.prompt": "a"},
            "`data.prompt` and `data.completion` must be set together, but got 'a' and None.",
        ),
        (
            {**CHAT, "data.prompt": "a", "data.completion": "b", "data.messages": "c"},
            "`data.messages` must stand instead",
        ),
        ({**TABLE, "data.max_length": 1}, "`data.max_length >= 2` must hold, but got 1."),
        ({**CHAT, "data.max_length": 1}, "`data.max_length >= 2` must hold, but got 1."),
        ({**GLUE, "data.max_length": 1}, "`data.max_length >= 2` must hold, but got 1."),
        ({**TABLE, "data.max_train_examples": 0}, "`data.max_train_examples >= 1` must hold, but got 0."),
        ({**GLUE, "data.max_validation_examples": 0}, "`data.max_validation_examples >= 1` must hold, but got 0."),
        ({**CHAT, "data.max_test_examples": 0}, "`data.max_test_examples >= 1` must hold, but got 0."),
        ({**TEXT, "data.block_length": 1}, "`data.block_length >= 2` must hold, but got 1."),
        ({**TEXT, "data.max_validation_blocks": 0}, "`data.max_validation_blocks >= 1` must hold, but got 0."),
        ({**TABLE, "data.label_smoothing": 1.0}, "`0 <= data.label_smoothing < 1` must hold, but got 1.0."),
        (
            {**TABLE, "data.class_weights": "balance"},
            r"must be one of none, balanced, but got 'balance'. Did you mean `bal",
        ),
        (
            {**TABLE, "data.metric": "perplexity"},
            "`data.metric` must be one of auto, accuracy, .*, but got 'perplexity'.",
        ),
        (
            {**TABLE, "data.task": "regression", "data.metric": "f1"},
            "`data.metric` must be one of auto, pearson, spearman, mse, loss for labels that are numbers, but got",
        ),
        (
            {**TABLE, "data.task": "multi_label", "data.metric": "matthews"},
            "for several labels per row, but got 'matth",
        ),
        (
            {**TABLE, "data.task": "regression", "data.label_smoothing": 0.1},
            "`data.label_smoothing` must be 0 .* got 0.1",
        ),
        ({**GLUE, "data.task": "stsb", "data.metric": "accuracy"}, "must be one of auto, pearson, spearman, mse, loss"),
        ({**GLUE, "data.task": "sst3"}, r"`data.task` must be one of .* but got 'sst3'. Did you mean `sst2`\?"),
        ({**HUB, "data.path": ""}, "`data.path` must name a data set on the hub or a folder, but is empty."),
        (
            {**HUB, "data.kind": "chat", "data.label": "x"},
            "`data.label` must be null with `data.kind=chat`, but got 'x'",
        ),
        (
            {**HUB, "data.kind": "text", "data.prompt": "x"},
            "`data.prompt` must be null with `data.kind=text`, but got 'x'",
        ),
        ({**HUB, "data.messages": "x"}, "`data.messages` must be null with `data.kind=table`, but got 'x'"),
        (
            {**HUB, "data.kind": "text", "data.class_weights": "balanced"},
            "must keep their defaults with `data.kind=text`",
        ),
        (
            {**HUB, "data.kind": "text", "data.metric": "accuracy"},
            "must be one of auto, bits_per_byte, loss, perplexity with",
        ),
        (
            {**HUB, "data.metric": "perplexity"},
            "`data.metric` must be one of auto, accuracy, .* with `data.kind=table`, but",
        ),
        ({**HUB, "data.metric": "accurcy"}, r"but got 'accurcy'. Did you mean `accuracy`\?"),
        ({**HUB, "data.kind": "chat", "data.prompt": "x"}, "`data.prompt` and `data.completion` must be set together"),
        ({**HUB, "data.block_length": 0, "data.kind": "text"}, "`data.block_length >= 2` must hold, but got 0."),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_run(settings)


@pytest.mark.parametrize(("task", "metric"), [("mrpc", "accuracy"), ("cola", "matthews"), ("stsb", "pearson")])
def test_glue_is_a_table_with_the_metric_of_its_task(task, metric):
    form = resolve_data(
        compose_run({**GLUE, "data.task": task, "data.max_length": 77, "data.max_test_examples": 5}).data
    )
    assert (form.name, form.metric, form.max_length, form.max_test_examples) == ("table", metric, 77, 5)
    assert (form.text, form.text_pair) == GLUE_COLUMNS[task]
    assert form.task == ("regression" if task == "stsb" else "single_label")


def test_metric_that_is_set_holds_over_the_task_s_own():
    assert resolve_data(compose_run({**GLUE, "data.metric": "f1"}).data).metric == "f1"


@pytest.mark.parametrize("task", get_args(GlueTask))
def test_every_glue_task_has_settings(task):
    assert resolve_data(compose_run({**GLUE, "data.task": task}).data).text == GLUE_COLUMNS[task][0]


def test_hub_data_comes_down_to_its_kind():
    table = resolve_data(compose_run({**HUB, "data.label": "stars", "data.test": "test"}).data)
    assert (table.name, table.text, table.label, table.train, table.test) == ("table", "text", "stars", "train", "test")
    chat = resolve_data(compose_run({**HUB, "data.kind": "chat", "data.messages": "log", "data.packing": False}).data)
    assert (chat.name, chat.messages, chat.packing, chat.metric) == ("chat", "log", False, "bits_per_byte")
    text = resolve_data(compose_run({**HUB, "data.kind": "text", "data.metric": "loss", "data.block_length": 9}).data)
    assert (text.name, text.metric, text.block_length) == ("text", "loss", 9)


@pytest.mark.parametrize("settings", [TABLE, CHAT, TEXT, {}])
def test_own_data_is_its_own_form(settings):
    config = compose_run(settings).data
    assert resolve_data(config) is config


def test_longest_row_is_a_block_or_the_longest_that_is_kept():
    assert longest_row(compose_run({**TEXT, "data.block_length": 9}).data) == 9
    assert longest_row(compose_run({**TABLE, "data.max_length": 10}).data) == 10
    assert longest_row(compose_run({**HUB, "data.kind": "text", "data.block_length": 11}).data) == 11


def test_lists_of_metrics_agree():
    assert set(get_args(HubMetric)) == {*get_args(LabelMetric), *get_args(TextMetric)}
    assert set(METRICS_OF_TASK) == set(get_args(LabelTask))
    assert {"auto", *(metric for metrics in METRICS_OF_TASK.values() for metric in metrics)} == set(
        get_args(LabelMetric)
    )

"""Settings of data are complete and without effectless ones; GLUE is a table of the hub."""

from __future__ import annotations

from typing import get_args

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.config.data import (
    GLUE_COLUMNS,
    METRICS_OF_TASK,
    GlueTask,
    LabelMetric,
    LabelTask,
    glue_as_table,
    max_tokens_per_example,
)
from lorasweep.errors import ConfigError

TABLE = {"data": "table", "data.train": "a.csv"}
CHAT = {"data": "chat", "data.train": "a.jsonl"}
TEXT = {"data": "text", "data.train": "a.txt"}
GLUE = {"data": "glue"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": "table"}, ["`data.train`", "missing"]),
        ({**TABLE, "data.train": " "}, ["`data.train`", "empty"]),
        ({**TEXT, "data.test": ""}, ["`data.test`", "empty"]),
        ({**TABLE, "data.path": ""}, ["`data.path`", "empty"]),
        ({**TABLE, "data.test": "a.csv"}, ["`data.test`", "different", "'a.csv'", "null"]),
        ({**TABLE, "data.revision": "main"}, ["`data.revision`", "`data.path`", "'main'"]),
        ({**TABLE, "data.text_pair": "text"}, ["`data.text` and `data.text_pair`", "two columns", "'text'"]),
        ({**CHAT, "data.prompt": "a"}, ["`data.prompt` and `data.completion`", "together", "'a'"]),
        ({**CHAT, "data.prompt": "a", "data.completion": "b", "data.messages": "c"}, ["`data.messages`", "'c'"]),
        ({**TABLE, "data.max_length": 1}, ["`data.max_length >= 2`", "1"]),
        ({**CHAT, "data.max_test_examples": 0}, ["`data.max_test_examples >= 1`", "0"]),
        ({**GLUE, "data.max_validation_examples": 0}, ["`data.max_validation_examples >= 1`", "0"]),
        ({**TEXT, "data.block_length": 1}, ["`data.block_length >= 2`", "1"]),
        ({**TEXT, "data.max_validation_blocks": 0}, ["`data.max_validation_blocks >= 1`", "0"]),
        ({**TABLE, "data.labels": ["a", "a"]}, ["`data.labels`", "two or more different names", "['a', 'a']"]),
        ({**TABLE, "data.label_smoothing": 1.0}, ["`data.label_smoothing < 1`", "1.0"]),
        ({**TABLE, "data.class_weights": "balance"}, ["none, balanced", "`balanced`"]),
        ({**TABLE, "data.metric": "perplexity"}, ["`data.metric`", "'perplexity'"]),
        ({**TABLE, "data.metric": "f1_macro"}, ["'f1_macro'", "`data.metric._target_` names a class."]),
        ({**TABLE, "data.task": "regression", "data.metric": "f1"}, ["`data.metric`", "pearson", "'f1'"]),
        ({**TABLE, "data.task": "regression", "data.label_smoothing": 0.1}, ["`data.label_smoothing`", "0.1"]),
        ({**GLUE, "data.task": "stsb", "data.metric": "accuracy"}, ["`data.metric`", "pearson", "'accuracy'"]),
        ({**GLUE, "data.task": "sst3"}, ["`data.task`", "`sst2`"]),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(settings, words):
    with pytest.raises(ConfigError) as raised:
        compose_run(settings)
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize("task", get_args(GlueTask))
def test_every_glue_task_is_a_table_of_the_hub(task):
    settings = {**GLUE, "data.task": task, "data.max_length": 77, "data.max_test_examples": 5}
    table = glue_as_table(compose_run(settings).data)
    assert (table.text, table.text_pair) == GLUE_COLUMNS[task]
    assert (table.subset, table.max_length, table.max_test_examples) == (task, 77, 5)
    assert table.metric == {"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy")
    assert table.task == ("regression" if task == "stsb" else "single_label")


def test_metric_that_is_set_holds_over_the_task_s_own():
    assert glue_as_table(compose_run({**GLUE, "data.metric": "f1"}).data).metric == "f1"


def test_longest_example_is_a_block_or_the_longest_that_is_kept():
    assert max_tokens_per_example(compose_run({**TEXT, "data.block_length": 9}).data) == 9
    assert max_tokens_per_example(compose_run({**TABLE, "data.max_length": 10}).data) == 10


def test_lists_of_metrics_agree():
    assert set(METRICS_OF_TASK) == set(get_args(LabelTask))
    metrics = {metric for metrics in METRICS_OF_TASK.values() for metric in metrics}
    assert {"auto", *metrics} == set(get_args(LabelMetric))

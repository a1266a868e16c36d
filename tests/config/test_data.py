"""Settings of data are complete and without effectless ones; a task of GLUE is a table of the hub."""

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError

TABLE = {"data": "table", "data.train": "a.csv"}
CHAT = {"data": "chat", "data.train": "a.jsonl"}
TEXT = {"data": "text", "data.train": "a.txt"}
GLUE = {"data": "glue_mrpc"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": "table"}, ["`data.train`", "missing"]),
        ({**TABLE, "data.train": " "}, ["`data.train`", "empty"]),
        ({**TEXT, "data.test": ""}, ["`data.test`", "empty"]),
        ({**TABLE, "data.test": "a.csv"}, ["`data.test`", "different", "'a.csv'", "null"]),
        ({**TABLE, "data.test_fraction": 0}, ["`data.test_fraction >= 0.01`", "got 0"]),
        ({**CHAT, "data.test_fraction": 0.6}, ["`data.test_fraction <= 0.5`", "0.6"]),
        ({**TEXT, "data.test_fraction": "all"}, ["`data.test_fraction`", "a number", "'all'"]),
        ({**TABLE, "data.test": "b.csv", "data.test_fraction": 0.2}, ["`data.test_fraction`", "`data.test`", "0.2"]),
        ({**TABLE, "data.revision": "main"}, ["`data.revision`", "`data.path`", "'main'"]),
        ({**CHAT, "data.prompt": "a"}, ["`data.prompt` and `data.completion`", "together", "'a'"]),
        ({**CHAT, "data.prompt": "a", "data.completion": "b", "data.messages": "c"}, ["`data.messages`", "'c'"]),
        ({**TABLE, "data.labels": ["a", "a"]}, ["`data.labels`", "two or more different names", "['a', 'a']"]),
        ({**TABLE, "data.class_weights": "balance"}, ["none, balanced", "`balanced`"]),
        ({**TABLE, "data.metric": "perplexity"}, ["`data.metric`", "'perplexity'"]),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(settings, words):
    with pytest.raises(ConfigError) as raised:
        compose_run(settings)
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"])
def test_every_glue_task_is_a_table_of_the_hub(task):
    table = compose_run({"data": f"glue_{task}", "data.max_length": 77}).data
    assert (table.name, table.path, table.subset, table.max_length) == ("table", "nyu-mll/glue", task, 77)
    assert table.metric == {"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy")
    assert table.task == ("regression" if task == "stsb" else "single_label")

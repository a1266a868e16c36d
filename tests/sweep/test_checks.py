"""Each arm is checked against its base model and data before anything is written."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tests.objectives.test_objectives import make_splits

from lorasweep.cli import run
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.methods import copy_sharing_weights
from lorasweep.models.load import load_base
from lorasweep.outcome import WRONG_REQUEST
from lorasweep.sweep.assess import assess
from lorasweep.sweep.checks import (
    check_definition,
    check_rows,
    find_metric,
    score_constant_answer,
)
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.sweep.draft import complete_definition, draft_definition
from lorasweep.tasks.table.objective import Classification
from lorasweep.training.inputs import InputsCache
from lorasweep.training.run_inputs import RunInputs


@pytest.fixture(scope="module")
def tiny_inputs(inputs, make_config):
    """A cache that has one base model and one data set for every run."""
    base = load_base(make_config().model, dtype=inputs.base.model.dtype)

    class OneInputs(InputsCache):
        def load(self, config):
            return RunInputs(base=base, splits=inputs.splits, precision="fp32")

    return OneInputs()


def test_an_arm_that_does_not_fit_the_model_is_refused_by_name(write_file, content, tiny_inputs):
    content["arms"]["lora"]["space"]["method.rank"] = [1, 100_000]
    definition = read_definition(write_file(content))
    with pytest.raises(ConfigError, match=r"^arm `lora`: `method.rank <= \d+` must hold .*100000"):
        check_definition(definition, tiny_inputs)


def test_the_constant_answer_is_that_of_all_arms(write_file, content, tiny_inputs):
    definition = read_definition(write_file(content))
    assert score_constant_answer(definition, tiny_inputs) == {}  # text
    task = Classification(num_classes=2)
    one, other = (make_splits(task, [0, 1, 1], labels, torch.int64) for labels in ([0, 1, 1, 1], [0, 0, 1, 1]))

    def find(lora_splits):
        by_method = {"lora": lora_splits}
        load = lambda config: SimpleNamespace(splits=by_method.get(config.method.name, one))  # noqa: E731
        return score_constant_answer(definition, SimpleNamespace(load=load))

    assert find(one)["accuracy"] == 0.75
    assert find(other) == {}


OWN = {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 2}
TABLE = {"data": "table", "data.train": "topics.csv", "data.text": "text", "data.label": "label"}
TABLE |= {"model": "classifier", "model.path": "embedded:tiny"}


@pytest.mark.parametrize(
    ("of_all", "of_lora", "message"),
    [
        (None, {"settings": {"method": "lora", "data.metric": "loss"}}, r"`data.metric`.* bits_per_byte, loss"),
        (OWN, {"space": {"data.metric.average": ["micro", "macro"]}}, "must be the same for all trials.* different ar"),
    ],
)
def test_trials_with_different_metrics_are_refused(write_file, content, of_all, of_lora, message):
    if of_all:
        content["settings"] = {**TABLE, "trainer.max_steps": 2, "data.metric": of_all}
    content["arms"]["lora"] |= of_lora

    def load(config):
        metric = config.data.metric if of_all is None else config.data.metric.name
        return SimpleNamespace(splits=SimpleNamespace(metric=metric))

    with pytest.raises(ConfigError, match=message):
        find_metric(read_definition(write_file(content)), SimpleNamespace(load=load))


@pytest.mark.parametrize(
    "of_lora",
    [
        {"data": "chat", "data.train": "chats.jsonl"},
        {"data": "chat", "data.train": "chats.jsonl", "data.metric": "loss"},
        {"data.train": "others.jsonl"},
        {"data.test": "others.jsonl"},
    ],
)
def test_preferences_are_not_compared_with_other_data(here, of_lora, capsys):
    pairs = [{"prompt": f"ask {n}", "chosen": f"yes {n}", "rejected": "no", "completion": "yes"} for n in range(90)]
    for name, rows in {"pairs": pairs[:60], "others": pairs[60:], "chats": pairs[:60]}.items():
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lora = {"settings": {"method": "lora", **of_lora}, "space": {"optim.lr": [1e-3, 1e-2]}, "trials": 2}
    settings = {"data": "preferences", "data.train": "pairs.jsonl", "data.metric": "loss", "trainer.max_steps": 2}
    content = {
        "name": "mixed",
        "settings": settings,
        "arms": {"frozen": {"settings": {"method": "frozen"}}, "lora": lora},
    }
    Path("mixed.yaml").write_text(yaml.safe_dump(content))
    assert run(["sweep", "mixed.yaml", "sweep.output=new"]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "must be the same for all arms" in line or "same validation and test examples in all arms" in line
    assert not Path("new").exists()


def test_test_data_that_cannot_be_read_is_refused_before_the_search(write_file, content, tiny_inputs):
    class WithoutTest:
        def load(self, config):
            inputs = tiny_inputs.load(config)
            true = inputs.splits
            known = {"train": true.train, "metric": true.metric, "score_metric": true.score_metric}
            return SimpleNamespace(base=inputs.base, splits=SimpleNamespace(test=self.test, **known))

        def test(self):
            raise ConfigError("the test split must not be empty, but has no document.")

    content["settings"]["confirm.seeds"] = 2
    definition = read_definition(write_file(content))
    with pytest.raises(ConfigError, match=r"the test split must not be empty, .* `confirm\.seeds=0`"):
        check_definition(definition, WithoutTest())
    check_definition(read_definition(write_file(content), ["confirm.seeds=0"]), WithoutTest())


def test_what_lora_adapts_is_said_once_and_experts_that_it_leaves_out_are_a_warning(write_file, content, tiny_inputs):
    definition = read_definition(write_file(content))
    found = assess(definition, tiny_inputs)
    assert len([text for text in found.others if "adapt" in text]) == 1
    assert found.warnings == []
    config = definition.arms[-1].base
    base = tiny_inputs.load(config).base
    model = copy_sharing_weights(base.model)
    model.register_parameter("experts", torch.nn.Parameter(torch.zeros(4, 8, 8)))
    with_experts = RunInputs(base=replace(base, model=model), splits=tiny_inputs.load(config).splits, precision="fp32")
    cache = SimpleNamespace(load=lambda config: with_experts)
    found = assess(definition, cache)
    assert found.warnings == [with_experts.list_notes(config)[-1].text]
    assert not any("experts" in note for note in found.others)


@pytest.mark.parametrize(("steps", "is_warned"), [(2, True), (40, False)])
def test_too_few_steps_for_labels_are_a_warning_with_numbers(tmp_path, steps, is_warned):
    rows = [f"a text with number {n},{'rare' if n % 4 == 0 else 'usual'}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    settings = {"model": "classifier", "model.path": "embedded:tiny", "data": "table"}
    settings |= {"data.train": str(tmp_path / "rows.csv"), "trainer.max_steps": steps, "trainer.batch_size": 8}
    arms = {"lora": {"settings": {"method": "lora"}, "space": {"optim.lr": [1e-3, 1e-2]}}}
    definition = read_definition({"name": "few", "settings": settings, "arms": arms})
    warnings = assess(definition, InputsCache()).warnings
    assert len(warnings) == is_warned
    assert all("2 steps of 8: 0." in text and "most frequent label (accuracy" in text for text in warnings)
    assert all("`trainer.max_steps=" in text for text in warnings)


def test_a_margin_that_the_test_examples_cannot_show_is_a_warning_with_one_that_they_can(tmp_path):
    rows = [f"a text with number {n},{'no' if n % 2 else 'yes'}" for n in range(200)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    settings = {"model": "classifier", "model.path": "embedded:tiny", "data": "table", "trainer.max_steps": 60}
    settings |= {"data.train": str(tmp_path / "rows.csv"), "confirm.seeds": 3}
    lora = {"settings": {"method": "lora"}, "space": {"method.rank": [1, 4]}, "confirm_each": "method.rank"}
    content = {"settings": settings, "arms": {"frozen": {"settings": {"method": "frozen"}}, "lora": lora}}
    cache, margin = InputsCache(), "5%"
    for _ in range(2):  # with a share of the gain, then with a number
        (warning,) = assess(read_definition(content, [f"confirm.margin={margin}"]), cache).warnings
        assert re.search(
            rf"`confirm.margin` \({margin}\) is .* Give \d[\d,]+ test examples \(`data.test=FILE`\)", warning
        )
        larger = re.search(r"\(`confirm.margin=(.*?)`\)", warning)[1]
        assert assess(read_definition(content, [f"confirm.margin={larger}"]), cache).warnings == []
        margin = "0.01"


@pytest.mark.parametrize(
    ("groups", "said", "kind"),
    [
        ((), " test examples. Four times", "sweep"),
        (tuple("abcd"), "4 test examples. Four times", "sweep"),
        (("a", "b") * 4, " test examples are in 2 groups", "warning"),
        (("a",) * 8, "one group ('a')", "warning"),
    ],
)
def test_it_is_said_on_how_much_test_data_the_verdicts_rest(write_file, content, tiny_inputs, groups, said, kind):
    definition = read_definition(write_file(content), ["confirm.seeds=3"])
    loaded = tiny_inputs.load(definition.arms[0].base)
    splits = replace(loaded.splits, test=lambda: replace(loaded.splits.test(), groups=groups))
    cache = SimpleNamespace(load=lambda config: replace(loaded, splits=splits))
    notes = assess(definition, cache).notes
    assert any(note.kind == kind and said in note.text for note in notes), notes


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", "b", "a"], ["`data.train`", "at least 30 rows", "3"]),
        (["a", "b"] * 20 + ["c"], ["`data.label=label`", "'c': 1", "name another column"]),
    ],
)
def test_too_few_rows_are_refused_by_new_and_sweep(here, capsys, labels, said):
    Path("few.csv").write_text("text,label\n" + "".join(f"text {n},{label}\n" for n, label in enumerate(labels)))
    for words in (["new", "few.yaml"], ["sweep", "sentences"]):
        assert run([*words, "model.path=embedded:tiny", "data.train=few.csv"]) == WRONG_REQUEST
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(part in error for part in said)


@pytest.mark.parametrize(("lost", "is_refused"), [(20, False), (21, True)])
def test_a_length_that_leaves_out_more_than_half_of_the_examples_is_refused(lost, is_refused):
    data = compose_run({"data": "chat", "data.train": "chats.jsonl"}).data
    whole, cut = (SimpleNamespace(describe=lambda n=n: {"examples": 40 - n, "left_out": n}) for n in (0, lost))
    splits = SimpleNamespace(train=whole, validation=cut, test=lambda: whole)
    message = rf"data\.max_length.*{lost} of 40 of validation"
    with pytest.raises(ConfigError, match=message) if is_refused else nullcontext():
        check_rows(data, splits)


def test_a_shipped_sweep_finds_columns_and_length_as_a_draft_does(here):
    rows = [f"{n % 2},a text of {n} words {'and more ' * (n % 90)},another {n}" for n in range(90)]
    Path("pairs.csv").write_text("\n".join(["fits,sentence1,sentence2", *rows]))
    words, cache = ["model.path=embedded:tiny", f"data.train={here / 'pairs.csv'}"], InputsCache()
    named = complete_definition(read_definition(find_sweep_file("pairs"), words), cache).arms[0].base.data
    drafted = draft_definition(words, cache).arms[0].base.data
    assert (named.text, named.text_pair, named.label, named.max_length) == ("sentence1", "sentence2", "fits", 1024)
    assert named.max_length == drafted.max_length
    words += ["data.text=sentence2", "data.max_length=64"]
    typed = complete_definition(read_definition(find_sweep_file("pairs"), words), cache).arms[0].base.data
    assert (typed.text, typed.text_pair, typed.label, typed.max_length) == ("sentence2", None, "fits", 64)

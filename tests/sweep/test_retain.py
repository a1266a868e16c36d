"""`retain`: further data sets on which the frozen base and each confirm run are scored once."""

import pytest
import yaml
from tests.small_runs import SMALL_RUN

import lorasweep
from lorasweep.cli import run
from lorasweep.config.data import ScoreMetric
from lorasweep.outcome import WRONG_REQUEST
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.sweep.checks import list_retained
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.training.inputs import InputsCache

CODE = {"data": "stdlib_code", "data.block_length": 32, "data.max_test_blocks": 24}
CONTENT = {
    "name": "retained",
    "settings": SMALL_RUN | {"confirm.seeds": 2, "retain.data": {"code": CODE}},
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "lora": {"settings": {"method": "lora", "method.rank": 2, "optim.lr": 1e-3}},
    },
}


@pytest.fixture
def path(here):
    path = here / "retained.yaml"
    path.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    (here / "labels.csv").write_text("text,label\n" + "".join(f"number {n},{n % 2}\n" for n in range(40)))
    return path


def test_data_sets_are_named_options_or_settings_and_take_nothing_from_the_learned_data(path):
    definition = read_definition(path, ["retain.data.docs=stdlib_docs", "data.metric=perplexity"])
    assert [*definition.retained] == ["code", "docs"]
    code, docs = definition.retained.values()
    assert (code.name, code.block_length, code.max_test_blocks, code.metric) == ("stdlib_code", 32, 24, "bits_per_byte")
    assert (docs.name, docs.block_length) == ("stdlib_docs", 128)
    assert read_definition(path, ["retain.data={}"]).retained == {}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("retain.margin=little", "`retain.margin` must be a number, but got 'little'"),
        ("retain.margin=0", "`retain.margin > 0` must hold"),
        ("retain.data=[stdlib_code]", "`retain.data` must be a mapping"),
        ("retain.data.x=stdlib_cod", "`retain.data.x`: `data` must be one of"),
        ("retain.data.x={data: text, data.train: gone.txt}", "`retain.data.x`: `data.train` must name an existing"),
        ("retain.data.x={data: table, data.train: labels.csv}", "`retain.data.x`: `model.kind` must be classifier"),
        ("retain.data.x={optim.lr: 1}", "`retain.data.x`: its settings must be `data` or begin with `data.`"),
        ("retain.data={x.y: stdlib_code}", "must consist of"),
        ("arms.frozen=null", "`retain.data` must be empty without a confirm stage and an arm with `method=frozen`"),
        ("confirm.seeds=0", "`retain.data` must be empty without a confirm stage"),
        ("arms.lora.retain.margin=0.5", "`retain.margin` must be set once for the whole sweep"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(path, capsys, override, said):
    assert run(["sweep", str(path), "sweep.output=new", override]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (path.parent / "new").exists()


def test_labels_that_the_model_does_not_learn_are_refused(path, capsys):
    (path.parent / "other.csv").write_text("text,label\n" + "".join(f"number {n},{'xyz'[n % 3]}\n" for n in range(60)))
    words = ["data=table", "data.train=labels.csv", "model.kind=classifier"]
    overrides = [*words, "retain.data={other: {data: table, data.train: other.csv}}"]
    assert run(["sweep", str(path), "sweep.output=new", *overrides]) == WRONG_REQUEST
    assert "labels must be those that the model learns (0 and 1), but are x, y and z" in capsys.readouterr().err
    overrides = [*words, "retain.data={same: {data: table, data.train: labels.csv}}"]
    same = read_definition(path, overrides)
    (row,) = list_retained(same, InputsCache())
    assert (row.name, row.metric) == ("same", ScoreMetric(name="accuracy", direction="maximize"))


@pytest.mark.release
def test_a_tenfold_learning_rate_forgets_more(path):
    settings = {"trainer.max_steps": 20, "trainer.eval_every_steps": 10, "trainer.batch_size": 4, "confirm.seeds": 3}
    arms = CONTENT["arms"] | {
        name: {"settings": {"method": "lora", "method.rank": 4, "optim.lr": lr}}
        for name, lr in {"lora": 3e-3, "tenfold": 3e-2}.items()
    }
    content = CONTENT | {"settings": CONTENT["settings"] | settings, "arms": arms}
    result = lorasweep.run_sweep(content, output=path.parent / "new", progress=None)
    found = {answer.subject: answer for answer in load_sweep_data(result.folder).retained["code"]}
    assert found["tenfold"].verdict == "worse"
    assert found["lora"].value < found["tenfold"].value
    assert found["lora"].verdict != "worse"

"""lm-evaluation-harness scores a run's best weights on tasks from local files."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from lorasweep.cli import run
from lorasweep.config.sweep import HarnessConfig
from lorasweep.config.trust import set_trusted
from lorasweep.errors import ConfigError
from lorasweep.models.load import load_base
from lorasweep.record import read_run, read_sweep
from lorasweep.report.summary import summarize
from lorasweep.results import load_sweep
from lorasweep.training.harness import check_harness, score_by_harness
from lorasweep.training.restore import restore_model
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

pytest.importorskip("lm_eval", reason="an extra")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
QUESTIONS = (
    ("import o", ("s\n", "zq"), 0),
    ("def __init_", ("_(self", "q(self"), 0),
    ("return Fal", ("qq", "se"), 1),
    ("class Foo(obj", ("xyz)", "ect)"), 1),
    ("for i in ran", ("ge(", "dq["), 1),  # the wrong answer is marked, so that no model gets all right
)


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": text, "choices": choices, "answer": answer} for text, choices, answer in QUESTIONS]
    (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "code_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "code.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "code_words.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(autouse=True)
def _trust():
    set_trusted(["lm_eval"])
    yield
    set_trusted(())


def harness(tasks, *names, **settings):
    given = {"tasks": names or ("code_words",), "include_path": str(tasks), "num_fewshot": None, "limit": None}
    return HarnessConfig(**given | settings)


def count_right(model, tokenizer):
    """Returns the share of the questions whose marked answer has the higher probability."""
    right = 0
    for text, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            tokens = torch.tensor(tokenizer(text + choice, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
            scores.append(logits.gather(1, tokens[1:, None])[-len(choice) :].sum().item())
        right += scores[answer] > scores[1 - answer]
    return right / len(QUESTIONS)


def test_a_run_is_scored_with_its_best_weights_once(make_config, inputs, tmp_path, tasks):
    config = make_config({"optim.lr": 0.3})  # so high that the adapter spoils the base
    train_run(config, RunFolder(path=tmp_path / "run"), inputs=inputs)
    state = torch.get_rng_state()
    record = score_by_harness(tmp_path / "run", harness=harness(tasks), inputs=inputs)
    assert torch.equal(torch.get_rng_state(), state)
    model = restore_model(config, inputs.base, folder=tmp_path / "run" / "best")
    assert record.harness == {"code_words/acc": count_right(model, inputs.base.tokenizer)}
    assert record == read_run(tmp_path / "run")
    assert "lm_eval" in record.packages
    assert score_by_harness(tmp_path / "run", harness=harness(tasks, "nothing"), inputs=inputs) == record


def test_the_base_alone_knows_the_words(make_config, inputs, tmp_path, tasks):
    config = make_config({"method": "frozen"})
    train_run(config, RunFolder(path=tmp_path / "run"), inputs=inputs)
    found = score_by_harness(tmp_path / "run", harness=harness(tasks, limit=4), inputs=inputs).harness
    assert found == {"code_words/acc": 1.0}


@pytest.mark.parametrize(
    "kind", [pytest.param("unknown", marks=pytest.mark.slow), "no data", "damaged", "no trust", "labels"]
)
def test_what_the_harness_can_not_score_is_refused_before_training(kind, inputs, tasks, make_config):
    wanted, base = harness(tasks), inputs.base
    named = "`confirm.harness.tasks` must be tasks that lm-evaluation-harness can load, but got"
    if kind == "unknown":  # slow, because the harness then reads all its own tasks
        wanted = harness(tasks, "code_word_typo", include_path=str(tasks))
    elif kind == "no data":
        (tasks / "code.jsonl").unlink()
    elif kind == "damaged":
        (tasks / "code.jsonl").write_text('{"text": ')
    elif kind == "no trust":
        set_trusted(())
        named = r"`confirm.harness.include_path` must be a folder that you trust.* `trust=\[lm_eval\]`"
    else:
        base = load_base(make_config({"model.kind": "classifier"}).model, dtype=torch.float32)
        named = "`confirm.harness.tasks` must be empty unless the base is a causal model"
    with pytest.raises(ConfigError, match=named) as refused:
        check_harness(wanted, base)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_the_confirm_stage_of_a_sweep_is_scored_beside_the_test_data(tmp_path, monkeypatch, tasks, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        *("data.block_length=32", "data.max_validation_blocks=4", "data.max_test_blocks=4", "trainer.device=cpu"),
        *("trainer.max_steps=2", "trainer.eval_every_steps=1", "trainer.batch_size=2", "sweep.trials=2"),
        *("confirm.seeds=2", "logger=none", "sweep.output=out"),
        *("confirm.harness.tasks=[code_words]", f"confirm.harness.include_path={tasks}"),
    ]
    assert run(["sweep", "quickstart", *words]) == 0
    record = read_sweep(tmp_path / "out")
    assert {row.arm for row in record.confirm} == {"frozen", "lora", "full"}
    assert all(0 <= row.harness["code_words/acc"] <= 1 for row in record.confirm)
    assert "code_words/acc" in capsys.readouterr().out
    summary = summarize(tmp_path / "out")
    assert summary.as_json()["arms"][0]["harness"] == {"code_words/acc": 0.8}
    (sentence,) = [one for one in summary.sentences if "lm-evaluation-harness" in one]
    assert "code_words/acc is 0.800 for `frozen`" in sentence
    assert "The verdicts are on bits per byte alone." in sentence
    assert "code_words/acc" in (tmp_path / "out" / "report" / "confirmed.csv").read_text().splitlines()[0]
    assert "lm-evaluation-harness" in (tmp_path / "out" / "report" / "index.html").read_text()
    assert set(load_sweep(tmp_path / "out").confirm_dataframe()["code_words/acc"].dropna()) <= {0.2, 0.4, 0.6, 0.8, 1.0}

"""`lorasweep new`: a sweep file for data that it has not seen."""

import json
from pathlib import Path

import pytest
import yaml

from lorasweep.cli import run
from lorasweep.config.command_line import parse_overrides
from lorasweep.outcome import DONE, WRONG_REQUEST
from lorasweep.sweep.controller import stopping
from lorasweep.sweep.controller.lifecycle import read_saved_definition
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.packing import explain_solo_arms
from lorasweep.sweep.draft import draft_definition, draft_sweep
from lorasweep.training.inputs import InputsCache

MODEL = "model.path=embedded:tiny"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_topics(tmp_path / "topics.csv")
    return tmp_path


def draft(*words, code=DONE):
    assert run(["new", "mine.yaml", *words]) == code
    return None if code else yaml.safe_load(Path("mine.yaml").read_text())


def write_topics(path, *, header="stars,review,author\n", rows=200):
    lines = [f"{n % 4},{'a longer or shorter text ' * (1 + n % 5)}{n},{n % 30}\n" for n in range(rows)]
    path.write_text(header + "".join(lines))


def test_columns_lengths_and_steps_come_from_the_data(here, capsys):
    sweep = draft(MODEL, "data.train=topics.csv")
    settings = sweep["settings"]
    assert (settings["model"], settings["data"]) == ("classifier", "table")
    assert (settings["data.text"], settings["data.label"]) == ("review", "stars")
    assert settings["data.max_length"] == 128
    assert settings["trainer.max_steps"] == 60  # three epochs of fewer than 200 examples are fewer steps
    assert "trainer.eval_every_steps" not in settings
    assert list(sweep["arms"]) == ["frozen", "full", "lora"]
    full, lora = (sweep["arms"][name]["space"]["optim.lr"] for name in ("full", "lora"))
    assert (full["low"], full["high"]) == (3e-5, 3e-3)  # the base is narrow: 160
    assert (lora["low"], lora["high"]) == pytest.approx((3e-4, 3e-2))
    written = (here / "mine.yaml").read_text()
    assert "epochs of" in written
    assert "data.metric: accuracy # or f1, matthews or loss\n" in written
    assert "lorasweep plan mine.yaml" in capsys.readouterr().out
    assert [arm.trials for arm in read_definition(here / "mine.yaml").arms] == [1, 8, 16]
    # another number of steps keeps packs
    longer = ["trainer.max_steps=1000"]
    assert explain_solo_arms(read_definition(here / "mine.yaml", longer)) == []


def test_test_data_of_the_user_are_left_alone(here):
    write_topics(here / "more.csv", rows=800)
    settings = draft(MODEL, "data.train=more.csv", "data.test=topics.csv")["settings"]
    assert settings["data.test"] == "topics.csv"
    assert "data.test_fraction" not in settings


def test_settings_of_the_user_are_kept(here):
    words = ["data.label=author", "data.max_length=24", "trainer.max_steps=7", "sweep.trials=3"]
    settings = draft(MODEL, "data.train=topics.csv", *words)["settings"]
    assert (settings["data.label"], settings["data.max_length"], settings["trainer.max_steps"]) == ("author", 24, 7)
    assert (settings["data.text"], settings["sweep.trials"]) == ("review", 3)


def test_the_comment_on_trials_holds_for_the_arms_of_the_draft(here):
    draft(MODEL, "data.train=topics.csv")
    assert "gets half of them" in (here / "mine.yaml").read_text()
    (here / "mine.yaml").unlink()
    draft(MODEL, "data.train=topics.csv", "sweep.trials=8", "arms.full.trials=8")
    assert "gets half of them" not in (here / "mine.yaml").read_text()


def test_texts_and_numbers_are_read_as_they_were_drafted(here):
    write_topics(here / "topics.csv", header="no,1e-3,yes\n")
    words = ["data.label='no'", "data.text='1e-3'", "data.group='yes'", "optim.eps=1e-5", "optim.weight_decay=0.25"]
    sweep = draft(MODEL, "data.train=topics.csv", *words)
    expected = {"data.label": "no", "data.text": "1e-3", "data.group": "yes", "optim.eps": 1e-5}
    assert sweep["settings"].items() >= expected.items()
    written = read_definition(here / "mine.yaml").raw["file"]
    assert written["settings"] == {**sweep["settings"], "data.train": str(here / "topics.csv")}
    assert written["arms"] == sweep["arms"]


def test_other_metric_is_suggested_if_most_examples_have_one_label(here, capsys):
    rows = [f"text {n},{'rare' if n % 10 == 0 else 'usual'}\n" for n in range(300)]
    (here / "rare.csv").write_text("text,label\n" + "".join(rows))
    assert draft(MODEL, "data.train=rare.csv")["settings"]["data.metric"] == "accuracy"
    assert "so matthews says more" in (here / "mine.yaml").read_text()
    assert run(["new", "mine.yaml", MODEL, "data.train=rare.csv"]) == WRONG_REQUEST
    assert "mine.yaml' exists already" in capsys.readouterr().err


def test_pairs_conversations_and_running_text_are_recognised(here):
    rows = [{"sentence1": f"one thing {n}", "sentence2": f"another {n}", "label": n % 2} for n in range(120)]
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = draft(MODEL, "data.train=pairs.jsonl")["settings"]
    assert (settings["data.text"], settings["data.text_pair"]) == ("sentence1", "sentence2")
    (here / "mine.yaml").unlink()
    rows = [{"prompt": f"add {n} and 1", "completion": f"it is {n + 1}"} for n in range(120)]
    (here / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = draft(MODEL, "data.train=chat.jsonl")["settings"]
    assert (settings["data"], settings["model"]) == ("chat", "causal_lm")
    (here / "mine.yaml").unlink()
    (here / "book.txt").write_text("\n\n".join(f"Paragraph {n} says some words." for n in range(3000)))
    settings = draft(MODEL, "data.train=book.txt")["settings"]
    assert (settings["data"], settings["model"]) == ("text", "causal_lm")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ask {}", "chosen": "yes", "rejected": "no"},
        {"chosen": "ask {} yes", "rejected": "ask {} no"},
        {"conversations": [{"from": "human", "value": "ask {}"}], "chosen": "yes", "rejected": "no"},
    ],
)
def test_pairs_of_answers_are_recognised_and_get_lower_rates(here, row, capsys):
    lines = [json.dumps({**row, "score": n}).replace("{}", str(n)) for n in range(200)]
    (here / "pairs.jsonl").write_text("\n".join(lines))
    sweep = draft(MODEL, "data.train=pairs.jsonl", "data.template=plain")
    settings, full = sweep["settings"], sweep["arms"]["full"]["space"]["optim.lr"]
    assert (settings["data"], settings["model"], settings["data.metric"]) == (
        "preferences",
        "causal_lm",
        "preference_accuracy",
    )
    assert settings["data.max_length"] == 128
    assert (full["low"], full["high"]) == (1e-6, 1e-4)  # the base is narrow: 160
    assert "Columns that are not used: ['score']." in (here / "mine.yaml").read_text()
    words = [MODEL, "data.train=pairs.jsonl", "data.template=plain"]
    assert draft_definition(words, InputsCache()).arms[0].base.data.name == "preferences"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("prompt", "completion"), ["data.turns=last", "data.metric=bits_per_byte"]),
        # what a note of a draft proposes
        (("prompt", "completion"), ["data.answers.score=exact_match", "confirm.metric=exact_match"]),
        (("task", "solution"), ["data.prompt=task", "data.completion=solution"]),
    ],
)
def test_keys_that_only_conversations_have_are_checked_when_the_kind_of_data_is_known(here, columns, words):
    rows = [dict(zip(columns, (f"add {n} and 1", f"it is {n + 1}"), strict=True)) for n in range(120)]
    (here / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [MODEL, "data.train=chat.jsonl", "data.template=plain", *words]
    assert draft_definition(words, InputsCache()).arms[0].base.data.name == "chat"
    settings = draft(*words)["settings"]
    assert settings["data"] == "chat"
    assert all(f"{key}={settings[key]}" in words for key in (word.split("=")[0] for word in words))


def test_a_wrong_key_is_refused_when_the_kind_of_data_is_known(here, capsys):
    draft(MODEL, "data.train=topics.csv", "data.template=plain", code=WRONG_REQUEST)
    assert "`data.template` is a setting of `data=chat`" in capsys.readouterr().err


def test_examples_that_are_cut_off_are_said_with_their_number(here, capsys):
    draft(MODEL, "data.train=topics.csv", "data.max_length=16")
    (line,) = [line for line in Path("mine.yaml").read_text().splitlines() if "`data.max_length`" in line]
    assert all(f"examples of {split}" in line for split in ("train", "validation", "test"))
    assert "warning: `data.max_length` cuts off the end of" in capsys.readouterr().out


def write_table(path, names, rows=120):
    lines = [
        "\t".join(names),
        *("\t".join([str(n % 2), f"id{n}", f"one thing {n}", f"a longer text {n}"]) for n in range(rows)),
    ]
    path.write_text("\n".join(lines) + "\n")


def test_keys_of_an_arm_are_set_in_it_and_a_value_ends_the_search_of_its_key(here, capsys):
    arms = draft(MODEL, "data.train=topics.csv", "arms.full.trials=4", "arms.lora.optim.lr=1e-3")["arms"]
    assert arms["full"]["trials"] == 4
    assert arms["lora"]["settings"]["optim.lr"] == 1e-3
    assert list(arms["lora"]["space"]) == ["method.rank"]
    (here / "mine.yaml").unlink()
    draft(MODEL, "data.train=topics.csv", "arms.ful.trials=4", code=2)
    assert "`arms.ful.trials` must be a key of an arm of the draft" in capsys.readouterr().err


def test_columns_that_are_not_used_are_named(here, capsys):
    write_table(here / "texts.tsv", ["label", "id", "summary", "remark"])
    settings = draft(MODEL, "data.train=texts.tsv")["settings"]
    assert settings["data.text"] == "remark"
    assert "data.text_pair" not in settings
    unused = "Columns that are not used: ['id', 'summary']."
    assert unused in capsys.readouterr().out
    assert unused in (here / "mine.yaml").read_text()
    said = []
    draft_definition([MODEL, "data.train=texts.tsv"], InputsCache(), on_note=said.append)
    assert f"• {unused}" in said


def test_a_question_and_an_answer_with_a_named_label_are_a_pair_and_without_one_a_chat(here, capsys):
    write_table(here / "answers.tsv", ["fits", "id", "question", "answer"])
    assert draft(MODEL, "data.train=answers.tsv")["settings"]["data"] == "chat"
    said = capsys.readouterr().out
    assert "Columns that are not used: ['fits', 'id']." in said
    assert "`data.answers.score=exact_match confirm.metric=exact_match`" in said
    (here / "mine.yaml").unlink()
    settings = draft(MODEL, "data.train=answers.tsv", "data.label=fits")["settings"]
    assert (settings["data.text"], settings["data.text_pair"]) == ("question", "answer")


def test_a_draft_for_few_minutes_has_smaller_numbers(here):
    settings = parse_overrides([MODEL, "data.train=topics.csv", "arms.full=null"])
    cache = InputsCache()
    whole = draft_sweep(Path("mine.yaml"), settings, cache).definition
    changes = {"sweep.trials": 8, "confirm.seeds": [3], "trainer.max_steps": 30, "arms.lora.method.rank": [1, 64]}
    changes |= {"data.max_validation_examples": 20, "data.max_test_examples": 20}
    made = draft_sweep(Path("mine.yaml"), {**settings, **changes}, cache)
    assert "# LoRA beside the frozen base." in made.text
    assert ("share one search" in made.text, "gets half" in made.text) == (True, False)
    cut = whole.with_overrides(changes)
    assert [arm.name for arm in made.definition.arms] == [arm.name for arm in cut.arms] == ["frozen", "lora"]
    for one, other in zip(made.definition.arms, cut.arms, strict=True):
        assert (one.subjects, one.base.data, one.trials) == (other.subjects, other.base.data, other.trials)
        assert one.base.num_steps == other.base.num_steps
    assert made.definition.sweep_config == cut.sweep_config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.train=topics.csv"], "`model.path=embedded:tiny`"),
        ([MODEL], "data.train"),
        ([MODEL, "data.train=missing.csv"], "missing.csv"),
        ([MODEL, "data.train=numbers.csv"], "`data.text`"),
        ([MODEL, "data.train=latin.txt"], "UTF-8"),
        (["model.path=nowhere", "data.train=topics.csv"], "nowhere"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(here, capsys, words, said):
    (here / "latin.txt").write_bytes("Müller\n".encode("latin-1"))
    (here / "numbers.csv").write_text("label\n" + "1\n2\n" * 20)
    draft(*words, code=WRONG_REQUEST)
    assert said in capsys.readouterr().err
    assert not (here / "mine.yaml").exists()


def test_a_file_whose_first_line_is_data_needs_names_and_every_row_of_every_split_is_read(here, capsys):
    write_topics(here / "topics.csv", header="3,a text,many\n")
    draft(MODEL, "data.train=topics.csv", code=WRONG_REQUEST)
    said = capsys.readouterr().err
    assert "the first line of 'topics.csv' must name its columns" in said
    assert "'data.columns=[label,text,column3]'" in said
    settings = draft(MODEL, "data.train=topics.csv", "data.columns=[label,text,column3]")["settings"]
    assert (settings["data.text"], settings["data.label"]) == ("text", "label")
    write_topics(here / "topics.csv")
    (here / "mine.yaml").unlink()
    (here / "test.csv").write_text("stars,review,author\n1,good,2\n1,good,2,3,4\n")
    draft(MODEL, "data.train=topics.csv", "data.test=test.csv", code=WRONG_REQUEST)
    assert "test.csv" in capsys.readouterr().err


@pytest.mark.release
@pytest.mark.slow
def test_data_without_a_file_are_swept_and_what_is_recommended_is_exported(here, capsys, monkeypatch):
    monkeypatch.setattr(stopping, "MIN_STEPS", 60)  # rounding decides whether 4 steps learn anything
    budget = ["trainer.max_steps=4", "sweep.trials=2", "confirm.seeds=1", "arms.full=null"]
    assert run(["sweep", MODEL, "data.train=topics.csv", "method.rank=choice(1,2)", *budget]) == DONE
    assert [arm.trials for arm in read_saved_definition(here / "outputs" / "topics").arms] == [1, 2]
    for source, folder in (("outputs/topics/lora-rank-2", "one"), ("outputs/topics/lora-rank-1", "other")):
        assert run(["export", source, "--format", "peft", "--out", folder]) == DONE
        assert f"exporting {Path(source).name}" in capsys.readouterr().out
        assert (here / folder / "adapter_model.safetensors").is_file()

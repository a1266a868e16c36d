"""Embeddings, losses and rankings equal their formulas; runs equal those in packs; a sweep ends with verdicts."""

import json
import math
import shutil

import pytest
import torch
from tests.small_runs import rates
from tests.tasks.embeddings.conftest import SETTINGS, make_rows, write_rows
from tests.training.runs import evaluations, losses, train, train_together
from torch.nn.functional import log_softmax, normalize
from torchmetrics import Metric

import lorasweep
from lorasweep.data.source import content_key
from lorasweep.errors import ConfigError, OutOfMemory
from lorasweep.sweep.draft import draft_definition
from lorasweep.tasks.embeddings.objective import InBatchNegatives
from lorasweep.tasks.embeddings.pooling import pool
from lorasweep.tasks.embeddings.read import recognise_pairs
from lorasweep.tasks.embeddings.settings import InBatchConfig
from lorasweep.tasks.examples import read_examples
from lorasweep.tasks.task import GivenTable
from lorasweep.training.inputs import InputsCache, load_inputs


class Vectors(torch.nn.Module):
    """A model whose hidden states are those of a table, one row of the table for each text."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids):
        return type("Output", (), {"last_hidden_state": self.table[input_ids]})


def make_batch(ids, *, slots=1, scale=(20.0,)):
    """A batch of rows whose text is their id, which is also the place of its vector."""
    flat = torch.tensor(ids).flatten()
    scales = torch.tensor(scale).repeat_interleave(len(flat) // slots)
    return {"input_ids": flat[:, None], "text_id": flat, "scale": scales, "step_weight": torch.ones(slots)}


def compute_loss(table, rows, place, *, scale, is_cosine):
    """The loss of one example by the formula; `rows` are the ids of the examples of its slot."""
    anchor, positive = rows[place][:2]
    known = {anchor, *(row[1] for row in rows if row[0] == anchor)}
    others = [text for n, row in enumerate(rows) for text in row[1:2] if n != place and text not in known]
    others += [text for row in rows for text in row[2:] if text not in known]
    vectors = normalize(table, dim=-1) if is_cosine else table
    logits = torch.stack([scale * vectors[anchor] @ vectors[text] for text in (positive, *others)])
    return -log_softmax(logits, 0)[0]


@pytest.mark.parametrize("is_cosine", [True, False])
def test_the_loss_is_that_of_the_formula_in_each_slot_and_leaves_out_known_positives(is_cosine):
    table = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # a repeated positive, a repeated anchor, and an anchor that is the passage of another example
    first = [[0, 1, 2], [3, 1, 4], [0, 5, 6], [7, 0, 8], [9, 10, 11]]
    second = [[9, 2, 1], [0, 3, 7], [4, 5, 6], [1, 8, 2], [10, 11, 3]]
    objective = InBatchNegatives(num_texts=3, is_cosine=is_cosine)
    scales = [objective.get_slot_numbers(InBatchConfig(scale=scale))["scale"] for scale in (None, 5.0)]
    assert scales == [20.0 if is_cosine else 1.0, 5.0]
    batch = make_batch([first, second], slots=2, scale=scales)
    found = objective.losses(Vectors(table), batch)
    pairs = zip((first, second), scales, strict=True)
    expected = [compute_loss(table, rows, n, scale=x, is_cosine=is_cosine) for rows, x in pairs for n in range(5)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_padding_changes_no_embedding(pooling):
    hidden = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([hidden, torch.full((1, 2, 4), 9.0)], 1)
    found = pool(padded, torch.tensor([[1, 1, 1, 0, 0]]), pooling)
    torch.testing.assert_close(found, pool(hidden, None, pooling))


def rank_plainly(rows, vectors):
    """The metrics of each different anchor by loops; `rows` are ids, which are also the places of their vectors."""
    passages = {text for row in rows for text in row[1:]}
    found = {}
    for anchor in {row[0] for row in rows}:
        relevant = {row[1] for row in rows if row[0] == anchor}
        order = sorted(passages - {anchor}, key=lambda text: -float(vectors[anchor] @ vectors[text]))
        places = [place for place, text in enumerate(order[:10]) if text in relevant]
        best = sum(1 / math.log2(place + 2) for place in range(min(10, len(relevant))))
        found[anchor] = {
            "ndcg_at_10": sum(1 / math.log2(place + 2) for place in places) / best,
            "mrr_at_10": 1 / (places[0] + 1) if places else 0.0,
            "accuracy_at_1": float(places[:1] == [0]),
        }
    return found


@pytest.mark.parametrize("size", [4, 60])
def test_metrics_are_those_of_a_plain_reference(size):
    generator = torch.Generator().manual_seed(size)
    rows = torch.randint(size, (size, 3), generator=generator)  # anchors and passages repeat, and are each other's
    rows = rows[rows[:, 0] != rows[:, 1]]
    vectors = normalize(torch.randn(size, 6, generator=generator), dim=-1)
    objective = InBatchNegatives(num_scored_texts=3)
    scores = objective.score(Vectors(vectors), make_batch(rows.tolist()))
    expected = rank_plainly(rows.tolist(), vectors)
    values = objective.compute(scores)
    for name in objective.metrics:
        by_anchor = {anchor: metrics[name] for anchor, metrics in expected.items()}
        mean = sum(by_anchor.values()) / len(by_anchor)
        assert float(values[name]) == pytest.approx(mean)
        found, weights = objective.per_example(name, scores)
        assert found.tolist() == pytest.approx([by_anchor[anchor] for anchor in rows[:, 0].tolist()])
        assert float((found * weights).sum() / weights.sum()) == pytest.approx(mean)
    assert objective.per_example("other", scores) is None


def test_slots_have_the_losses_and_scores_of_runs_alone(make_run, tmp_path):
    runs = [{"method.rank": 2, "objective.scale": 10.0}, {"method.rank": 4, "optim.lr": 1e-2}]
    configs = [make_run({"trainer.max_steps": 4, **settings}, rows=make_rows(negatives=1)) for settings in runs]
    inputs = load_inputs(configs[0])
    folders = [tmp_path / "packed-0", tmp_path / "packed-1"]
    train_together(dict(zip(folders, configs, strict=True)), inputs=inputs, checkpoint_file=tmp_path / "pack.ckpt")
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone-{number}"
        train(alone, config, inputs=inputs)
        # fp32: products of other shapes, which cosines times the scale and Adam's division enlarge
        for found, expected in zip(losses(folders[number]), losses(alone), strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for (_, found), (_, expected) in zip(evaluations(folders[number]), evaluations(alone), strict=True):
            assert found == pytest.approx(expected, abs=1e-6)


def test_pairs_that_share_an_anchor_or_a_positive_are_in_one_split(make_run):
    rows = make_rows(200)
    for index in range(100, 200):
        rows[index] |= (
            {"anchor": rows[index - 100]["anchor"]} if index % 2 else {"positive": rows[index - 99]["positive"]}
        )
    splits = load_inputs(make_run(rows=rows)).data
    parts = [splits.train, splits.validation, splits.test()]
    ids = [set(part.columns["text_id"].tolist()) for part in parts]
    assert all(parts)
    assert sum(map(len, ids)) == len(ids[0] | ids[1] | ids[2])
    assert len(set(splits.train.groups)) < len(splits.train)
    assert [any("each anchor ranks" in note for note in part.notes) for part in parts] == [False, True, True]


def test_training_passages_are_distractors_of_other_splits_alone(make_run):
    base = load_inputs(make_run({"data.passage_prompt": "w0 "})).data
    splits = load_inputs(make_run({"data.passage_prompt": "w0 ", "data.distractors": True})).data
    wanted = {content_key([row["positive"]]) >> 1 for row in make_rows()}
    train = set(splits.train.by_example(splits.train.columns["text_id"])[:, 1].tolist())
    assert len(splits.train.row_names) == 2
    for split, plain in ((splits.validation, base.validation), (splits.test(), base.test())):
        passages = set(split.by_example(split.columns["text_id"])[:, 1:].flatten().tolist())
        own = set(plain.by_example(plain.columns["text_id"])[:, 1].tolist())
        assert passages == own | train <= wanted


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"anchor": f"text {n}"} for n in range(9)], {}, r"`data.anchor` and `data.positive` must name a column"),
        ([*make_rows(9), {"anchor": "w1", "positive": " "}], {}, r"row 10 .* must have a text, but has ' '"),
        ([{"anchor": f"w{n}", "positive": "w0"} for n in range(1, 9)], {}, "must have two or more different positives"),
        (make_rows(1), {}, "must have two or more different positives"),
        ([*make_rows(9), {"anchor": "w1 w2", "positive": "W1  w2"}], {}, "row 10 .* the anchor is its own positive"),
        ([row | {"negative": row["positive"]} for row in make_rows(9)], {}, "must have negatives that differ"),
        ([{"anchor": f"w{n % 2}", "positive": f"w{3 + n % 3}"} for n in range(9)], {}, "at least 3 different examples"),
        (make_rows(9), {"data.positive": "passage"}, r"`data.positive` must be a column of"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(rows, settings, message, make_run):
    with pytest.raises(ConfigError, match=message):
        load_inputs(make_run(settings, rows=rows))


@pytest.mark.parametrize("settings", [{"trainer.accumulate": 2}, {"trainer.devices": 2}])
def test_a_batch_is_not_cut(settings, make_run):
    with pytest.raises(ConfigError, match=r"must be 1 with `data=embeddings`, .* each other's negatives"):
        make_run(settings)


def test_a_run_that_does_not_fit_in_memory_fails_and_is_not_cut(make_run, tmp_path, monkeypatch):
    config = make_run()

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(InBatchNegatives, "losses", fail)
    with pytest.raises(OutOfMemory):
        train(tmp_path / "run", config, inputs=load_inputs(config))


def test_a_model_without_modules_files_is_pooled_as_named_or_by_mean(make_run, encoder):
    settings = {"model.path": encoder, "model.dropout": 0.0}
    objectives = [load_inputs(make_run(settings | more)).data.objective for more in ({}, {"objective.pooling": "last"})]
    assert [one.pooling for one in objectives] == ["mean", "last"]


class HitsAtThree(Metric):
    """The share of anchors with a passage that belongs to them among the first three."""

    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_state("hits", torch.tensor(0.0))

    def update(self, predicted, target):
        self.hits = target.gather(1, predicted.topk(3).indices).amax(1).double().mean()

    def compute(self):
        return self.hits


def test_an_own_metric_scores_a_run(make_run, tmp_path):
    config = make_run({"data.metric._target_": f"{__name__}.HitsAtThree"})
    record = train(tmp_path / "run", config, inputs=load_inputs(config))
    assert record.metric == "HitsAtThree"
    assert record.best["accuracy_at_1"] <= record.best["HitsAtThree"] <= 1


@pytest.mark.parametrize(("name", "ours"), [("RetrievalNormalizedDCG", "ndcg_at_10"), ("RetrievalMRR", "mrr_at_10")])
def test_a_metric_of_torchmetrics_retrieval_is_that_of_each_anchor(name, ours, make_run, tmp_path):
    config = make_run({"data.metric._target_": f"torchmetrics.retrieval.{name}", "data.metric.top_k": 10})
    record = train(tmp_path / "run", config, inputs=load_inputs(config))
    assert record.metric == name
    assert record.best[name] == pytest.approx(record.best[ours], rel=1e-5)  # theirs is in fp32


def test_a_draft_recognises_columns_and_its_sweep_ends_with_verdicts(embedder, here):
    write_rows([{"query": row["anchor"], "positive": row["positive"]} for row in make_rows(120)])
    words = [f"model.path={embedder}", "data.train=pairs.jsonl", "trainer.max_steps=2", "trainer.device=cpu"]
    drafted = draft_definition(words, InputsCache())
    base = drafted.find_arm("lora").base
    assert (base.data.name, base.model.kind, base.data.metric) == ("embeddings", "embedder", "ndcg_at_10")
    write_rows(make_rows(120))
    sweep = {
        "name": "embeddings",
        "settings": SETTINGS
        | {"model.path": str(embedder), "confirm.seeds": 2, "confirm.margin": 0.1, "sweep.trials": 2},
        "arms": {
            "frozen": {"settings": {"method": "frozen"}},
            "full": {"settings": {"method": "full"}, "space": {"optim.lr": rates(1e-4, 1e-3)}},
            "lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2], "optim.lr": rates(1e-3, 1e-2)}},
        },
    }
    result = lorasweep.run_sweep(sweep, output=here / "sweep", progress=None)
    assert result.metric == "ndcg_at_10"
    assert len(result.confirm_dataframe()) == 1 + 2 + 2
    assert "full" in result.table()


@pytest.mark.parametrize(
    ("columns", "settings", "is_found"),
    [
        (("anchor", "positive", "negative"), {}, True),
        (("question", "positive", "id"), {}, True),
        (("sentence1", "sentence2"), {}, True),
        (("sentence1", "sentence2", "label"), {}, False),
        (("question", "answer"), {}, False),
        (("question", "answer"), {"model": "embedder"}, True),
        (("first", "second"), {}, False),
        (("first", "second"), {"data.anchor": "first", "data.positive": "second"}, True),
        (("first", "second"), {"model.path": "FOLDER"}, True),
        (("first", "second", "label"), {"model.path": "FOLDER"}, False),
        (("first", "label"), {"model.path": "FOLDER"}, False),
    ],
)
def test_columns_that_may_be_of_another_task_are_left_to_it(columns, settings, is_found, embedder):
    values = {name: ["a label" if name == "label" else f"the text {number}" for number in range(5)] for name in columns}
    settings = {key: str(embedder) if value == "FOLDER" else value for key, value in settings.items()}
    assert (recognise_pairs(GivenTable(columns=values, settings=settings)) is not None) == is_found


def test_examples_are_shown_with_their_names(make_run):
    shown = read_examples(make_run(), number=1).passages[0]
    assert [text for text, is_scored in shown if not is_scored] == ["anchor: ", "\npositive: "]


def test_unknown_modules_are_refused(make_run, embedder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(embedder, folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "a.models.Dense"}]))
    with pytest.raises(ConfigError, match=r"Transformer, Pooling and perhaps Normalize, .* has .*Dense and"):
        load_inputs(make_run({"model.path": str(folder)}))
    (folder / "modules.json").write_text(json.dumps(modules))
    similarity = folder / "config_sentence_transformers.json"
    similarity.write_text(json.dumps({"similarity_fn_name": "euclidean"}))
    with pytest.raises(ConfigError, match=r"by cosine or dot, but `similarity_fn_name` of .* is 'euclidean'"):
        load_inputs(make_run({"model.path": str(folder)}))
    similarity.unlink()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["mean", "max"]}))
    with pytest.raises(ConfigError, match=r"one pooling of mean, cls, last, max, .* the pooling mean, max"):
        load_inputs(make_run({"model.path": str(folder)}))

"""Embeddings, losses and exported adapters equal those of sentence-transformers."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tests.tasks.embeddings.conftest import make_rows
from tests.training.runs import losses, train
from torch.utils.data import BatchSampler, SequentialSampler

from lorasweep.data.batching import StepBatchSampler
from lorasweep.lora import lora_state
from lorasweep.runs.export import export_run
from lorasweep.tasks.task import read_source
from lorasweep.training.inputs import load_inputs
from lorasweep.training.prepare import prepare_model

STEPS, SIZE, LR = 10, 6, 3e-3
TARGETS = ["query", "value", "intermediate.dense"]


def load_theirs(folder):
    return SentenceTransformer(str(folder), device="cpu")


def embed_ours(model, split, objective):
    """Returns the embeddings of all rows of a split."""
    with torch.no_grad():
        return objective.embed(model, split.batch(range(len(split))))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("is_earlier", [False, True])
def test_embeddings_are_those_of_sentence_transformers(pooling, is_earlier, make_run, embedder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(embedder, folder)
    earlier = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}.get(pooling, pooling)
    settings = {f"pooling_mode_{earlier}": True} if is_earlier else {"pooling_mode": pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 32, **settings}))
    config = make_run({"model.path": str(folder), "data.anchor_prompt": "w1 w2 ", "data.passage_prompt": "w3 "})
    inputs = load_inputs(config)
    texts = [
        text
        for pair in read_source(config.data).train.items
        for text in (f"w1 w2 {pair.anchor}", f"w3 {pair.passages[0]}")
    ]
    found = embed_ours(inputs.base.model, inputs.data.train, inputs.data.objective)
    expected = load_theirs(folder).encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    # sums of some hundred fp32 products in another order, in two blocks
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def train_theirs(model, rows, folder):
    """Returns the loss of each step of their trainer on batches of these rows in order."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        batch_sampler=lambda dataset, **_: BatchSampler(SequentialSampler(dataset), SIZE, drop_last=True),
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.filterwarnings("ignore")  # those of their trainer
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ten_steps_have_the_losses_of_their_trainer(method, make_run, embedder, tmp_path):
    settings = {"method": method, "trainer.max_steps": STEPS, "optim.lr": LR, "schedule": "constant"}
    settings |= {"schedule.warmup_fraction": 0.0, "trainer.eval_every_steps": STEPS}
    settings |= {"method.rank": 4, "method.alpha": 8.0, "method.targets": TARGETS} if method == "lora" else {}
    config = make_run(settings, rows=make_rows(150, negatives=1))
    inputs = load_inputs(config)
    train(tmp_path / "run", config, inputs=inputs)
    split = inputs.data.train
    sampler = StepBatchSampler(
        split, batch_size=SIZE, num_steps=STEPS, seed=config.seeds.data_order, group_by_length=False
    )
    pairs = read_source(config.data).train.items
    chosen = [pairs[index] for step in range(STEPS) for index in sampler.get_step_indices(step)]
    rows = [{"anchor": pair.anchor, "positive": pair.passages[0], "negative": pair.passages[1]} for pair in chosen]
    theirs = load_theirs(embedder)
    if method == "lora":
        # as `add_adapter` does, for which transformers wants a newer PEFT
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), theirs[0].auto_model)
        start = {
            name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): value
            for name, value in lora_state(prepare_model(config, inputs.base)).items()
        }
        found = theirs[0].auto_model.load_state_dict(start, strict=False)
        assert not found.unexpected_keys
    expected = train_theirs(theirs, rows, tmp_path / "theirs")
    assert len(expected) == STEPS
    assert [loss for _, loss, _ in losses(tmp_path / "run")] == pytest.approx(expected, abs=1e-5)


def compare_by_dot_products(folder):
    """Changes the files of a model: it has no Normalize, and its similarity is the dot product."""
    modules, settings = folder / "modules.json", folder / "config_sentence_transformers.json"
    kept = [one for one in json.loads(modules.read_text()) if not one["type"].endswith("Normalize")]
    modules.write_text(json.dumps(kept))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"similarity_fn_name": "dot"}))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_an_exported_adapter_embeds_and_ranks_in_sentence_transformers_as_the_run(
    make_run, embedder, tmp_path, similarity
):
    embedder = shutil.copytree(embedder, tmp_path / "model")
    if similarity == "dot":
        compare_by_dot_products(embedder)
    settings = {"model.path": str(embedder), "trainer.max_steps": 20, "optim.lr": 1e-2}
    config = make_run(settings, rows=make_rows(300))
    inputs = load_inputs(config)
    record = train(tmp_path / "run", config, inputs=inputs)
    export_run(tmp_path / "run", format="peft", out=tmp_path / "adapter")
    export_run(tmp_path / "run", format="merged", out=tmp_path / "merged")
    adapted, merged = load_theirs(embedder), load_theirs(tmp_path / "merged")
    before = adapted.encode(["w1 w2 w3"], convert_to_tensor=True)
    adapted.load_adapter(str(tmp_path / "adapter"))
    pairs = read_source(config.data).validation.items
    anchors = {str(number): pair.anchor for number, pair in enumerate(pairs)}
    passages = {str(number): pair.passages[0] for number, pair in enumerate(pairs)}
    relevant = {number: {number} for number in anchors}
    for model in (adapted, merged):
        assert not torch.allclose(before, model.encode(["w1 w2 w3"], convert_to_tensor=True), atol=1e-3)
        evaluate = InformationRetrievalEvaluator(anchors, passages, relevant, write_csv=False)
        found = evaluate(model)
        assert found[f"{similarity}_ndcg@10"] == pytest.approx(record.best["ndcg_at_10"], abs=1e-6)
        assert found[f"{similarity}_mrr@10"] == pytest.approx(record.best["mrr_at_10"], abs=1e-6)
        assert found[f"{similarity}_accuracy@1"] == pytest.approx(record.best["accuracy_at_1"], abs=1e-6)
    torch.testing.assert_close(
        adapted.encode(list(passages.values()), convert_to_tensor=True),
        merged.encode(list(passages.values()), convert_to_tensor=True),
        rtol=1e-4,
        atol=1e-5,
    )

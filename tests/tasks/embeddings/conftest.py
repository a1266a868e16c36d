"""Pairs of texts, and a small embedding model with the files of sentence-transformers."""

import json

import pytest
import torch
from tests.small_runs import TWO_STEPS
from tests.tiny_tokenizer import WORDS, make_word_tokenizer
from transformers import BertConfig, BertModel

from lorasweep.config.compose import compose_run

SETTINGS = {key: value for key, value in TWO_STEPS.items() if not key.startswith("data.")}
SETTINGS |= {"model": "embedder", "model.dropout": 0.0, "data": "embeddings", "data.train": "pairs.jsonl"}
SETTINGS |= {"data.max_length": 32, "trainer.batch_size": 6, "logger": "none"}


def make_rows(number=90, *, negatives=0, seed=0):
    """Rows of random words; an anchor and its positive share two of them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size):
        return [WORDS[index] for index in torch.randint(len(WORDS), (size,), generator=generator)]

    rows = []
    for index in range(number):
        # two words that no other row has in this order
        shared = [WORDS[index % len(WORDS)], WORDS[(3 + index + index // len(WORDS)) % len(WORDS)]]
        row = {"anchor": " ".join(shared + draw(1 + index % 5)), "positive": " ".join(shared + draw(2 + index % 7))}
        rows.append(row | {f"negative_{n}": " ".join(draw(4 + n)) for n in range(1, negatives + 1)})
    return rows


def write_rows(rows, name="pairs.jsonl"):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def embedder(tmp_path_factory):
    """Returns the folder of a small random encoder without dropout; sentence-transformers says `mean`."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 (slow to import)
    from sentence_transformers.sentence_transformer import modules  # noqa: PLC0415

    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("embedder")
    tokenizer = make_word_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(**sizes, **rates, vocab_size=len(tokenizer), initializer_range=0.1)
        BertModel(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    parts = [modules.Transformer(str(plain)), modules.Pooling(32, "mean"), modules.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def make_run(embedder, here):
    """Writes rows to a file, and returns the settings of a run of two steps on them."""

    def make(settings=None, /, *, rows=None):
        write_rows(make_rows() if rows is None else rows)
        return compose_run(SETTINGS | {"model.path": str(embedder)} | (settings or {}))

    return make

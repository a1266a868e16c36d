"""Takes secrets out of what is written: passwords in addresses, tokens, values of environment variables named so.

Called where a record, a trial's reason or an error is written; a setting of a run that holds one is refused before.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
MIN_SECRET_LENGTH = 8
"""Of the value of an environment variable; a shorter one would be found in plain words and numbers."""

_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)(?!USER@HOST\b)[^\s/\"'<>]+@")  # not what an error says to type
_WORDS = r"(?:password|passwd|passphrase|secret|secret_?key|api_?key|access_?key|(?:auth|access|hf|api)_?token)"
_NAME = re.compile(rf"(?:.*[._-])?{_WORDS}", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(\b(?:[\w.-]*[._-])?{_WORDS}\s?[=:]\s?)([^\s\"'&,;}})]+)", re.IGNORECASE)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})"
)
_HINTS = (
    *(
        "://",
        "passw",
        "passphrase",
        "secret",
        "api_key",
        "apikey",
        "access_key",
        "accesskey",
        "auth_token",
        "authtoken",
    ),
    *("access_token", "accesstoken", "api_token", "apitoken", "hf_", "hftoken", "gho_", "ghp_", "ghr_", "ghs_", "ghu_"),
    *("github_pat_", "sk-", "akia"),
)
"""A text without any of these, in small letters, has nothing that the patterns find."""
_VARIABLE = re.compile(r"PASSW|PASSPHRASE|SECRET|CREDENTIAL|(?:^|_)(?:TOKEN|KEY|AUTH|PAT)(?:_|$)|APIKEY", re.IGNORECASE)


def redact(value: Any) -> Any:
    """Returns a value, or the values of a mapping or list at any depth, with `***` in place of every secret.

    Args:
        value: A text, or what JSON can hold. What is no text comes back as it is.
    """
    return _redact(value, _environment())


def may_hold_secret(text: str) -> bool:
    """Whether a text, such as a whole record as JSON, is worth going through: quick, and never wrongly False."""
    return _has_hint(text.lower(), _environment())


def names_secret(name: str) -> bool:
    """Whether an environment variable's name says that its value is a secret."""
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
    """Whether the patterns may find something in a text in small letters; secrets also as JSON writes them."""
    forms = {form.lower() for secret in secrets for form in (secret, json.dumps(secret)[1:-1])}
    return any(hint in lowered for hint in (*_HINTS, *forms))


def _environment() -> list[str]:
    """The secrets in this process's environment, the longest first: one may be part of another."""
    found = set()
    for name, value in os.environ.items():
        if names_secret(name) and not value.startswith("/"):  # a path to a file with a secret is none
            found.add(value)
        if "://" in value:
            found |= {match.group(1) for match in re.finditer(r"://[^\s/:]*:([^\s/]+)@", value)}
    return sorted((one for one in found if len(one) >= MIN_SECRET_LENGTH), key=len, reverse=True)

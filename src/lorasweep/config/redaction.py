"""Hides secrets: passwords in addresses, and values of environment variables with names such as `HF_TOKEN`.

`redact` is applied to records, reasons of failures and error messages before they are written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
MIN_SECRET_LENGTH = 8
"""Shorter values of environment variables are not hidden, because ordinary text often contains them."""
# The limit of 40 keeps the time linear: without it a text of 1 MB without spaces takes minutes.
ADDRESS_PATTERN = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]{0,40}://)[^\s/\"'<>]+@")
NAME_PATTERN = re.compile(r"PASSW|SECRET|CREDENTIAL|(?:^|_)(?:TOKEN|KEY)(?:_|$)|APIKEY", re.IGNORECASE)


def redact(value: Any) -> Any:
    """Returns a JSON value in which `***` replaces every secret in texts."""
    # Longer secrets come first, because one may contain another. The path of a file is no secret.
    secrets = [secret for name, secret in os.environ.items() if is_secret_name(name) and not secret.startswith("/")]
    secrets = sorted((secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH), key=len, reverse=True)

    def replace_secrets(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: replace_secrets(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [replace_secrets(item) for item in value]
        if not isinstance(value, str):
            return value
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return ADDRESS_PATTERN.sub(rf"\1{HIDDEN}@", value)

    return replace_secrets(value)


def is_secret_name(name: str) -> bool:
    return NAME_PATTERN.search(name) is not None

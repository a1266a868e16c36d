"""Reads a chat template of the user, and digests templates."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lorasweep.errors import ConfigError, first_line


def read_template_file(name: str) -> str:
    """Returns the text of the file that `data.template` names. Raises ConfigError if it can't be read."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: the user in `~USER` is unknown
        raise ConfigError(
            f"`data.template` must name a readable file, but got {name!r}: {first_line(error)}."
        ) from error


def digest_template(text: str) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a template's text, as in a run's record."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]

"""How long models and data sets wait for the Hugging Face hub before its cache is used."""

from __future__ import annotations

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # lacks a type stub

from lorasweep.errors import first_line

HUB_TIMEOUT_S = 10.0
"""Seconds to wait for the hub's answer before its cache is used. The client's default is far longer."""


def find_hub_fault() -> str | None:
    """Returns why the hub can't be reached, or None if it answers one request. `HF_HUB_OFFLINE=1` is a reason, too."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except (OSError, HTTPError) as error:
        return f"{constants.ENDPOINT} can't be reached ({first_line(error)})"
    return None

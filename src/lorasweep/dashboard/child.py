"""What the processes that serve pages have in common."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

HOST = "127.0.0.1"
"""Pages are for this machine alone."""


def serve_until_left(address: str) -> NoReturn:
    """Says where the page is, and ends this process when the one that started it is gone.

    Args:
        address: The page's, which other threads serve.
    """
    print(address, flush=True)
    sys.stdin.read()  # closed by the system when that process ends, however it ends
    os._exit(0)  # nothing is written here, so nothing is to be tidied up

"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]  # of its HTTP client
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lorasweep.errors import ConfigError, RunError, first_line
from lorasweep.redaction import redact

HUB_ERRORS = (OSError, ValueError, HubError)
"""Errors that the hub's client raises: no network, no token, no right, a wrong name."""
COMMIT_MESSAGE = "lorasweep export"


def check_push(repository: str) -> None:
    """Checks the name of a repository and the login, before an export takes its time.

    Raises:
        ConfigError: The name is not `USER/NAME`, or the hub does not know the user.
    """
    try:
        if repository.count("/") != 1:
            raise HFValidationError("it has no single slash")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(
            f"`--push` must be USER/NAME of a model on the hub, but got {repository!r}: {first_line(error)}."
        ) from error
    try:
        HfApi().whoami()
    except HUB_ERRORS as error:
        raise ConfigError(
            f"`--push` must be used with a login of the hub, but the login failed: {redact(first_line(error))}. Run "
            "`hf auth login`, or set HF_TOKEN."
        ) from error


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads all files of a folder as one commit, creates the repository if it is missing, and returns its address.

    Raises:
        RunError: The hub refused the repository or the upload.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=COMMIT_MESSAGE)
    except HUB_ERRORS as error:
        raise RunError(
            f"the hub must accept {repository!r}, but it does not: {redact(first_line(error))}. Check the name, "
            "your rights and the connection."
        ) from error
    return str(address)

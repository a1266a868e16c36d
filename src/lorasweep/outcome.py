"""The end of a command: its result as JSON (`--json`), or its error as one sentence, and its exit code.

Exit codes: 0 done, 1 failed, 2 wrong request, 130 interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from lorasweep.config.redaction import redact
from lorasweep.console import reserve_stdout, say_error, show_heartbeat
from lorasweep.errors import INTERRUPTED_EXIT_CODE, ConfigError, LoraSweepError, OutOfMemory, RanksLost, RecordError

DONE, FAILED, WRONG_REQUEST = 0, 1, 2


@dataclass(frozen=True)
class Outcome:
    """The end of a command: what `--json` prints, and the exit code."""

    content: Any = None
    """A dataclass, a mapping, or an object with `as_json`."""
    code: int = DONE

    def as_json(self) -> str:
        content = self.content.as_json() if hasattr(self.content, "as_json") else self.content
        # numbers of NumPy have `item`
        plain = to_jsonable_python(
            content, inf_nan_mode="null", fallback=lambda value: value.item() if hasattr(value, "item") else str(value)
        )
        return json.dumps(plain, indent=1)


def end(command: Callable[[], Outcome], *, name: str, is_json: bool) -> int:
    """Runs a command and returns its exit code. Prints errors of lorasweep as one line; `is_json` prints the result."""
    beats: AbstractContextManager[None] = nullcontext() if get_rank() else show_heartbeat(name)
    with reserve_stdout() if is_json else nullcontext() as stdout:
        try:
            with beats:
                outcome = command()
        except BrokenPipeError:  # who reads the output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes at its end
            outcome = Outcome(code=FAILED)
        except (LoraSweepError, OSError) as error:
            outcome = end_with_error(error)
        except KeyboardInterrupt as interrupt:
            reason = f"interrupted. {interrupt}".rstrip(". ")
            say_error(reason)
            outcome = Outcome(_describe_error("KeyboardInterrupt", reason), INTERRUPTED_EXIT_CODE)
        except Exception as error:  # a defect of lorasweep or of the user's code, whose traceback follows
            if stdout:
                outcome = Outcome(_describe_error(type(error).__name__, str(error)))
                print(outcome.as_json(), file=stdout, flush=True)
            raise
        if stdout and get_rank() == 0:
            print(outcome.as_json(), file=stdout, flush=True)
        return outcome.code


def end_with_error(error: LoraSweepError | OSError, job: str = "") -> Outcome:
    """Prints an error in one sentence. If several processes train, the first one prints it."""
    if isinstance(error, LoraSweepError):
        code, message = WRONG_REQUEST if isinstance(error, ConfigError | RecordError) else FAILED, str(error)
    else:
        # the disk is full, or the folder is missing or read-only
        file_name = f" {str(error.filename)!r}" if error.filename else ""
        reason = f"{file_name}: {error.strerror or error}."
        code, message = FAILED, f"the files of a run must exist and be writable, but got{reason}"
    message = redact(f"{job}: {message}" if job else message)
    if get_rank() > 0 and not isinstance(error, RanksLost | OutOfMemory):  # these alone are not raised on every rank
        return Outcome(code=FAILED)
    say_error(message)
    return Outcome(_describe_error(type(error).__name__, message), code)


def _describe_error(name: str, message: str) -> dict[str, Any]:
    return {"error": {"class": name, "message": message}}


def get_rank() -> int:
    """Returns the rank of this process among the processes that torchrun, srun or Lightning started."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return int(next((rank for rank in ranks if rank), 0))

"""Renders chat templates in a child process, because a template is the code of whoever made the model.

One line of a template can compute for ever in C, where no handler of a signal runs, or take any amount of memory. So
the operating system holds the limits and ends the child. The child imports no torch, and ends with its parent.
"""

from __future__ import annotations

import atexit
import copy
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import shorten

MAX_RENDER_S = 5.0
"""Maximum seconds of computing in which a template must render all answers of a conversation. It takes milliseconds."""
MAX_RENDER_BYTES = 2**30
"""Maximum memory that a template may take. One line of it can multiply a text to any length."""
MAX_BUDGET = {"seconds": 60.0, "characters": 2**24}
"""Maximum seconds of computing and characters of output that a template may have in reserve for a data set."""
BUDGET_PER_CHARACTER = {"seconds": 1e-5, "characters": 64}
"""The reserve that each character of a conversation adds, for each answer. Templates need a hundredth of it."""
ALWAYS_COUNTED_CHARACTERS = 1000
"""Length that is counted for each answer beside its conversation, because a template adds texts of its own."""
REQUEST_CONVERSATIONS, REQUEST_CHARACTERS = 16, 2**16
"""Maximum size of a request of several conversations. More would save little time."""
STATM_FILE = Path("/proc/self/statm")
"""The process's memory in pages; its first number is the address space."""
GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")
"""The block of a template around the text that the assistant generates."""
CHILD_CODE = (
    "import sys; sys.path[:] = sys.argv[2:]; from lorasweep.data.rendering import serve; serve(int(sys.argv[1]))"
)
"""The child's program. It gets its end of the connection, and the parent's path of imports."""

Rendering = tuple[str, str, list[tuple[int, int]] | None]
"""The text up to an answer with a generation prompt, the text with the answer, and where the template marks parts of it
as generated: the first character and the last one + 1. None if it marks nothing."""
_ONE_AT_A_TIME = threading.Lock()


def render(
    template: Mapping[str, Any], conversations: Sequence[Mapping[str, Any]], *, budget: dict[str, float]
) -> Iterator[list[Rendering]]:
    """Yields a rendering of each answer, for one conversation after the other.

    Args:
        template: The `text`, its `arguments`, the day `today`, the `eos_token` and the `special_tokens`.
        conversations: `messages`, `tools`, and the indices of the `answers`.
        budget: What the template has in reserve; empty at the first call for a data set.

    Raises ConfigError if the template fails or breaks a limit.
    """
    while conversations:
        contents: list[str] = []
        for conversation in conversations[:REQUEST_CONVERSATIONS]:
            if sum(map(len, contents)) < REQUEST_CHARACTERS:
                contents.append(json.dumps(conversation))
        replies = _ask(
            f"{json.dumps([template, budget or MAX_BUDGET, MAX_RENDER_S])[:-1]}, {', '.join(contents)}]", len(contents)
        )
        for conversation, reply in zip(conversations, replies, strict=False):  # none follows an error
            if "error" in reply:
                said = next(
                    (message["content"] for message in conversation["messages"] if message["role"] == "user"), ""
                )
                raise ConfigError(
                    f"the chat template must accept each conversation, but fails ({reply['error']}) where the user "
                    f"begins with {shorten(said)}. Correct it, or use another `data.template` or `data.template=plain`."
                )
            budget |= reply["budget"]
            yield reply["renderings"]
        conversations = conversations[len(contents) :]


def _ask(request: str, num_conversations: int) -> list[dict[str, Any]]:
    """Returns the child's reply to each conversation, up to the first error."""
    replies: list[dict[str, Any]] = []
    with _ONE_AT_A_TIME:
        process, connection = _start_child(os.getpid())
        try:
            connection.send_bytes(request.encode())
            for _ in range(num_conversations):
                replies.append(json.loads(connection.recv_bytes()))
                if "error" in replies[-1]:
                    break
        except (EOFError, ConnectionError):
            code = process.wait()
            took = f"it takes more than {MAX_RENDER_S:g} s"
            replies.append({"error": took if code == -signal.SIGPROF else f"its process ended with code {code}"})
            _end_child(process, connection)
        except BaseException:  # after Ctrl-C, the next request must not get the replies to this one
            _end_child(process, connection)
            raise
    return replies


@functools.lru_cache(maxsize=1)
def _start_child(parent: int) -> tuple[subprocess.Popen[bytes], Connection]:
    """Returns the child of a process. A fork gets its own, because two can not share a connection."""
    ours, others = Pipe()
    process = subprocess.Popen(
        # -I: neither the current folder nor variables of the environment change what is imported
        [sys.executable, "-I", "-c", CHILD_CODE, str(others.fileno()), *sys.path],
        pass_fds=[others.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the terminal's Ctrl-C is for the parent
    )
    others.close()
    atexit.register(_end_child, process, ours)  # a killed parent does not get here: then the child reads an end of file
    return process, ours


def _end_child(process: subprocess.Popen[bytes], connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()
    _start_child.cache_clear()


def serve(descriptor: int) -> None:
    """Answers requests in the child until the parent closes its end of the connection."""
    with suppress(OSError, ValueError):  # this is not Linux, or `ulimit -v` allows less
        limit = int(STATM_FILE.read_text().split()[0]) * resource.getpagesize() + MAX_RENDER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection = Connection(descriptor)
    with suppress(EOFError):
        while True:
            template, budget, max_s, *conversations = json.loads(connection.recv_bytes())
            for conversation in conversations:
                signal.setitimer(signal.ITIMER_PROF, max_s)  # no handler: its signal ends this process, even in C
                try:
                    reply = {"renderings": _render_within(budget, template, conversation), "budget": budget}
                    content = json.dumps(reply, ensure_ascii=False).encode()
                except Exception as error:  # a template can raise any class of error
                    place = f" in its line {error.lineno}" if hasattr(error, "lineno") else ""
                    connection.send_bytes(json.dumps({"error": first_line(error) + place}).encode())
                    break
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                connection.send_bytes(content)


def _render_within(
    budget: dict[str, float], template: Mapping[str, Any], conversation: Mapping[str, Any]
) -> list[Rendering]:
    """Returns a rendering of each answer, and subtracts what they take from the budget. Raises ValueError below 0."""
    length = (len(json.dumps(conversation)) + ALWAYS_COUNTED_CHARACTERS) * len(conversation["answers"])
    for name, most in MAX_BUDGET.items():
        budget[name] = min(budget[name], most) + length * BUDGET_PER_CHARACTER[name]
    begin = time.process_time()
    renderings: list[Rendering] = []
    for index in conversation["answers"]:
        messages = conversation["messages"][: index + 1]
        prompt, _ = _render_one(template, messages[:-1], conversation["tools"], has_prompt=True)
        full, marks = _render_one(template, messages, conversation["tools"], has_prompt=False)
        kept = full.removesuffix(template["eos_token"])
        if kept != full and kept.rstrip().endswith(tuple(template["special_tokens"])):
            # Phi's template writes the end-of-text token after the last turn, in place of a generation prompt.
            continued, _ = _render_one(template, messages, conversation["tools"], has_prompt=True)
            full = kept if continued.startswith(kept) and not continued.startswith(full) else full
        renderings.append((prompt, full, marks))
        budget["characters"] -= len(prompt) + len(full)
        if budget["characters"] < 0:
            raise ValueError("it writes too much for the length of all conversations up to this one")
    budget["seconds"] -= time.process_time() - begin
    if budget["seconds"] < 0:
        raise ValueError("it takes too long for the length of all conversations up to this one")
    return renderings


def _render_one(
    template: Mapping[str, Any], messages: list[dict[str, Any]], tools: list[Any] | None, *, has_prompt: bool
) -> tuple[str, list[tuple[int, int]] | None]:
    """Returns the text, and where the template marks what the assistant generates; None if it has no marks."""
    _compile_jinja_template(template["text"]).globals["strftime_now"] = date.fromisoformat(template["today"]).strftime
    has_marks = GENERATION_BLOCK.search(template["text"]) is not None
    arguments: dict[str, Any] = {
        "tools": tools,
        "chat_template": template["text"],
        "return_assistant_tokens_mask": has_marks,
        "add_generation_prompt": has_prompt,
        **template["arguments"],
    }
    rendered: Any  # transformers wrongly declares `str`
    try:
        rendered = render_jinja_template([messages], **arguments)
    except TypeError:  # DeepSeek's template joins texts, so it needs the arguments of tool calls as JSON text
        messages = copy.deepcopy(messages)
        for function in (call["function"] for message in messages for call in message.get("tool_calls", ())):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        rendered = render_jinja_template([messages], **arguments)
    return rendered[0][0], rendered[1][0] if has_marks else None

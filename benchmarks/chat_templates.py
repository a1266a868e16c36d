"""Checks how conversations are tokenised with many chat templates.

    python benchmarks/chat_templates.py FOLDER    # a folder of .jinja files, such as the templates in TRL's tests

For each template and each kind of conversation it compares with `tokenizer.apply_chat_template`: the tokens before an
answer must be those of the prompt that a server gives, and the scored text must be the assistant's own, up to its
end-of-turn token. Prints a table in Markdown, and fails if something is scored wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorasweep.config.compose import compose_run
from lorasweep.data.rows import IGNORED
from lorasweep.errors import ConfigError
from lorasweep.tasks.chat.tokenise import tokenise_chats
from lorasweep.tasks.task import read_source
from lorasweep.wording import shorten

MARKERS = re.compile(r"<[|｜][^<>|｜\s']{1,40}[|｜]?>|<[a-z]+\|>|<(?:start|end)_of_[a-z]+>|\[/?INST\]|</s>")
"""The special tokens in the text of a template."""
HARMLESS = re.compile(r"</?think>|<channel\|>|assistant|model|analysis|thought|final|\s")
"""The text that may be scored beside the assistant's own and special tokens: around reasoning, and gpt-oss's channels.
Gemma 4's template writes `model` before the answer to a tool, but not in the prompt, so the model has to."""
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How the tokenizers of Llama 3 and Qwen cut a text, but for English endings such as `'s`."""
IMAGES = ("idefics3", "llava_next")
"""Templates that take lists of images and texts only."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says how the weather is.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
ARGUMENTS = json.dumps(CALL["function"]["arguments"])


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


HI, HELLO = say("user", "Hi, who is there?"), say("assistant", "It is me.")
WHY, SO = say("user", "And why so late?"), say("assistant", "The train was slow.")
CASES = {
    "one turn": {"messages": [HI, HELLO]},
    "two turns": {"messages": [HI, HELLO, WHY, SO]},
    "system, two turns": {"messages": [say("system", "Be brief."), HI, HELLO, WHY, SO]},
    "reasoning": {
        "messages": [HI, {**HELLO, "reasoning_content": "They ask me."}, WHY, {**SO, "reasoning_content": "Be honest."}]
    },
    "tool call": {
        "messages": [HI, say("assistant", "", tool_calls=[CALL]), say("tool", "7 degrees"), SO],
        "tools": TOOLS,
    },
}


def build_tokenizer(template):
    """Returns a byte-level BPE tokenizer with merges, whose special tokens are those of a template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    backend.train_from_iterator([template, json.dumps(CASES), "\n\n\n\n" * 9], trainer)
    special = sorted({*MARKERS.findall(template), "<|endoftext|>", "<s>"})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<s>")
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def check(tokenizer, case, examples, config):
    """Returns how a conversation was tokenised: in how many examples, why it is refused, or what is wrong."""
    try:
        columns = tokenise_chats(examples, config=config, tokenizer=tokenizer)
    except ConfigError as error:
        return f"refused: {error}"
    inputs, targets = columns["input_ids"], columns["targets"]
    rows = [(inputs[n].tolist(), targets[n].tolist()) for n in range(len(inputs))]
    wrong = [fault for index in range(len(case["messages"])) if (fault := find_fault(tokenizer, case, index, rows))]
    if wrong:
        return f"WRONG: {wrong[0]}"
    return "exact" if len(rows) == 1 else f"exact, {len(rows)} examples"


def serve(tokenizer, messages, case):
    """Returns the tokens that a server gives to the model."""
    return tokenizer.apply_chat_template(
        messages, tools=case.get("tools"), add_generation_prompt=True, return_dict=False
    )


def find_fault(tokenizer, case, index, rows):
    """Returns what is wrong with the answer at this index of a conversation; None if it is right or no answer."""
    message, before = case["messages"][index], case["messages"][:index]
    if message["role"] != "assistant":
        return None
    try:
        prompt = serve(tokenizer, before, case)
    except TypeError:  # DeepSeek's template takes the arguments of a tool call as text
        prompt = serve(tokenizer, json.loads(json.dumps(before).replace(ARGUMENTS, json.dumps(ARGUMENTS))), case)
    for ids, targets in rows:
        tokens = [*ids, targets[-1]]
        if tokens[: len(prompt)] != prompt or targets[len(prompt) - 1] == IGNORED:
            continue
        if targets[len(prompt) - 2] != IGNORED:
            return f"the prompt of answer {index} is scored"
        scored = targets[len(prompt) - 1 :]
        scored = scored[: scored.index(IGNORED)] if IGNORED in scored else scored
        if scored[-1] not in tokenizer.all_special_ids:
            return f"answer {index} does not end with an end-of-turn token"
        text = tokenizer.decode(scored)
        own = [message["content"], *(["get_weather", "Oslo"] if message.get("tool_calls") else [])]
        if missing := [part for part in own if part not in text]:
            return f"{missing[0]!r} is not scored but {text!r}"
        rest = text.replace(message["content"], "").replace(message.get("reasoning_content", ""), "")
        for special in tokenizer.all_special_tokens:
            rest = rest.replace(special, "")
        if not message.get("tool_calls") and (rest := HARMLESS.sub("", rest)):
            return f"{rest!r} is scored in answer {index}"
        others = {other["content"] for other in case["messages"] if other is not message} - {""}
        return next((f"{other!r} is scored in answer {index}" for other in others if other in text), None)
    return f"no example has answer {index} after the prompt that is served"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with .jinja files")
    folder = parser.parse_args().folder
    results, reasons = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch
        splits = {}
        for name, case in CASES.items():
            paths = {}
            for split in ("train", "validation", "test"):
                paths[f"data.{split}"] = str(Path(scratch) / f"{name}-{split}.jsonl")
                Path(paths[f"data.{split}"]).write_text(json.dumps(case) + "\n")
            config = compose_run({"data": "chat", **paths, "data.max_length": 100_000}).data
            splits[name] = read_source(config).train, config
        for path in sorted(folder.glob("*.jinja")):
            if path.stem in IMAGES:
                continue
            tokenizer = build_tokenizer(path.read_text(encoding="utf-8"))
            for name, case in CASES.items():
                examples, config = splits[name]
                results[path.stem, name] = check(tokenizer, case, examples, config)
    print(f"| template | {' | '.join(CASES)} |\n|{'---|' * (len(CASES) + 1)}")
    for template in sorted({template for template, _ in results}):
        cells = []
        for name in CASES:
            result = results[template, name]
            kind, _, reason = result.partition(": ")
            if reason:
                number = reasons.setdefault(reason, len(reasons) + 1)
                kind = f"{kind} [{number}]"
            cells.append(kind)
        print(f"| {template} | {' | '.join(cells)} |")
    for reason, number in reasons.items():
        print(f"\n[{number}] {shorten(reason, 400)}")
    kinds = [re.split(r"[:,]", result)[0] for result in results.values()]
    print(f"\n{len(kinds)} checks: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))))
    return 1 if "WRONG" in kinds else 0


if __name__ == "__main__":
    sys.exit(main())

"""Drafts a commented sweep file for a user's model and data, after reading both (`lorasweep new`).

The draft compares the frozen base, full fine-tuning and LoRA. Its numbers follow from the data's size and lengths and
from the kind of model; nothing is trained.
"""

from __future__ import annotations

import io
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from lorasweep.activity import doing
from lorasweep.config.compose import SWEEP_GROUPS, compose_run, merge_settings
from lorasweep.config.data import RowSettings, TableConfig
from lorasweep.config.method import LoraConfig
from lorasweep.config.run import ALPHA, LR, RANK, STEPS_KEY
from lorasweep.console import say
from lorasweep.data.reading.conversations import KNOWN_COLUMNS, TOOLS_COLUMN
from lorasweep.data.reading.files import find_files, find_suffix, open_text
from lorasweep.data.reading.local import DEFAULT_DIALECTS, TABLE_SUFFIXES
from lorasweep.data.reading.preferences import PROMPT_COLUMNS
from lorasweep.data.reading.tables import load_tables
from lorasweep.errors import ConfigError
from lorasweep.recipes.read import Recipe
from lorasweep.recipes.write import NullRepresenter
from lorasweep.sweep.checks import MAX_STEPS, count_steps
from lorasweep.sweep.definition.arms import Definition, read_definition
from lorasweep.sweep.definition.confirm import MAX_LAW_FACTOR
from lorasweep.sweep.definition.overrides import Overrides
from lorasweep.sweep.definition.ranges import Range
from lorasweep.sweep.definition.sweep_file import MAX_NAME_CHARACTERS, make_paths_absolute
from lorasweep.training.inputs import InputsCache
from lorasweep.training.run_inputs import RunInputs
from lorasweep.wording import format_count, format_share, join_words, shorten

LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "score", "rating", "stars")
"""Usual names of the column of labels, in the order in which they are tried."""
TEXT_COLUMNS: Mapping[str, str | None] = {
    "text": "text_pair",
    "sentence": None,
    "sentence1": "sentence2",
    "question": "answer",
    "question1": "question2",
    "premise": "hypothesis",
    **dict.fromkeys(("review", "content", "body")),
}
"""Usual names of the column of texts, in the order in which they are tried, each with the column of second texts."""
CHAT_COLUMNS = ("prompt", "input", "completion", "messages")
COLUMN_KEYS = frozenset((*CHAT_COLUMNS, "chosen", "rejected"))
"""Settings that name columns of conversations and of pairs of answers."""
DATA_KEYS = frozenset(("data", "data.train", "data.path"))
SOURCE_KEYS = ("data.path", "data.train", "data.subset", "data.revision")
ROW_KEYS = frozenset(field.name for field in fields(RowSettings))
"""Settings that say how rows are read, whatever they hold."""
RANKS = (1, 4, 16, 64)
EPOCHS = 3
MAX_VALIDATION_EXAMPLES = 1000
MEASURED_DATA = ("table", "chat", "preferences")
"""Kinds of data whose examples have lengths that `data.max_length` may cut."""
MAX_MEASURED_TOKENS = 4096
"""Length up to which examples are measured."""
MAX_BALANCED_SHARE = 0.8
"""Share of the most frequent label up to which accuracy is a good metric."""
MIN_LABEL_SHARE = 0.05
"""Share of the rarest label from which accuracy shows whether it is learned."""
COVERED_SHARE = 0.99
"""Share of the examples that `data.max_length` does not cut."""
DEFAULT_WIDTH = 768
RATE_TIMES_WIDTH = 0.05
"""The middle of the two decades of learning rates for full fine-tuning, times the model's width: Adam's best rate is
proportional to 1 / width (Yang et al. 2022, arXiv 2203.03466). So the middle is 3e-4 at a width of 160, 6.5e-5 at 768
and 1.2e-5 at 4,096, and the best recorded rates, 7e-4 at 160 and 1.6e-4 at 384, lie inside. LoRA's rates are ten times
as high, which is the ratio of "LoRA Without Regret" (2025)."""
PREFERENCE_RATE_TIMES_WIDTH = 0.002
"""The same for pairs of answers: 5e-7 at a width of 4,096 (Zephyr, arXiv 2310.16944; Tülu 3, arXiv 2411.15124)."""
COMMENT_WIDTH = 116
Place: TypeAlias = tuple[str, ...]
"""The keys that lead to a value of a sweep file."""
SWEEP_SETTINGS = {"sweep.trials": 16, "confirm.seeds": [3, 6, 10], "confirm.margin": "5%"}
COMMENTS = {
    "confirm.seeds": "numbers of seeds at which the questions are tested",
    "confirm.margin": "smallest difference that matters: a number, or a share of full fine-tuning's gain over frozen",
    "data.max_validation_examples": "evenly spaced; an evaluation of all takes longer",
}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A sweep file for a user's model and data."""

    text: str
    """The content of the file."""
    definition: Definition
    notes: list[str]
    """Sentences on the columns of the data."""


def draft_definition(overrides: Sequence[str] | Mapping[str, Any], inputs_cache: InputsCache) -> Definition:
    """Returns the sweep that `lorasweep new` would write for these overrides. Errors as in `draft_sweep`."""
    typed = Overrides.parse(overrides)
    values = {key: value for key, value in typed.common.items() if not isinstance(value, Range)}
    settings = {key: value for key, value in values.items() if re.match(r"(model|data|trainer)\b", key)}
    source = str(settings.get("data.path") or settings.get("data.train") or settings.get("data", ""))
    name = re.sub(r"\W+", "-", Path(source).name.split(".")[0])[:MAX_NAME_CHARACTERS].strip("-")
    draft = draft_sweep(Path(f"{name or 'sweep'}.yaml"), settings, inputs_cache)
    for note in draft.notes:  # there is no file that has them as comments
        say(f"• {note}", file=sys.stderr)
    return draft.definition.with_overrides({key: value for key, value in typed.raw.items() if key not in settings})


@doing("drafting the sweep")
def draft_sweep(
    path: Path, settings: Mapping[str, Any], inputs_cache: InputsCache, *, recipe: Recipe | None = None
) -> Draft:
    """Returns a sweep file, to be written to `path`.

    Reads the model and the data that the settings name. The settings of a `recipe` are followed, unless `settings` have
    others, and are an arm of their own.

    Raises:
        ConfigError: A setting is missing or wrong, or the model or the data can't be read.
    """
    expected: dict[str, Any] = {}
    if recipe is not None:
        settings, expected = _follow_recipe(recipe, settings)
    if not DATA_KEYS & settings.keys():
        given = f"`{'`, `'.join(settings)}`" if settings else "nothing"
        raise ConfigError(
            "a sweep must have a name (`lorasweep sweep quickstart`) or a file, or `data.train=FILE`, or "
            f"`data.path=HUB-ID data.train=SPLIT`, but got {given}."
        )
    of_sweep = {key: value for key, value in settings.items() if key.split(".")[0] in SWEEP_GROUPS}
    left_out = [key for key, value in settings.items() if re.fullmatch(r"arms\.\w+", key) and value is None]
    settings = {key: value for key, value in settings.items() if key not in {*of_sweep, *left_out}}
    texts = recipe.texts if recipe else {}
    found, notes = ({}, []) if "data" in settings else _choose_data(settings, expected, texts)
    chosen = {**found, **settings}
    if recipe is not None:
        if unused := [f"`{key}`" for key, value in expected.items() if chosen.get(key) != value]:
            notes.append(
                f"These data have other columns than {recipe.path.name} names; not used: {join_words(unused)}."
            )
        if chosen["data"] == "table":  # a causal model learns texts, not labels
            plain = {"data": "text", "data.text": expected.get("data.text", "text")}
            chosen = {
                key: value for key, value in chosen.items() if key not in ("data.label", "data.text_pair")
            } | plain
        if chosen["data"] == "text":
            if chosen.pop("data.template", None):
                notes.append("Plain text has no template.")
            chosen = {"data.block_length": recipe.length, **chosen}
    if chosen["data"] == "chat" and "data.answers.score" not in chosen:
        notes.append(
            "`data.answers.score=exact_match confirm.metric=exact_match` (or `last_number`) asks about generated "
            "answers, not about the loss."
        )
    chosen = {"model": "classifier" if chosen["data"] == "table" else "causal_lm", **chosen}
    if chosen["model"] in ("classifier", "causal_lm") and "model.path" not in chosen:
        raise ConfigError(
            "a drafted sweep must know the model: add `model.path=FOLDER-OR-HUB-ID`. `model.path=embedded:tiny` is the "
            "embedded toy."
        )

    # blocks of text have a fixed length; the length of examples is measured
    lengths = {"data.max_length": MAX_MEASURED_TOKENS} if chosen["data"] in MEASURED_DATA else {}
    # absolute paths as in a definition, which then shares what is loaded here
    inputs = inputs_cache.load(compose_run(make_paths_absolute({**lengths, **chosen})))
    inputs.splits.test()  # reads every row, because the confirm stage would fail after hours of training
    metric = {} if any(key.startswith("data.metric") for key in chosen) else {"data.metric": inputs.splits.metric}
    numbered = {**chosen, **metric, **_choose_numbers(inputs, chosen, recipe)}
    arms, comments = _build_arms(inputs, recipe, kind=chosen["data"])
    kept = {name: arm for name, arm in arms.items() if f"arms.{name}" not in left_out}
    comments |= _list_comments(numbered, inputs, recipe, has_full="full" in kept)
    content = {"name": path.stem, "settings": {**numbered, **SWEEP_SETTINGS, **of_sweep}, "arms": kept}
    head = [
        f"{'LoRA and full fine-tuning' if 'full' in kept else 'LoRA'} beside the frozen base. First look at the cost, "
        "then start:",
        f"  lorasweep plan {path}",
        f"  lorasweep sweep {path}",
        *_list_facts(inputs, recipe),
        *notes,
    ]
    text = _write_yaml(content, comments, head)
    return Draft(text=text, definition=read_definition(content), notes=notes)  # it must be a sweep that starts


def _follow_recipe(recipe: Recipe, typed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of a recipe with typed ones, which win, and its columns if other data are typed.

    Other data may be a copy of the recipe's, with the same columns, or have others.
    """
    settings, columns, has_own = dict(recipe.settings), {}, DATA_KEYS & typed.keys()
    if has_own or "data.input" in settings:  # a column that the data need not have
        fixed = () if has_own else SOURCE_KEYS
        of_data = [key for key in settings if key.split(".")[0] == "data" and key not in fixed]
        columns = {key: settings.pop(key) for key in of_data if "data" in recipe.settings or key != "data.template"}
        columns = {key: value for key, value in columns.items() if key not in SOURCE_KEYS and "data" not in typed}
    if "model.path" in typed:
        settings.pop("model.revision", None)
    if isinstance(batch_size := typed.get("trainer.batch_size"), int):  # which `--minutes` may cut
        settings["trainer.accumulate"] = min(settings["trainer.accumulate"], max(batch_size, 1))
    return merge_settings({"model": "causal_lm", **settings}, typed), columns


def _choose_data(
    settings: Mapping[str, Any], expected: Mapping[str, Any], texts: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the kind of data and the columns that the user did not name, and notes on the columns that are not used.

    Reads the first file or split. The `expected` settings are returned if the data have their columns, and those of
    `texts` if prompts are texts.

    Raises ConfigError if the first line of a csv, tsv or txt file looks like a row: its label occurs again below it.
    """
    train, first = str(settings["data.train"]), None
    if "data.path" not in settings:
        first = find_files(train, key="data.train")[0]
        is_table = not first.is_dir() and find_suffix(first) in TABLE_SUFFIXES
        if is_table and find_suffix(first) == ".txt":  # it has columns if there is a tab in its first line
            with open_text(first) as file:
                is_table = "\t" in file.readline()
        if not is_table:
            return {"data": "text"}, []
    # the kind of data decides which other keys there are, so that these are checked when it is known
    of_rows = {key: value for key, value in settings.items() if key.partition("data.")[2] in ROW_KEYS}
    config = compose_run({"data": "table", **of_rows, "model": "tiny"}, require_all=False).data
    assert isinstance(config, TableConfig)
    table, *_ = load_tables(config, "train", lambda names, source: names)
    names = list(table.columns)
    columns = {name: table.get_values(name) for name in names}
    if expected.get("data.input") not in names:
        expected = {key: value for key, value in expected.items() if key != "data.input"}
    of_expected = [value for key, value in expected.items() if key.partition("data.")[2] in COLUMN_KEYS]
    if of_expected and set(of_expected) <= set(names):
        return dict(expected), _describe_unused(columns, [*of_expected, TOOLS_COLUMN])
    of_others = {"data.label", "data.text", "data.text_pair", "data.completion", "data.messages"} & settings.keys()
    answers = [settings.get(f"data.{key}", key) for key in ("chosen", "rejected")]
    if set(answers) <= set(names) and not of_others:
        prompts = [settings["data.prompt"]] if "data.prompt" in settings else PROMPT_COLUMNS
        of_pairs = [*prompts, *answers, TOOLS_COLUMN, settings.get("data.group")]
        return {"data": "preferences", **_choose_texts(columns, answers, texts)}, _describe_unused(columns, of_pairs)
    known = next((known.split() for known in KNOWN_COLUMNS if set(known.split()) <= set(names)), None)
    of_chat = [settings[f"data.{key}"] for key in CHAT_COLUMNS if f"data.{key}" in settings]
    if of_chat or (known and not of_others):
        of_conversations = [*(of_chat or known or []), TOOLS_COLUMN, settings.get("data.group")]
        form = _choose_texts(columns, of_conversations[:1], texts)
        return {"data": "chat", **form}, _describe_unused(columns, of_conversations)
    guessed = _guess_columns(columns, settings)
    label, is_named = guessed.get("data.label"), "data.columns" in settings
    is_delimited = first is not None and find_suffix(first) in DEFAULT_DIALECTS
    if is_delimited and not is_named and label and label not in LABEL_COLUMNS and label in columns[label]:
        named = {label: "label", guessed.get("data.text"): "text"}
        shown = ",".join(named.get(name, f"column{number}") for number, name in enumerate(names, 1))
        raise ConfigError(
            f"the first line of {train!r} must name its columns, but looks like data, because {label!r} occurs again "
            f"in its column. Name the columns in their order, such as `'data.columns=[{shown}]'`."
        )
    used = {**guessed, **settings}
    of_table = [used.get(f"data.{key}") for key in ("label", "text", "text_pair", "group")]
    return {"data": "table", **guessed}, _describe_unused(columns, of_table)


def _choose_texts(
    columns: Mapping[str, Sequence[Any]], names: Sequence[Any], texts: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Returns the settings `texts` if the named columns have texts and no messages."""
    found = [value for name in names for value in columns.get(name, ())[:1]]
    return texts if all(isinstance(value, str) for value in found) else {}


def _describe_unused(columns: Iterable[str], used: Sequence[str | None]) -> list[str]:
    """Returns a sentence that names the columns that are not used."""
    unused = [name for name in columns if name not in used]
    return [f"Columns that are not used: {shorten(unused, 400)}."] if unused else []


def _guess_columns(columns: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns `data.label`, `data.text` and for pairs `data.text_pair`, as far as the user did not name them."""
    named = [settings.get(key) for key in ("data.label", "data.text", "data.text_pair", "data.group")]
    free = [name for name in columns if name not in named]
    guessed: dict[str, str] = {}

    def guess(key: str, kind: str, usual: Iterable[str], others: Sequence[str]) -> str:
        name = next(iter([*(name for name in usual if name in free), *others]), None)
        if name is None:
            raise ConfigError(f"`{key}` must name a column of {kind}, but the columns are {join_words(list(columns))}.")
        free.remove(name)
        guessed[key] = name
        return name

    if "data.label" not in settings:
        counts = {name: len(set(map(str, columns[name]))) for name in free}
        several = [name for name in free if counts[name] > 1]
        guess("data.label", "labels", LABEL_COLUMNS, sorted(several, key=counts.__getitem__))
    if "data.text" not in settings:
        free = [name for name in free if columns[name] and all(isinstance(value, str) for value in columns[name])]
        lengths = {name: fmean(map(len, columns[name])) for name in free}
        text = guess("data.text", "texts", TEXT_COLUMNS, sorted(free, key=lengths.__getitem__, reverse=True))
        if "data.text_pair" not in settings and TEXT_COLUMNS.get(text) in free:
            guess("data.text_pair", "second texts", [str(TEXT_COLUMNS[text])], ())
    return guessed


def _choose_numbers(inputs: RunInputs, chosen: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """Returns limits of the data, batch size and steps that the user did not set.

    The steps are those of `EPOCHS`, or of the recipe's epochs, and its steps of warm-up are a share of them.
    """
    train = inputs.data.train
    batch_size = int(chosen.get("trainer.batch_size", min(16, len(train))))
    numbers: dict[str, Any] = {}
    if chosen["data"] in MEASURED_DATA:
        covered = int((train.sequences or train).lengths.double().quantile(COVERED_SHARE))
        limit = getattr(inputs.base.model.config, "max_position_embeddings", None) or MAX_MEASURED_TOKENS
        needed = recipe.length if recipe else min(MAX_MEASURED_TOKENS, 8 * math.ceil(covered / 8))
        numbers["data.max_length"] = min(limit, needed)
        if len(inputs.splits.validation) > MAX_VALIDATION_EXAMPLES:
            numbers["data.max_validation_examples"] = MAX_VALIDATION_EXAMPLES
    epochs = recipe.epochs if recipe else EPOCHS
    numbers[STEPS_KEY] = count_steps(epochs, len(train), batch_size)
    numbers["trainer.batch_size"] = batch_size
    if recipe and recipe.warmup_steps:
        steps = chosen.get(STEPS_KEY, numbers[STEPS_KEY])
        return {key: number for key, number in numbers.items() if key not in chosen} | {
            "schedule.warmup_fraction": round(min(recipe.warmup_steps / steps, 0.5), 4)
        }
    return {key: number for key, number in numbers.items() if key not in chosen}


def _list_facts(inputs: RunInputs, recipe: Recipe | None) -> list[str]:
    """Returns lines on the recipe's keys, and on the model and the data."""
    labels = inputs.base.labels
    named = "" if labels is None or len(labels.names) < 2 else f" and {len(labels.names)} labels"
    return [
        *(line for fact in (recipe.describe() if recipe else ()) for line in textwrap.wrap(fact, COMMENT_WIDTH)),
        f"The base has {format_count(inputs.base.num_parameters)} parameters. The data has {len(inputs.data.train):,} "
        f"training sequences{named}.",
        *inputs.splits.notes,
        *inputs.splits.test().notes,
    ]


def _list_comments(
    settings: Mapping[str, Any], inputs: RunInputs, recipe: Recipe | None, *, has_full: bool
) -> dict[Place, str]:
    """Returns the comments on the settings. They hold without an arm of full fine-tuning too."""
    searches = ["all ranks of LoRA share one search"]
    searches += ["an arm that searches one key gets half of them"] if has_full else []
    train, trainer = inputs.data.train, compose_run(settings).trainer
    others = [name for name in inputs.data.objective.metrics if name != inputs.splits.metric]
    constant = inputs.splits.score_constant_answer(inputs.splits.validation).get("accuracy", 0.0)
    counts = getattr(train, "facts", {}).get("labels") or {"": len(train)}  # empty for numbers, none for text
    rarest = min(counts.values()) / len(train)
    advice = f"; one label has {format_share(constant)} of the examples, so matthews says more"
    is_advised = "matthews" in others and constant > MAX_BALANCED_SHARE
    if not is_advised and "f1" in others and rarest < MIN_LABEL_SHARE:
        is_advised, advice = True, f"; a label has {format_share(rarest)} of the examples, so f1 says more"
    epochs = trainer.max_steps * trainer.batch_size / len(train)
    lengths = (train.sequences or train).lengths.double()
    longest = int(lengths.max())
    is_cut = "; longer ones are cut off" if longest > settings.get("data.max_length", longest) else ""
    comments = {
        **COMMENTS,
        **({"trainer.batch_size": recipe.batch} if recipe else {}),
        "sweep.trials": "; ".join(searches),
        "data.metric": f"or {join_words(others, last='or')}{advice if is_advised else ''}",
        "data.max_length": f"{lengths.mean():.0f} tokens on average, {longest} at most{is_cut}",
        STEPS_KEY: f"{epochs:.1f} epochs of {len(train):,} training examples"
        + (f"; the draft has at most {MAX_STEPS} steps, set more if needed" if trainer.max_steps == MAX_STEPS else ""),
    }
    return {("settings", key): comment for key, comment in comments.items()}


def _build_arms(inputs: RunInputs, recipe: Recipe | None, *, kind: str) -> tuple[dict[str, Any], dict[Place, str]]:
    """Returns the arms with that of the recipe's settings, and the comments on them. `kind` is that of the data."""
    times_width = PREFERENCE_RATE_TIMES_WIDTH if kind == "preferences" else RATE_TIMES_WIDTH
    middle = times_width / (getattr(inputs.base.model.config, "hidden_size", None) or DEFAULT_WIDTH)
    low, high = (float(f"{rate:.0e}") for rate in (middle / 10, middle * 10))
    arms: dict[str, Any] = {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {"settings": {"method": "full"}, "space": {LR: _build_rates(low, high)}},
    }
    comments: dict[Place, str] = {
        ("arms", "frozen"): "the base as it is",
        ("arms", "full", "space", LR): "if the best is at an end, widen it",
        ("arms", "lora", "confirm_each"): "each rank is confirmed with the learning rate that is predicted best for it",
    }
    low, high, rates = 10 * low, 10 * high, "ten times as high as for full fine-tuning"
    method: dict[str, Any] = dict(recipe.method) if recipe else {"method": "lora"}
    if recipe is not None:
        arms["present"] = {"settings": {**method, LR: recipe.lr}}
        comments["arms", "present"] = f"as in {recipe.path.name}; it is trained first"
        if method["method"] == "full":  # others are compared with the first arm of full fine-tuning
            method = {"method": "lora"}
        else:
            arms["full"] = arms.pop("full")
    peft: dict[str, Any] = dict(method.pop("method.config", {}))
    rank, own = ("method.config.r", peft.pop("r")) if peft else (RANK, method.pop(RANK, None))
    if ALPHA in method or peft:
        given = peft["lora_alpha"] if peft else method[ALPHA]
        alpha = float(min(given, MAX_LAW_FACTOR * RANKS[0])) or LoraConfig.alpha
        if alpha != given:
            note = f"α {alpha:g}, because at α {given:g} one search can't serve rank {RANKS[0]}"
            comments["arms", "lora", "settings"] = note
        method |= {"method.config": {**peft, "lora_alpha": alpha}} if peft else {ALPHA: alpha}
        times = math.sqrt(LoraConfig.alpha / alpha)  # the best rate of all ranks is one number times 1 / √α
        low, high = low * times, high * times
        rates += f" at α {LoraConfig.alpha:g}, times 1 / √α"
    if recipe is not None:
        low, high = min(low, recipe.lr), max(high, recipe.lr)
    comments["arms", "lora", "space", LR] = rates
    ranks = sorted({*RANKS, *([] if own is None else [own])})
    space = {rank: ranks, LR: _build_rates(low, high)}
    return {**arms, "lora": {"settings": method, "space": space, "confirm_each": rank}}, comments


def _build_rates(low: float, high: float) -> dict[str, Any]:
    return {"low": float(f"{low:.1e}"), "high": float(f"{high:.1e}"), "log": True}


def _write_yaml(content: Mapping[str, Any], comments: Mapping[Place, str], head: Sequence[str]) -> str:
    """Returns content as YAML with the lines of `head` as comments before it, and comments behind the keys."""
    tool = YAML()
    tool.width, tool.Representer = sys.maxsize, NullRepresenter
    commented = _add_comments(content, comments)
    commented.yaml_set_start_comment("\n".join(head))
    tool.dump(commented, stream := io.StringIO())
    return stream.getvalue()


def _add_comments(value: Any, comments: Mapping[Place, str], place: Place = ()) -> Any:
    """Returns nested values as ruamel.yaml writes them. A mapping without a comment inside stands on one line.

    Sweep files are read as YAML 1.1, which takes `no` for false and `1e-05` for a text.
    """
    if isinstance(value, str):
        return DoubleQuotedScalarString(value) if yaml.safe_dump(value)[0] in "\"'" else value
    if isinstance(value, float):
        return YAML().load(yaml.safe_dump(value))
    commented: Any = None
    if isinstance(value, list | tuple):
        commented = CommentedSeq(_add_comments(one, {}) for one in value)
    elif isinstance(value, Mapping):
        commented = CommentedMap({key: _add_comments(one, comments, (*place, key)) for key, one in value.items()})
        for key in [key for key in value if (*place, key) in comments]:
            commented.yaml_add_eol_comment(f"# {comments[*place, key]}", key, column=0)
    else:
        return value
    if not any(len(other) > len(place) and other[: len(place)] == place for other in comments):
        commented.fa.set_flow_style()
    return commented

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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import SWEEP_GROUPS, compose_run, merge_settings
from lorasweep.config.data import DataSettings, RowSettings, SplitSettings
from lorasweep.config.method import LoraConfig
from lorasweep.config.run import ALPHA, LR, MIN_STEPS, RANK, STEPS_KEY
from lorasweep.data.reading.files import find_files, find_suffix, open_text
from lorasweep.data.reading.local import DEFAULT_DELIMITERS, TABLE_SUFFIXES
from lorasweep.data.reading.tables import load_tables
from lorasweep.data.rows import MAX_CUT_SHARE
from lorasweep.errors import ConfigError
from lorasweep.recipes.read import Recipe
from lorasweep.recipes.write import NullRepresenter
from lorasweep.sweep.checks import check_rows
from lorasweep.sweep.definition.arms import Definition, read_definition
from lorasweep.sweep.definition.confirm import MAX_LAW_FACTOR
from lorasweep.sweep.definition.overrides import ARM_FIELDS, Overrides
from lorasweep.sweep.definition.sweep_file import MAX_NAME_CHARACTERS, make_paths_absolute
from lorasweep.sweep.definition.typed import COLUMNS, DATA_KEYS, ROW_DATA, ROW_KEYS
from lorasweep.tasks import DATA, PLAIN_TEXT
from lorasweep.tasks.task import GivenTable, find_task
from lorasweep.training.inputs import InputsCache
from lorasweep.training.run_inputs import RunInputs
from lorasweep.wording import format_count, format_share, join_words, shorten, suggest_nearest

SOURCE_KEYS = ("data.path", "data.train", "data.subset", "data.revision")
RANKS = (1, 4, 16, 64)
EPOCHS = 3
MAX_VALIDATION_EXAMPLES = 1000
LENGTHS = (128, 256, 512, 1024, 2048)
"""Values of `data.max_length`: the smallest is taken that cuts off at most `MAX_CUT_SHARE` of the examples."""
MAX_STEPS = 900
"""Upper bound of the steps that `sweep.epochs` sets, because a sweep trains dozens of runs. `MIN_STEPS` is the lower
one."""
MAX_BALANCED_SHARE = 0.8
"""Share of the most frequent label up to which accuracy is a good metric."""
DEFAULT_WIDTH = 768
COMMENT_WIDTH = 116
Place: TypeAlias = tuple[str, ...]
"""The keys that lead to a value of a sweep file."""
SWEEP_SETTINGS = {"sweep.trials": 16, "confirm.seeds": [3, 6, 10], "confirm.margin": "5%"}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A sweep file for a user's model and data."""

    text: str
    """The content of the file."""
    definition: Definition
    notes: list[str]
    """Sentences on the columns of the data."""


def draft_definition(
    overrides: Sequence[str] | Mapping[str, Any],
    inputs_cache: InputsCache,
    *,
    on_note: Callable[[str], None] = lambda note: None,
) -> Definition:
    """Returns the sweep that `lorasweep new` would write for these overrides. Errors as in `draft_sweep`.

    `on_note` is called with each sentence on the columns of the data.
    """
    typed = Overrides.parse(parse_overrides(overrides))
    settings = {key: value for key, value in typed.values.items() if re.match(r"(model|data|trainer)\b", key)}
    source = str(settings.get("data.path") or settings.get("data.train") or settings.get("data", ""))
    name = re.sub(r"\W+", "-", Path(source).name.split(".")[0])[:MAX_NAME_CHARACTERS].strip("-")
    draft = draft_sweep(Path(f"{name or 'sweep'}.yaml"), settings, inputs_cache)
    for note in draft.notes:  # there is no file that has them as comments
        on_note(f"• {note}")
    return draft.definition.with_overrides({key: value for key, value in typed.raw.items() if key not in settings})


def draft_sweep(
    path: Path,
    settings: Mapping[str, Any],
    inputs_cache: InputsCache,
    *,
    recipe: Recipe | None = None,
    given_up: str | None = None,
) -> Draft:
    """Returns a sweep file, to be written to `path`.

    Reads the model and the data that the settings name. The settings of a `recipe` are followed, unless `settings` have
    others, and are an arm of their own. `given_up` says what the settings cut, for the head of the file.

    Raises:
        ConfigError: A setting is missing or wrong, or the model or the data can't be read.
    """
    expected, typed = dict[str, Any](), settings
    if recipe is not None:
        settings, expected = _follow_recipe(recipe, settings)
    of_sweep = {key: value for key, value in settings.items() if key.split(".")[0] in SWEEP_GROUPS}
    of_arms = {key: value for key, value in settings.items() if key.startswith("arms.")}
    left_out = [key for key, value in of_arms.items() if key.count(".") == 1 and value is None]
    settings = {key: value for key, value in settings.items() if key not in {*of_sweep, *of_arms}}
    ranks = settings.pop(RANK) if isinstance(settings.get(RANK), list) else None
    texts = recipe.texts if recipe else {}
    found, notes = ({}, []) if "data" in settings else _choose_data(settings, expected, texts)
    chosen = {**found, **settings}
    if recipe is not None:
        if unused := [f"`{key}`" for key, value in expected.items() if chosen.get(key) != value]:
            notes.append(
                f"These data have other columns than {recipe.path.name} names; not used: {join_words(unused)}."
            )
        if _find_kind(chosen).model_kind != "causal_lm":  # a causal model learns texts, not labels
            of_text = _list_keys(DATA[PLAIN_TEXT])
            chosen = {key: value for key, value in chosen.items() if key in of_text or not key.startswith("data.")}
            chosen |= {"data": PLAIN_TEXT, "data.text": expected.get("data.text", "text")}
        if chosen["data"] == PLAIN_TEXT:
            if chosen.pop("data.template", None):
                notes.append("Plain text has no template.")
            chosen = {"data.block_length": recipe.length, **chosen}
    kind = _find_kind(chosen)
    if (hint := find_task(kind).hint) and hint[0] not in chosen:
        notes.append(hint[1])
    chosen = {"model": kind.model_kind, **chosen}
    if chosen["model"] in ("classifier", "causal_lm") and "model.path" not in chosen:
        raise ConfigError(
            "a drafted sweep must know the model: add `model.path=FOLDER-OR-HUB-ID`. `model.path=embedded:tiny` is the "
            "embedded toy."
        )

    # blocks of text have a fixed length; the length of examples is measured
    lengths = {"data.max_length": LENGTHS[-1]} if kind.cuts_examples else {}
    # absolute paths as in a definition, which then shares what is loaded here
    config = compose_run(make_paths_absolute({**lengths, **chosen}))
    inputs = inputs_cache.load(config)
    inputs.splits.test()  # reads every row, because the confirm stage would fail after hours of training
    check_rows(config.data, inputs.splits)
    if isinstance(config.data, SplitSettings) and (taken := config.data.choose_split_percents()):
        sizes = {"train": len(inputs.splits.train), "validation": len(inputs.splits.validation)}
        sizes["test"] = len(inputs.splits.test())
        listed = join_words([f"{sizes[name]:,} for {name} (another file: `data.{name}`)" for name in taken])
        notes.append(f"Of {sum(sizes.values()):,} examples, {listed} are taken from `data.train`.")
    metric = {} if any(key.startswith("data.metric") for key in chosen) else {"data.metric": inputs.splits.metric}
    numbered = {**chosen, **metric, **_choose_numbers(inputs, chosen, recipe, kind=kind)}
    arms, comments = _build_arms(inputs, recipe, kind=kind, ranks=ranks)
    for key, bounds in find_task(kind).searched.items():
        if "present" in arms and key not in typed and key in numbered:
            theirs = arms["present"]["settings"][key] = numbered.pop(key)
            bounds = {**bounds, "low": min(bounds["low"], theirs), "high": max(bounds["high"], theirs)}
        for name in ("full", "lora") if key not in numbered else ():
            arms[name]["space"][key] = bounds
    kept = {name: arm for name, arm in arms.items() if f"arms.{name}" not in left_out}
    _set_keys_of_arms(kept, {key: value for key, value in of_arms.items() if key not in left_out})
    comments |= _list_comments(numbered, inputs, recipe, full=kept.get("full"))
    of_sweep = {**SWEEP_SETTINGS, **of_sweep}
    content = {"name": path.stem, "settings": {**numbered, **of_sweep}, "arms": kept}
    facts = [
        *([f"To end {given_up}"] if given_up else []),
        *(note.text for note in inputs.describe_lost(config, has_test=True)),
        *notes,
    ]
    head = _list_head(path, inputs, recipe, facts, kept)
    text = _write_yaml(content, comments, head)
    return Draft(text=text, definition=read_definition(content), notes=notes)  # it must be a sweep that starts


def _set_keys_of_arms(arms: dict[str, Any], typed: Mapping[str, Any]) -> None:
    """Sets keys such as `arms.full.trials` in the arms of a draft. Raises ConfigError if there is no such arm."""
    for key, value in typed.items():
        _, name, *rest = key.split(".", 2)
        if name not in arms or not rest:
            raise ConfigError(
                f"`{key}` must be a key of an arm of the draft ({', '.join(arms)}), but is not."
                f"{suggest_nearest(name, arms)}",
                key=key,
            )
        if rest[0] in ARM_FIELDS:
            arms[name][rest[0]] = value
            continue
        kind, other = ("space", "settings") if isinstance(value, list | Mapping) else ("settings", "space")
        arms[name].get(other, {}).pop(rest[0], None)  # a value ends the search of its key
        arms[name].setdefault(kind, {})[rest[0]] = value


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
    if "data.path" not in settings:
        first = find_files(str(settings["data.train"]), key="data.train")[0]
        is_table = not first.is_dir() and find_suffix(first) in TABLE_SUFFIXES
        if is_table and find_suffix(first) == ".txt":  # it has columns if there is a tab in its first line
            with open_text(first) as file:
                is_table = "\t" in file.readline()
        if not is_table:
            return {"data": PLAIN_TEXT}, []
    # the kind of data decides which other keys there are, so that these are checked when it is known
    of_rows = {key: value for key, value in settings.items() if key in ROW_KEYS}
    config = compose_run({"data": ROW_DATA, **of_rows, "model": "tiny"}, require_all=False).data
    assert isinstance(config, RowSettings)
    given = _read_given(config, settings)
    columns = given.columns
    if expected.get("data.input") not in columns:
        expected = {key: value for key, value in expected.items() if key != "data.input"}
    kinds = {name: kind for name, kind in DATA.items() if kind.task_path}
    of_expected = {value for key, value in expected.items() if key.partition("data.")[2] in COLUMNS}
    is_expected = bool(of_expected) and of_expected <= columns.keys() and expected.get("data") in kinds
    given = replace(given, settings={**expected, **settings} if is_expected else settings)
    typed = {key for key in settings if key.startswith("data.")}
    fitting = {name: kind for name, kind in kinds.items() if typed <= _list_keys(kind)}
    if is_expected:
        fitting = {expected["data"]: kinds[expected["data"]]}
    for name, kind in {**fitting, **kinds}.items():
        if (found := find_task(kind).recognise(given)) is not None:
            unused = [column for column in columns if column not in found.columns]
            taken = ", ".join(f"`{key}={value}`" for key, value in {"data": name, **found.settings}.items())
            notes = [f"Chosen: {taken}. Type another one if that is wrong."]
            notes += [f"Columns that are not used: {shorten(unused, 400)}."] if unused else []
            if "data.text" in found.settings and (texts_beside := [one for one in unused if given.has_texts(one)]):
                notes.append(f"For pairs of texts add `data.text_pair={texts_beside[0]}`.")
            if is_expected:
                return dict(expected), notes
            values = [value for column in found.texts for value in columns.get(column, ())[:1]]
            of_texts = texts if found.texts and all(isinstance(value, str) for value in values) else {}
            return {"data": name, **found.settings, **of_texts}, notes
    raise ConfigError(f"`data` must be set, because no task recognises the columns {shorten(list(columns), 400)}.")


def _find_kind(settings: Mapping[str, Any]) -> type[DataSettings]:
    """Returns the class of the settings that `data` chooses."""
    return type(compose_run({"data": settings["data"], "model": "tiny"}, require_all=False).data)


def _list_keys(kind: type[DataSettings]) -> set[str]:
    return {f"data.{field.name}" for field in fields(kind)}


def _choose_numbers(
    inputs: RunInputs, chosen: Mapping[str, Any], recipe: Recipe | None, *, kind: type[DataSettings]
) -> dict[str, Any]:
    """Returns limits of the data, batch size and steps that the user did not set.

    The steps are those of `EPOCHS`, or of the recipe's epochs, and its steps of warm-up are a share of them.
    """
    train = inputs.data.train
    batch_size = int(chosen.get("trainer.batch_size", min(16, len(train))))
    numbers: dict[str, Any] = {}
    if kind.cuts_examples:
        numbers["data.max_length"] = choose_length(inputs, needed=recipe.length if recipe else None)
        if len(inputs.splits.validation) > MAX_VALIDATION_EXAMPLES:
            numbers["data.max_validation_examples"] = MAX_VALIDATION_EXAMPLES
    epochs = recipe.epochs if recipe else EPOCHS
    numbers[STEPS_KEY] = count_steps(epochs, len(train), batch_size, is_bounded=recipe is None)
    numbers["trainer.batch_size"] = batch_size
    if recipe and recipe.warmup_steps:
        steps = chosen.get(STEPS_KEY, numbers[STEPS_KEY])
        return {key: number for key, number in numbers.items() if key not in chosen} | {
            "schedule.warmup_fraction": round(min(recipe.warmup_steps / steps, 0.5), 4)
        }
    return {key: number for key, number in numbers.items() if key not in chosen}


def choose_length(inputs: RunInputs, *, needed: int | None = None) -> int:
    """Returns `needed`, or else the smallest of `LENGTHS` that fits nearly all examples; at most what the model reads.

    The examples must have been read with the largest of `LENGTHS`.
    """
    lengths, limit = inputs.data.train.row_lengths, MAX_CUT_SHARE * len(inputs.data.train)
    fitting = (length for length in LENGTHS if int((lengths > length).sum()) <= limit)
    return min(needed or next(fitting, LENGTHS[-1]), inputs.max_positions or LENGTHS[-1])


def count_steps(epochs: float, num_examples: int, batch_size: int, *, is_bounded: bool = True) -> int:
    """Returns the number of steps of this number of epochs, perhaps within the bounds.

    It is even, so that there is an evaluation at its half. From 1,000 on it has divisors for evaluations of packs.
    """
    steps = math.ceil(epochs * num_examples / batch_size)
    if is_bounded:
        steps = min(max(steps, MIN_STEPS), MAX_STEPS)
    unit = 2 * int(10 ** max(0, len(str(steps)) - 3))  # at most 2 % more
    return unit * math.ceil(steps / unit)


def _read_given(config: RowSettings, settings: Mapping[str, Any]) -> GivenTable:
    """Returns the columns of the first file or split of training."""
    table, *_ = load_tables(config, "train", lambda names, source: names)
    is_unsure = config.path is None and "data.columns" not in settings
    is_unsure = is_unsure and find_suffix(find_files(config.train, key="data.train")[0]) in DEFAULT_DELIMITERS
    columns = {name: table.get_values(name) for name in table.columns}
    return GivenTable(columns=columns, settings=settings, unsure_header=config.train if is_unsure else None)


def _list_head(
    path: Path, inputs: RunInputs, recipe: Recipe | None, notes: Sequence[str], arms: Collection[str]
) -> list[str]:
    """Returns the lines above a draft: what it compares, what to type, and facts on the recipe, model and data."""
    labels, recipe_facts = inputs.base.labels, recipe.describe() if recipe else []
    named = "" if labels is None or len(labels.names) < 2 else f" and {len(labels.names)} labels"
    compared = "LoRA and full fine-tuning" if "full" in arms else "LoRA"
    return [
        f"{compared} beside the frozen base. First look at the cost, then start:",
        f"  lorasweep plan {path}",
        f"  lorasweep sweep {path}",
        *(line for fact in recipe_facts for line in textwrap.wrap(fact, COMMENT_WIDTH)),
        f"The base has {format_count(inputs.base.num_parameters)} parameters. The data has {len(inputs.data.train):,} "
        f"training sequences{named}.",
        *inputs.splits.notes,
        *inputs.splits.test().notes,
        *notes,
    ]


def _list_comments(
    settings: Mapping[str, Any], inputs: RunInputs, recipe: Recipe | None, *, full: Mapping[str, Any] | None
) -> dict[Place, str]:
    """Returns the comments on the settings, which hold without the arm `full` too."""
    searches = ["all ranks of LoRA share one search"]
    searches += ["an arm that searches one key gets half of them"] if full and "trials" not in full else []
    train, trainer = inputs.data.train, compose_run(settings).trainer
    others = [name for name in inputs.data.objective.metrics if name != inputs.splits.metric]
    constant = inputs.splits.score_constant_answer(inputs.splits.validation).get("accuracy", 0.0)
    advice = f"; one label has {format_share(constant)} of the examples, so matthews says more"
    is_advised = "matthews" in others and constant > MAX_BALANCED_SHARE
    epochs = trainer.max_steps * trainer.batch_size / len(train)
    lengths = train.sequences["input_ids"].lengths.double()
    longest = int(lengths.max())
    is_cut = "; longer ones are cut off" if longest > settings.get("data.max_length", longest) else ""
    comments = {
        "confirm.seeds": "numbers of seeds at which the questions are tested",
        "confirm.margin": "smallest difference that matters: a number in the metric's unit, or a share of the gain "
        f"over `frozen` of {'`full`' if full else 'the best rank'}",
        "data.max_validation_examples": "evenly spaced; an evaluation of all takes longer",
        **({"trainer.batch_size": recipe.batch} if recipe else {}),
        "sweep.trials": "; ".join(searches),
        "data.metric": f"or {join_words(others, last='or')}{advice if is_advised else ''}",
        "data.max_length": f"{lengths.mean():.0f} tokens on average, {longest} at most{is_cut}",
        STEPS_KEY: f"{epochs:.1f} epochs of {len(train):,} training examples"
        + (f"; the draft has at most {MAX_STEPS} steps, set more if needed" if trainer.max_steps == MAX_STEPS else ""),
    }
    return {("settings", key): comment for key, comment in comments.items()}


def _build_arms(
    inputs: RunInputs, recipe: Recipe | None, *, kind: type[DataSettings], ranks: Sequence[int] | None
) -> tuple[dict[str, Any], dict[Place, str]]:
    """Returns the arms with that of the recipe's settings, and the comments on them.

    `kind` is that of the data, and `ranks` are searched instead of `RANKS` and that of the recipe.
    """
    times_width = find_task(kind).full_rate_times_width
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
    space = {rank: ranks or sorted({*RANKS, *([] if own is None else [own])}), LR: _build_rates(low, high)}
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


def complete_definition(definition: Definition, inputs_cache: InputsCache) -> Definition:
    """Returns a definition with what its file and the command line leave open, chosen as for a drafted sweep.

    These are the columns of a table, `data.max_length` if the arms have the same data, and the steps of `sweep.epochs`.
    Loads the model and the training data. Raises ConfigError if no column fits.
    """
    arm, epochs = definition.arms[0], definition.sweep_config.sweep.epochs
    config, given = arm.base, arm.settings
    is_same = all(other.base.data == config.data and "data.max_length" not in other.space for other in definition.arms)
    found: dict[str, Any] = {}
    if is_same and isinstance(config.data, RowSettings) and given.get("data") in DATA:  # not an option with columns
        if any(f"data.{key}" not in given for key in config.data.found_columns):
            recognised = find_task(config.data).recognise(_read_given(config.data, given))
            found |= {} if recognised is None else recognised.settings
        if "data.max_length" not in given:
            measured = {**given, **found, "data.max_length": LENGTHS[-1]}
            found["data.max_length"] = choose_length(inputs_cache.load(compose_run(measured)))
    if epochs is not None and STEPS_KEY not in definition.raw["overrides"]:
        train = inputs_cache.load(compose_run({**given, **found})).splits.train
        found[STEPS_KEY] = count_steps(epochs, len(train), config.trainer.batch_size)
    return definition.with_overrides(found) if found else definition

"""Drafts a commented sweep file for a user's model and data, after reading both (`lorasweep new`).

The draft compares the frozen base, full fine-tuning and LoRA. Its numbers follow from the data's size and lengths and
from the kind of model; nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from lorasweep.config.compose import compose_run
from lorasweep.config.data import TableConfig
from lorasweep.config.run import RunConfig
from lorasweep.data.reading.conversations import KNOWN_COLUMNS
from lorasweep.data.reading.documents import open_text
from lorasweep.data.reading.tables import (
    DEFAULT_RULES,
    READERS,
    find_files,
    find_kind,
    open_parts,
    read_columns,
    refuse_unreadable,
)
from lorasweep.data.split import Split
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.training.inputs import RunInputs, build_inputs
from lorasweep.wording import format_count, join_words

TEXT_COLUMNS = ("text", "sentence", "sentence1", "question", "premise", "review", "content", "body")
PAIR_COLUMNS = ("text_pair", "sentence2", "answer", "hypothesis")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "score", "rating", "stars")
"""Usual names of columns, in the order in which they are tried."""
EPOCHS = 3
MIN_STEPS, MAX_STEPS = 60, 1000
"""Bounds of `trainer.max_steps`. A sweep trains dozens of runs, so a draft does not begin with longer ones."""
EVALUATIONS = 12
"""Evaluations of a run. Rungs are at a sixth and at half of a run, so both are evaluated."""
MAX_VALIDATION_EXAMPLES = 1000
MAX_MEASURED_TOKENS = 4096
"""Length up to which examples are measured."""
COVERED_SHARE = 0.99
"""Share of the examples that `data.max_length` does not cut."""
RANKS = (1, 4, 16, 64)
FULL_RATES: Mapping[str, tuple[float, float]] = {
    "classifier": (1e-5, 1e-3),
    "causal_lm": (2e-6, 2e-4),
    "seq2seq": (1e-5, 1e-3),
}
"""Two decades of learning rates for full fine-tuning by kind of model. LoRA's are ten times as high, which is the ratio
of "LoRA Without Regret" (2025)."""


def draft_sweep(path: Path, settings: Mapping[str, Any]) -> str:
    """Reads the model and the data, and returns the content of a sweep file for them.

    Args:
        path: Where the file will be written. The sweep has its name.
        settings: `model.path` and `data.train` or `data.path`, and perhaps further settings of a run, which are kept.

    Raises:
        ConfigError: A setting is missing or wrong, or the model or the data can't be read.
    """
    if not {"data", "data.train", "data.path"} & settings.keys():
        raise ConfigError(
            "`lorasweep new` must know the data: add `data.train=FILE`, or `data.path=HUB-ID data.train=SPLIT`."
        )
    chosen = {**_choose_data(settings), **settings}
    chosen = {"model": "classifier" if chosen["data"] == "table" else "causal_lm", **chosen}
    if chosen["model"] in ("classifier", "causal_lm", "seq2seq") and "model.path" not in chosen:
        raise ConfigError("`lorasweep new` must know the model: add `model.path=FOLDER-OR-HUB-ID`.")
    measured = dict(chosen)
    if chosen["data"] in ("table", "chat"):
        measured.setdefault("data.max_length", MAX_MEASURED_TOKENS)
    inputs = build_inputs(compose_run(measured))
    if "data.max_length" in measured and "data.max_length" not in chosen:
        chosen["data.max_length"] = _choose_length(inputs)
    chosen |= {key: value for key, value in _choose_training(inputs, chosen).items() if key not in chosen}
    text = "\n".join(_write_lines(path, chosen, compose_run(chosen), inputs)) + "\n"
    read_definition(yaml.safe_load(text))  # a draft must be a sweep that starts
    return text


def _choose_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the kind of data and its columns, as far as the user did not name them."""
    if "data" in settings:
        return {}
    if "data.path" not in settings and not _is_table(str(settings["data.train"])):
        return {"data": "text"}
    config = compose_run({"data": "table", **settings, "model": "tiny"}, require_all=False).data
    assert isinstance(config, TableConfig)
    name, dataset = next(iter(open_parts(config, "train").items()))  # of several files, the first
    found = dataset.column_names
    if any(set(known) <= set(found) for known in KNOWN_COLUMNS):
        return {"data": "chat"}
    columns = read_columns(dataset, found, name=name)
    guessed = _guess_columns(columns, settings)
    if "data.path" not in settings and "data.columns" not in settings:
        _refuse_data_as_names(found, columns, guessed, train=str(settings["data.train"]))
    return {"data": "table", **guessed}


def _refuse_data_as_names(
    first_line: Sequence[str], columns: Mapping[str, Sequence[Any]], guessed: Mapping[str, str], *, train: str
) -> None:
    """Raises ConfigError if the first line of a csv, tsv or txt file is a row: its label occurs again below it."""
    label, text = guessed.get("data.label"), guessed.get("data.text")
    is_delimited = find_kind(find_files(train, key="data.train")[0]) in DEFAULT_RULES
    if not is_delimited or label is None or label in LABEL_COLUMNS or label not in columns[label]:
        return
    known = {label: "label", text: "text"}
    names = [known.get(name, f"column{number}") for number, name in enumerate(first_line, 1)]
    raise ConfigError(
        f"the first line of {train!r} must name its columns, but looks like data, because {label!r} occurs again in "
        f"its column. Name the columns in their order, such as `'data.columns=[{','.join(names)}]'`."
    )


def _is_table(train: str) -> bool:
    """Returns whether a file has rows and columns. A txt file has them if there is a tab in its first line."""
    first = find_files(train, key="data.train")[0]
    if first.is_dir() or find_kind(first) not in READERS:
        return False
    if find_kind(first) != ".txt":
        return True
    with refuse_unreadable(first), open_text(first) as file:
        return "\t" in file.readline()


def _guess_columns(columns: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns `data.text`, `data.label` and for pairs `data.text_pair`, as far as the user did not name them."""
    taken = {
        str(settings[key]) for key in ("data.text", "data.text_pair", "data.label", "data.group") if key in settings
    }
    free = {name: values for name, values in columns.items() if name not in taken}
    guessed: dict[str, str] = {}
    if "data.label" not in settings:
        by_name = [name for name in LABEL_COLUMNS if name in free]
        guessed["data.label"] = by_name[0] if by_name else _find_fewest_values(free)
        free.pop(guessed["data.label"])
    texts = {
        name: fmean(map(len, values))
        for name, values in free.items()
        if values and all(isinstance(v, str) for v in values)
    }
    if "data.text" in settings:
        return guessed
    by_name = [name for name in TEXT_COLUMNS if name in texts]
    if not by_name and not texts:
        raise ConfigError(f"`data.text` must name a column of texts, but the columns are {join_words(list(columns))}.")
    numbered = None if by_name or "data.text_pair" in settings else _find_numbered_columns(texts)
    if numbered:
        return {**guessed, "data.text": numbered[0], "data.text_pair": numbered[1]}
    guessed["data.text"] = by_name[0] if by_name else max(texts, key=lambda name: texts[name])
    texts.pop(guessed["data.text"])
    pairs = [name for name in PAIR_COLUMNS if name in texts]
    if "data.text_pair" not in settings and pairs:
        guessed["data.text_pair"] = pairs[0]
    return guessed


def _find_numbered_columns(lengths: Mapping[str, float]) -> tuple[str, str] | None:
    """Returns two columns whose names differ in their number only: `question1` and `question2`, or `first`, `second`.

    `lengths` has the mean length of each column's texts. Of several such pairs, the one with the longest texts is
    returned, because MRPC's file has both `#1 ID`, `#2 ID` and `#1 String`, `#2 String`.
    """
    pairs = [
        (name, other)
        for name in lengths
        for one, two in (("1", "2"), ("first", "second"))
        if one in name and (other := name.replace(one, two)) in lengths
    ]
    return max(pairs, key=lambda pair: lengths[pair[0]], default=None)


def _find_fewest_values(columns: Mapping[str, Sequence[Any]]) -> str:
    """Returns the column with the fewest different values, but at least two."""
    counts = {name: len({str(value) for value in values}) for name, values in columns.items()}
    several = {name: count for name, count in counts.items() if count > 1}
    if not several:
        raise ConfigError(
            f"`data.label` must name a column of labels, but the columns are {join_words(list(columns))}."
        )
    return min(several, key=lambda name: several[name])


def _choose_length(inputs: RunInputs) -> int:
    """Returns the length that cuts at most 1 % of the training examples, rounded up to a multiple of 8."""
    covered = int(inputs.splits.train.lengths.double().quantile(COVERED_SHARE))
    limit = getattr(getattr(inputs.base.model, "config", None), "max_position_embeddings", None) or MAX_MEASURED_TOKENS
    return int(min(limit, MAX_MEASURED_TOKENS, 8 * math.ceil(covered / 8)))


def _choose_training(inputs: RunInputs, chosen: Mapping[str, Any]) -> dict[str, int]:
    """Returns batch size, steps and evaluations for three passes over the data, within bounds."""
    num_examples = len(inputs.splits.train)
    batch_size = int(chosen.get("trainer.batch_size", 16 if num_examples >= 16 else num_examples))
    wanted = EVALUATIONS * math.ceil(EPOCHS * num_examples / batch_size / EVALUATIONS)
    steps = int(chosen.get("trainer.max_steps", min(MAX_STEPS, max(MIN_STEPS, wanted))))
    training = {
        "trainer.max_steps": steps,
        "trainer.batch_size": batch_size,
        "trainer.eval_every_steps": max(1, steps // EVALUATIONS),
    }
    if chosen["data"] in ("table", "chat") and len(inputs.splits.validation) > MAX_VALIDATION_EXAMPLES:
        training["data.max_validation_examples"] = MAX_VALIDATION_EXAMPLES
    return training


def _write_lines(path: Path, chosen: Mapping[str, Any], config: RunConfig, inputs: RunInputs) -> Iterator[str]:
    train, steps, size = inputs.splits.train, config.trainer.max_steps, config.trainer.batch_size
    low, high = FULL_RATES.get(config.model.kind, FULL_RATES["causal_lm"])
    parameters = sum(parameter.numel() for parameter in inputs.base.model.parameters())
    yield "# LoRA and full fine-tuning beside the frozen base. First look at the cost, then start:"
    yield f"#   lorasweep plan {path}"
    yield f"#   lorasweep sweep {path}"
    yield f"# The base has {format_count(parameters)} parameters. {_describe_data(train, inputs)}"
    for note in inputs.splits.notes:
        yield f"# {note}"
    yield f"name: {_format_value(path.stem)}"
    yield "settings:"
    comments = {
        "data.max_length": f"{train.lengths.double().mean():.0f} tokens on average, {int(train.lengths.max())} at most",
        "trainer.max_steps": f"{steps * size / len(train):.1f} passes over {len(train):,} training examples",
        "trainer.eval_every_steps": f"{steps // config.trainer.eval_every_steps} evaluations; weak trials pause at two",
        "data.max_validation_examples": "evenly spaced; an evaluation of all takes longer",
    }
    for key, value in chosen.items():
        comment = f" # {comments[key]}" if key in comments else ""
        yield f"  {key}: {_format_value(value)}{comment}"
    yield "  sweep.trials: 12 # of each arm that has a space; all ranks share LoRA's"
    yield "  confirm.margin: 5% # the smallest difference that matters: of the gain of full over frozen, or a number"
    yield "arms:"
    yield "  frozen: {settings: {method: frozen}} # the base as it is"
    yield "  full:"
    yield "    settings: {method: full}"
    yield "    space:"
    yield f"      optim.lr: {{low: {_rate(low)}, high: {_rate(high)}, log: true}} # if the best is at an end, widen it"
    yield "  lora:"
    yield "    settings: {method: lora}"
    yield "    space:"
    yield f"      method.rank: [{', '.join(map(str, RANKS))}]"
    yield f"      optim.lr: {{low: {_rate(10 * low)}, high: {_rate(10 * high)}, log: true}} # ten times full's"
    yield "    confirm_each: method.rank # each rank is confirmed with the learning rate that is predicted best for it"


def _describe_data(train: Split, inputs: RunInputs) -> str:
    labels = inputs.base.labels
    named = "" if labels is None or len(labels.names) < 2 else f" and {len(labels.names)} labels"
    return f"The data has {len(train):,} training sequences{named}."


def _format_value(value: Any) -> str:
    written: str = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return written.removesuffix("...\n").strip()


def _rate(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"

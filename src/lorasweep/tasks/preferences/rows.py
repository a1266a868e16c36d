"""Turns pairs of answers into rows: an example has a row for the chosen answer and one for the rejected answer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from lorasweep.data.rows import Rows
from lorasweep.data.source import DataSource, Examples
from lorasweep.errors import ConfigError
from lorasweep.tasks.chat.rows import build_conversations, count_scored
from lorasweep.tasks.preferences.read import Preference
from lorasweep.tasks.preferences.settings import PreferencesConfig


def build_pairs(
    examples: Examples[Preference],
    *,
    config: PreferencesConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: DataSource | None = None,
) -> Rows:
    """Returns the rows of one split.

    Their record also has the mean numbers of scored tokens, and the accuracy of always choosing the longer answer.
    Raises ConfigError if messages need a chat template that is missing, and in the cases of `build_conversations`.
    """
    has_messages = any(pair.has_messages for pair in examples.items)
    if has_messages and config.template == "auto" and tokenizer.chat_template is None:
        raise ConfigError(
            "`model.path` must have a tokenizer with a chat template, because the data has lists of messages, but has "
            "none. Use another model, `data.template=FILE.jinja`, or `data.template=plain` to join the texts."
        )
    answers = [answer for pair in examples.items for answer in (pair.chosen, pair.rejected)]
    sides = Examples(name=examples.name, items=answers, fingerprint=examples.fingerprint, notes=examples.notes)
    rows = build_conversations(sides, config=config, tokenizer=tokenizer, row_names=("chosen", "rejected"))
    chosen, rejected = rows.by_example(count_scored(rows.sequences["targets"]).double()).unbind(1)
    facts = {
        "chosen_tokens": float(chosen.mean()),
        "rejected_tokens": float(rejected.mean()),
        "longer_accuracy": float((1 + (chosen - rejected).sign()).mean() / 2),
    }
    return replace(rows, facts={**rows.facts, **facts})

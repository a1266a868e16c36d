"""Says what to expect of a sweep before it starts: in one list for `new`, `plan`, `sweep` and `--resume`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lorasweep.config.sweep import parse_margin
from lorasweep.sweep.checks import score_constant_answer
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.confirm import find_warnings, list_questions
from lorasweep.sweep.definition.packing import explain_bases, explain_solo_arms
from lorasweep.training.inputs import InputsCache
from lorasweep.wording import Note, format_share

POWER = 1.96 + 0.84
"""Standard errors of a difference that is found with a probability of 80 % at a level of 5 %."""
MIN_GROUPS = 20
"""With fewer groups of test examples a verdict says little about other groups."""
ASSUMED_DISAGREEMENT = 0.1
"""Assumed share of test examples on which two trained settings differ, in the mean over their seeds."""


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """The notes on a sweep that has not started."""

    notes: tuple[Note, ...]
    """Each sentence once."""

    @property
    def warnings(self) -> list[str]:
        return [note.text for note in self.notes if note.kind == "warning"]

    @property
    def shown(self) -> list[Note]:
        """The warnings and the notes on the sweep, without those on the data."""
        return [note for note in self.notes if note.kind != "data"]

    @property
    def others(self) -> list[str]:
        """The notes that are no warnings."""
        return [note.text for note in self.notes if note.kind != "warning"]


def assess(definition: Definition, inputs_cache: InputsCache) -> Assessment:
    """Returns the notes on a checked sweep: warnings about its definition first."""
    notes = {note.text: note for note in _list_notes(definition, inputs_cache)}
    return Assessment(notes=tuple(notes.values()))


def _list_notes(definition: Definition, inputs_cache: InputsCache) -> Iterator[Note]:
    for text in find_warnings(definition):
        yield Note(kind="warning", text=text)
    has_test = bool(definition.sweep_config.confirm.list_looks())
    for config in definition.corner_configs:
        yield from inputs_cache.load(config).list_notes(config, has_test=has_test)
    yield from _describe_steps(definition, inputs_cache)
    for text in (*explain_bases(definition), *explain_solo_arms(definition)):
        yield Note(kind="sweep", text=text)
    if has_test:
        if not any(arm.base.method.trains_all for arm in definition.arms):
            text = "Whether LoRA is as good as full fine-tuning is not asked: no arm has `method=full`."
            yield Note(kind="sweep", text=text)
        yield _describe_test_data(definition, inputs_cache)


def _describe_steps(definition: Definition, inputs_cache: InputsCache) -> Iterator[Note]:
    """Yields a note on steps that are less than an epoch: a warning if labels may not be learned."""
    config = next((arm.base for arm in definition.arms if arm.base.num_steps), None)
    if config is None or config.data.is_built_in:
        return
    splits, batch_size = inputs_cache.load(config).splits, config.trainer.batch_size
    num_examples, most_frequent = len(splits.train), score_constant_answer(definition, inputs_cache).get("accuracy")
    if (epochs := config.num_steps * batch_size / num_examples) >= 1:
        return
    sentences = [
        f"Each run trains {config.num_steps:,} steps of {batch_size}: {epochs:.2f} epochs of {num_examples:,} training "
        "examples."
    ]
    if most_frequent is not None:
        sentences.append(
            "So few steps may not get beyond the answer that is always the most frequent label (accuracy "
            f"{format_share(most_frequent)})."
        )
    sentences.append(f"`trainer.max_steps={math.ceil(num_examples / batch_size)}` makes one epoch.")
    yield Note(kind="sweep" if most_frequent is None else "warning", text=" ".join(sentences))


def _describe_test_data(definition: Definition, inputs_cache: InputsCache) -> Note:
    """Returns a note on the difference that the test data can show: a warning if the margin is smaller."""
    splits, confirm = inputs_cache.load(definition.arms[0].base).splits, definition.sweep_config.confirm
    test = splits.test()
    groups = set(test.groups)
    if 0 < len(groups) < min(MIN_GROUPS, len(test)):
        which = f"{len(groups)} groups" if len(groups) > 1 else f"one group ({groups.pop()!r})"
        text = f"All {len(test):,} test examples are in {which}, so verdicts say little about other groups. "
        return Note(kind="warning", text=f"{text}Give test data of at least {MIN_GROUPS} groups.")
    number, of_groups = len(groups) or len(test), f" in {len(groups):,} groups" if 0 < len(groups) < len(test) else ""
    text, shown = f"The verdicts rest on {len(test):,} test examples{of_groups}", 0.0
    margin, constant = parse_margin(confirm.margin), score_constant_answer(definition, inputs_cache).get("accuracy", 0)
    # a base is seldom worse than the most frequent label, so this is the largest gain
    unit = (1 - constant or 1.0) if margin.is_share_of_gain else 1.0
    if splits.metric == "accuracy":
        shown = POWER * math.sqrt(ASSUMED_DISAGREEMENT / number)
        text += f": they probably show a difference of {100 * shown:.1f} points of accuracy"
    if shown <= margin.value * unit or not list_questions(definition):
        return Note(kind="sweep", text=f"{text}. Four times as many show a difference half as large.")
    enough = math.ceil(ASSUMED_DISAGREEMENT * (POWER / (margin.value * unit)) ** 2)
    larger = math.ceil(1000 * shown / unit) / 1000
    most, typed = ("at most ", f"{100 * larger:g}%") if margin.is_share_of_gain else ("", f"{larger:g}")
    text += (
        f", but `confirm.margin` ({confirm.margin}) is {most}{100 * margin.value * unit:.1f} points, so most answers "
    )
    text += f"will stay open. Give {enough:,} test {'groups' if of_groups else 'examples'} (`data.test=FILE`)"
    text += f", or a larger margin (`confirm.margin={typed}`)." if larger < 1 else "."
    return Note(kind="warning", text=text)

"""The questions of a sweep, which are stated before its first trial."""

from __future__ import annotations

from dataclasses import replace

from lorasweep.errors import ConfigError
from lorasweep.record import Question, QuestionName
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.wording import nearest

SIZE_KEYS = ("method.rank", "method.dim")
"""The `confirm_each` keys of which a smaller value costs less, so that the smallest sufficient value is asked for."""


def list_questions(definition: Definition) -> list[Question]:
    """Returns the questions of a sweep.

    - Each subject of each arm that trains is compared with `full`; without `full` and `confirm.pairs`, with the first
      arm that trains.
    - For an arm with `confirm_each` of `SIZE_KEYS`, the smallest sufficient value is asked for.
    - Each pair of `confirm.pairs` is compared.

    Raises:
        ConfigError: `confirm.pairs` names an arm that the sweep does not have.
    """
    trained = [arm for arm in definition.arms if arm.corner_configs[0].method.name != "frozen"]
    full = next((arm for arm in trained if arm.corner_configs[0].method.name == "full"), None)
    pairs = definition.sweep_config.confirm.pairs
    questions = []
    if full is not None:
        others = [arm for arm in trained if arm.corner_configs[0].method.name != "full"]
        questions += [_compare(arm, name="as_good_as_full", reference=full.name) for arm in others]
    elif not pairs:
        questions += [_compare(arm, name="pair", reference=_name_largest(trained[0])) for arm in trained[1:]]
    questions += [
        Question(name="smallest", arm=arm.name, key=arm.confirm_each, subjects=list(arm.subjects), reference=None)
        for arm in trained
        if arm.confirm_each in SIZE_KEYS
    ]
    known = {name: arm for arm in definition.arms for name in (arm.name, *arm.subjects)}
    for first, second in pairs:
        for name in (first, second):
            if name not in known:
                raise ConfigError(
                    f"`confirm.pairs` must name arms of the sweep ({', '.join(known)}), but got {name!r}."
                    f"{nearest(name, known)}"
                )
        reference = second if second in known[second].subjects else _name_largest(known[second])
        question = _compare(known[first], name="pair", reference=reference)
        # the name of one value asks about that value alone
        questions.append(replace(question, subjects=[first]) if first in question.subjects else question)
    return questions


def _compare(arm: Arm, *, name: QuestionName, reference: str) -> Question:
    return Question(name=name, arm=arm.name, key=arm.confirm_each, subjects=list(arm.subjects), reference=reference)


def _name_largest(arm: Arm) -> str:
    """Returns the subject with the largest value of an arm."""
    return list(arm.subjects)[-1]

"""The outcome of a chain: where values begin to be good enough, whether that is settled, and what blocks it."""

import pytest

from lorasweep.report.evidence.verdicts import Answer, AnswerRow


def chain(*verdicts, name="as_good_as_full"):
    """The outcome of answers, smallest value first; `waits` is an open answer that another value blocks."""
    subjects = [f"lora-rank-{2**place}" for place in range(len(verdicts) + 1)]
    answers = []
    for place, verdict in enumerate(verdicts):
        blocker = {"open": "few seeds", "waits": "another value"}.get(verdict)
        given = {"name": name, "arm": "lora", "key": "method.rank", "value": None, "interval": None, "num_seeds": 3}
        given |= {"subject": subjects[place], "compared_with": tuple(subjects[place + 1 :]), "reference": "full"}
        shown = "open" if verdict == "waits" else verdict
        answers.append(AnswerRow(**given, verdict=shown, blocker=blocker, is_share=True))
    return Answer(name=name, arm="lora", rows=tuple(answers))


@pytest.mark.parametrize(
    ("verdicts", "state", "good", "below", "blocking"),
    [
        ((), "not asked", None, None, None),
        (("equivalent", "better"), "settled", 0, None, None),
        (("worse", "not worse"), "settled", 1, 0, None),
        (("worse", "worse"), "settled", None, 1, None),
        (("worse", "open", "better"), "open", 2, 1, 1),
        (("worse", "waits", "open"), "open", None, 2, 2),
        (("open", "waits", "better"), "open", 2, 1, 0),
        (("waits", "waits"), "open", None, 1, 1),  # the smaller value is shown to be good and the larger one not
    ],
)
def test_an_outcome_is_settled_if_the_next_smaller_value_is_shown_not_to_be_good(
    verdicts, state, good, below, blocking
):
    outcome = chain(*verdicts)
    places = [None if place is None else outcome.rows[place] for place in (good, below, blocking)]
    assert outcome.state == state
    assert [outcome.good, outcome.below, outcome.blocking] == places


def test_the_largest_value_is_the_one_about_which_the_smallest_sufficient_is_not_asked():
    assert chain("worse", "open").largest == "lora-rank-2"
    assert chain("insufficient", "open", name="smallest").largest == "lora-rank-4"

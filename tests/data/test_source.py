"""A fingerprint moves with everything that a run would see differently, and with nothing else."""

from __future__ import annotations

from lorasweep.data.source import Message, fingerprint_conversations, fingerprint_documents, fingerprint_labelled
from lorasweep.data.stdlib import Document


def test_fingerprint_of_labelled_rows_moves_with_texts_pairs_labels_and_order():
    rows = [
        (["a", "b"], None, [0, 1]),
        (["b", "a"], None, [1, 0]),
        (["a", "b"], None, [1, 0]),
        (["a", "b"], None, [0.0, 1.0]),
        (["a", "b"], None, [[0], [1]]),
        (["a", "b"], ["", "x"], [0, 1]),
        (["a", "b"], ["x", ""], [0, 1]),
        (["ab", ""], None, [0, 1]),  # the same characters, cut elsewhere
    ]
    assert len({fingerprint_labelled(*row) for row in rows}) == len(rows)
    assert fingerprint_labelled(["a"], None, [0]) == fingerprint_labelled(["a"], None, [0])


def test_fingerprint_of_conversations_moves_with_roles_contents_and_where_one_ends():
    def talk(*said):
        return [Message(role=role, content=content) for role, content in said]

    hi, hello = ("user", "hi"), ("assistant", "hello")
    variants = [
        [talk(hi, hello)],
        [talk(hi), talk(hello)],
        [talk(hello, hi)],
        [talk(hi, ("assistant", "hell"))],
        [talk(("system", "hi"), hello)],
    ]
    assert len({fingerprint_conversations(variant) for variant in variants}) == len(variants)


def test_fingerprint_of_documents_is_the_one_that_records_have():
    # A stored value: records of earlier runs compare against it.
    assert (
        fingerprint_documents([Document(name="one", text="añb"), Document(name="two", text="")]) == "1f8cabf312d16b81"
    )

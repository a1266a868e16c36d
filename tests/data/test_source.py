"""A fingerprint moves with everything that a run would see differently, and with nothing else."""

from lorasweep.data.source import Conversation, Document, LabelledText, Message, fingerprint_examples


def test_fingerprint_moves_with_texts_pairs_labels_and_order():
    variants = [
        [LabelledText("a", None, 0), LabelledText("b", None, 1)],
        [LabelledText("b", None, 1), LabelledText("a", None, 0)],
        [LabelledText("a", None, 1), LabelledText("b", None, 0)],
        [LabelledText("a", None, 0.0), LabelledText("b", None, 1.0)],
        [LabelledText("a", None, [0]), LabelledText("b", None, [1])],
        [LabelledText("a", "", 0), LabelledText("b", "x", 1)],
        [LabelledText("ab", None, 0), LabelledText("", None, 1)],  # the same characters, cut elsewhere
    ]
    assert len({fingerprint_examples(variant) for variant in variants}) == len(variants)
    assert fingerprint_examples(variants[0]) == fingerprint_examples(list(variants[0]))


def test_fingerprint_moves_with_roles_contents_and_ends_of_conversations():
    hi, hello = Message("user", "hi"), Message("assistant", "hello")
    variants = [
        [[hi, hello]],
        [[hi], [hello]],
        [[hello, hi]],
        [[hi, Message("assistant", "hell")]],
        [[Message("system", "hi"), hello]],
    ]
    fingerprints = {fingerprint_examples(map(Conversation, variant)) for variant in variants}
    assert len(fingerprints) == len(variants)
    assert fingerprint_examples([Document("one", "añb"), Document("two", "")]) == "1f8cabf312d16b81"

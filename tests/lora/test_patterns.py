import pytest

from lorasweep.lora.patterns import fits_pattern, parse_row_ranges


def test_a_regular_expression_must_match_the_whole_name():
    assert fits_pattern(r"re:.*\.(q|v)_proj", "layers.0.q_proj")
    assert not fits_pattern(r"re:(q|v)_proj", "layers.0.q_proj")
    assert fits_pattern("c_attn[q,v]", "h.0.c_attn")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("c_attn", ()),
        ("c_attn[q,v]", ((0, 4), (8, 12))),
        ("c_attn[v,q]", ((0, 4), (8, 12))),
        ("c_attn[k]", ((4, 8),)),
        ("c_attn[0:2,6:12]", ((0, 2), (6, 12))),
        ("c_attn[6:12,0:2]", ((0, 2), (6, 12))),
        ("re:c_attn[qk]", ()),
    ],
)
def test_rows(pattern, expected):
    assert parse_row_ranges(pattern, num_rows=12) == expected


@pytest.mark.parametrize(
    ("pattern", "num_rows", "message"),
    [
        ("qkv[q]", 10, "thirds .*if 3 divides 10, but got 'q'"),
        ("qkv[x]", 12, "but got 'x'"),
        ("qkv[3]", 12, "but got '3'"),
        ("qkv[0:4,2:6]", 12, r"within 0:12, .*but got '0:4,2:6'. Write them as `qkv\[0:6\]`"),
        ("qkv[4:4]", 12, "must be separate ranges"),
        ("qkv[5:4]", 12, "must be separate ranges"),
        ("qkv[0:13]", 12, "must be separate ranges"),
        ("qkv[q,q]", 12, "must be separate ranges"),
    ],
)
def test_rows_that_make_no_sense_are_refused(pattern, num_rows, message):
    with pytest.raises(ValueError, match=message):
        parse_row_ranges(pattern, num_rows=num_rows)


@pytest.mark.parametrize("expression", ["(" * 100_000, "a{99999999999999999999}", "(?P<n>a)(?P<n>"])
def test_an_expression_that_can_not_be_compiled_is_refused(expression):
    with pytest.raises(ValueError, match="must be a regular expression, but got an error"):
        fits_pattern(f"re:{expression}", "x")

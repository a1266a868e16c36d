"""Numbers as people read them."""

from __future__ import annotations

import pytest

from lorasweep.wording import (
    format_bytes,
    format_count,
    format_metric,
    format_score,
    format_seconds,
    format_setting,
    format_settings,
    format_share,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999, "999"),
        (11_264, "11.3 k"),
        (999_700, "1 M"),
        (1_280_000, "1.28 M"),
        (7e9, "7 G"),
        (None, "–"),
    ],
)
def test_counts_have_three_digits_and_a_unit(value: float | None, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (512, "512 B"), (512 * 1024, "512 KiB"), (2.75 * 2**20, "2.75 MiB"), (3 * 2**50, "3072 TiB")],
)
def test_bytes_have_binary_units(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 %"), (0.41, "41 %"), (0.00881, "0.88 %"), (1.0, "100 %"), (-0.2, "-20 %"), (0.0996, "10 %")],
)
def test_shares_are_percent(value: float, text: str) -> None:
    assert format_share(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.21, "4.2 s"),
        (9.99, "10 s"),
        (59.7, "1 min 00 s"),
        (151.2, "2 min 31 s"),
        (3599.8, "1 h 00 min"),
        (3840, "1 h 04 min"),
        (None, "–"),
    ],
)
def test_times_never_show_sixty_of_a_unit(value: float | None, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.68812, "1.688"), (0.0, "0.000"), (0.001234, "0.001234"), (123456.0, "1.235e+05"), (None, "–")],
)
def test_scores_keep_the_digits_that_matter(value: float | None, text: str) -> None:
    assert format_score(value) == text


def test_settings_are_named_by_the_last_part_of_their_key() -> None:
    assert format_settings({"method.rank": 16, "optim.lr": 0.0123456}) == "rank 16, lr 0.0123"
    assert format_settings({}) == "nothing swept"
    assert format_setting(None) == "null"
    assert format_metric("bits_per_byte") == "bits per byte"

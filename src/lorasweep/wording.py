"""Numbers, settings and names as text for people: in tables, sentences and error messages."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

UNKNOWN = "–"
"""Text of an unknown value."""
ABSENT = "nothing"
"""Text in messages in place of a setting or a number that is missing."""
MAX_SCORE_DIGITS = 6
"""Maximum number of digits of a score. Scores that differ only in later digits look equal."""
MAX_TYPING_ERRORS = 2
"""Maximum number of typing errors in a name that gets a suggestion; a name of three characters may have one."""
MAX_COMPARED_CHARACTERS = 200
"""A longer name gets no suggestion."""
MIN_WIDTH = 1e-6
"""Width of an interval below which it is taken for a rounding error; relative to its ends, of a share to 1."""
MAX_EXTRA_DECIMALS = 2
"""Maximum number of decimals that are added so that an end of an interval is not rounded to a critical value."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence for the user on what was asked for, before it trains."""

    kind: Literal["warning", "sweep", "data"]
    """A warning is always shown, a note on the sweep in its plan and by `--verbose`, one on the data by `--verbose`."""
    text: str


def find_nearest(name: str, choices: Iterable[str]) -> str | None:
    """Returns a choice whose last part is `name`, or the one with the fewest typing errors.

    Returns None if each choice has more than `MAX_TYPING_ERRORS`, or one is `name`.
    """
    options = list(choices)
    endings = [option for option in options if option.endswith(f".{name}")]
    near: dict[str, int] = {}
    for option in options if len(name) < MAX_COMPARED_CHARACTERS else ():
        steps = difflib.SequenceMatcher(None, name, option, autojunk=False).get_opcodes()
        near[option] = sum(max(i_end - i, j_end - j) for tag, i, i_end, j, j_end in steps if tag != "equal")
    limit = MAX_TYPING_ERRORS if len(name) > MAX_TYPING_ERRORS + 1 else 1
    matches = endings or sorted((option for option in near if near[option] <= limit), key=near.__getitem__)
    return matches[0] if matches and name not in options else None


def suggest_nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ` Did you mean ...?` with the choice of `find_nearest`; empty if there is none."""
    near = find_nearest(name, choices)
    return f" Did you mean `{near}`?" if near else ""


def shorten(value: Any, limit: int = 60) -> str:
    """Returns a value as Python writes it, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def format_count(value: float | None) -> str:
    """Returns a count with three digits and a unit of thousands: `950`, `1.28 M`."""
    return _scaled(value, step=1000, units=("", "k", "M", "G", "T"))


def format_bytes(value: float | None) -> str:
    """Returns a size in bytes with three digits and a binary unit: `512 KiB`."""
    return _scaled(value, step=1024, units=("B", "KiB", "MiB", "GiB", "TiB"))


def format_share(value: float | None) -> str:
    """Returns a fraction in percent: `41 %`, `2.3 %`, `0.04 %`."""
    if value is None:
        return UNKNOWN
    percent = 100 * value + 0.0  # no -0
    return f"{percent:.0f} %" if abs(percent) >= 9.95 or percent == 0 else f"{percent:.2g} %"


def format_seconds(value: float | None) -> str:
    """Returns a time in seconds as `4.2 s`, `2 min 31 s` or `1 h 04 min`."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value < 9.95:
        return f"{value:.1f} s"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_seconds_range(low: float, high: float) -> str:
    """Returns a range of time in one unit, with two digits: `38 to 71 s`, `1.3 to 2.1 min`, `2.5 h`."""
    scale, unit = (1, "s") if high < 99.5 else (60, "min") if high < 99.5 * 60 else (3600, "h")
    ends = [f"{end / scale:.{1 if end / scale < 9.95 else 0}f}" for end in (low, high)]
    return f"{ends[1]} {unit}" if ends[0] == ends[1] else f"{' to '.join(ends)} {unit}"


def format_score(value: float | None, *, beside: Iterable[float | None] = ()) -> str:
    """Returns a score with three decimals, or with four digits if it is very small or large.

    If two different scores `beside` it would look equal, all get more digits, up to `MAX_SCORE_DIGITS`.
    """
    if value is None:
        return UNKNOWN
    others = {other for other in beside if other is not None}
    num_different = len({f"{other:.{MAX_SCORE_DIGITS}g}" for other in others})
    for extra_digits in range(MAX_SCORE_DIGITS):
        if len({_score_text(other, extra_digits) for other in others}) >= num_different:
            break
    return _score_text(value, extra_digits)


def _score_text(value: float, extra_digits: int) -> str:
    if value == 0 or 0.1 <= abs(value) < 1000:
        digits_before_point = math.floor(math.log10(abs(value))) + 1 if value else 0
        return f"{value:.{min(3 + extra_digits, MAX_SCORE_DIGITS - digits_before_point)}f}"
    return f"{value:.{min(4 + extra_digits, MAX_SCORE_DIGITS)}g}"


def count_decimals(
    intervals: Iterable[tuple[float, float] | None], *, digits: int = 2, critical: Sequence[float] = (0.0,)
) -> int | None:
    """Returns the number of decimals for intervals that stand beside each other; None if none has a width.

    `digits` of the width of the narrowest interval are shown. If an end would be rounded to a value in `critical`,
    up to `MAX_EXTRA_DECIMALS` decimals are added.
    """
    known = [(low, high) for low, high in filter(None, intervals) if high - low > MIN_WIDTH * max(abs(low), abs(high))]
    if not known:
        return None
    width = min(high - low for low, high in known)
    decimals = min(8, max(0, digits - 1 - math.floor(math.log10(width))))
    ends = [end for interval in known for end in interval]
    pairs = [(end, value) for end in ends for value in critical if end != value]
    for more in range(MAX_EXTRA_DECIMALS):
        if all(round(end, decimals + more) != round(value, decimals + more) for end, value in pairs):
            return decimals + more
    return decimals + MAX_EXTRA_DECIMALS


def format_estimate(value: float | None, interval: tuple[float, float] | None, *, decimals: int | None = None) -> str:
    """Returns a score with its interval, if given: `1.372 [1.365, 1.379]`; without `decimals`, its width decides."""
    if value is None or interval is None:
        return format_score(value)
    decimals = count_decimals([interval]) if decimals is None else decimals
    if decimals is None:
        return format_score(value)
    # `+ 0.0` turns -0.000 into 0.000
    score, low_text, high_text = (f"{round(number, decimals) + 0.0:.{decimals}f}" for number in (value, *interval))
    return f"{score} [{low_text}, {high_text}]"


def count_percent_decimals(intervals: Iterable[tuple[float, float] | None], *, critical: Sequence[float] = ()) -> int:
    """Returns the number of decimals for shares in percent that stand beside each other."""
    wide = [(low, high) for low, high in filter(None, intervals) if high - low > MIN_WIDTH]
    percent = [(100 * low, 100 * high) for low, high in wide]
    return count_decimals(percent, digits=1, critical=[0.0, 100.0, *(100 * value for value in critical)]) or 0


def format_share_estimate(
    value: float | None, interval: tuple[float, float] | None, *, decimals: int | None = None
) -> str:
    """Returns a fraction in percent with its interval: `92 % [90, 94]`; without `decimals`, its width decides."""
    if value is None or interval is None:
        return format_share(value)
    decimals = count_percent_decimals([interval]) if decimals is None else decimals
    share, low, high = (f"{round(100 * number, decimals) + 0.0:.{decimals}f}" for number in (value, *interval))
    return f"{share} % [{low}, {high}]"


def join_words(words: Sequence[str], *, last: str = "and") -> str:
    """Returns a list for a sentence: `a, b and c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def format_setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if value is None:
        return "null"
    return str(value)


def format_range(values: Sequence[Any] | Mapping[str, Any]) -> str:
    """Returns the range of a swept key, as a sweep file has it: `1, 4, 16`, or `0.0001 to 0.01`."""
    if isinstance(values, Mapping):
        return f"{format_setting(values['low'])} to {format_setting(values['high'])}"
    return ", ".join(map(format_setting, values))


def format_settings(params: dict[str, Any]) -> str:
    """Returns settings in one line with short keys: `rank 16, alpha 32, lr 0.0123`; without any, `nothing swept`."""
    return ", ".join(f"{short_key(key)} {format_setting(value)}" for key, value in params.items()) or "nothing swept"


def short_key(key: str) -> str:
    """Returns the last part of a dotted key: `lr` for `optim.lr`."""
    return key.rsplit(".", 1)[-1]


def format_metric(name: str) -> str:
    """Returns the name of a metric as people read it, without the split at its start: `acc` for `val_acc`."""
    return re.sub(r"^val(id(ation)?)?_", "", name).replace("_", " ")


def _scaled(value: float | None, *, step: int, units: tuple[str, ...]) -> str:
    if value is None or not math.isfinite(value):
        return UNKNOWN
    scaled, power = float(value), 0
    # minus 0.5, because 999.5 would be written as 1000
    while abs(scaled) >= step - 0.5 and power < len(units) - 1:
        scaled, power = scaled / step, power + 1
    digits = f"{scaled:.0f}" if scaled == int(scaled) or abs(scaled) >= 99.95 else f"{scaled:.3g}"
    return f"{digits} {units[power]}".rstrip()

"""Numbers for people, as page, terminal and tables show them: three significant digits, a unit, the spread over seeds.

``spread`` is a standard deviation in the value's own unit; one that rounds to zero is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def format_number(value: float) -> str:
    """Return three significant digits, never fewer than the whole number's, without an exponent."""
    rounded = float(f"{value:.3g}") if abs(value) < 1000 else value
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{min(max(digits, 0), 9)}f}"


def format_ratio(reference: float, measured: float, words: tuple[str, str] = ("less", "more"), than: str = "") -> str:
    """Return how many times below or above a reference a measure is: ``9.6x less``, ``2.9x more``, ``the same``.

    With ``than``, in a sentence: ``9.6 times less than dense``. Empty where there is no such number.
    """
    if not (0 < measured < math.inf and 0 < reference < math.inf):
        return ""
    ratio = max(reference / measured, measured / reference)
    if ratio < 1.005:
        return f"the same as {than}" if than else "the same"
    number = f"{ratio:.2f}" if ratio < 1.095 else f"{ratio:,.1f}" if ratio < 100 else f"{ratio:,.0f}"
    word = words[measured > reference]
    return f"{number} times {word} than {than}" if than else f"{number}x {word}"


def format_percent(share: float, spread: float | None = None) -> str:
    """Return a share (0 to 1) in percent."""
    text = format_number(100 * share) if abs(share) < 0.01 else f"{100 * share:.1f}"
    return _with_spread(text, 100 * (spread or 0), "%")


def format_bytes(value: float, spread: float | None = None) -> str:
    """Return bytes in the unit that suits, by powers of 1000."""
    return _with_prefix(value, spread, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_megabytes(value: float, spread: float | None = None) -> str:
    """Return megabytes of 10^6 bytes in the unit that suits."""
    return format_bytes(value * 1e6, 1e6 * (spread or 0))


def format_count(value: float, spread: float | None = None) -> str:
    """Return a count with the prefix that suits."""
    return _with_prefix(value, spread, ("", "k", "M", "G", "T", "P", "E"))


def format_milliseconds(value: float, spread: float | None = None) -> str:
    """Return milliseconds."""
    return _with_spread(format_number(value), spread or 0, "ms")


def format_duration(seconds: float, spread: float | None = None) -> str:
    """Return seconds; from 60 on as minutes and hours, without a spread."""
    if seconds < 60:
        return _with_spread(f"{seconds:.1f}", spread or 0, "s")
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _with_prefix(value: float, spread: float | None, units: Sequence[str]) -> str:
    power = min(int(math.log10(value) // 3), len(units) - 1) if value >= 1 else 0
    power += round(value / 1000**power) >= 1000 and power < len(units) - 1
    scaled = value / 1000**power
    text = format_number(scaled) if power or scaled % 1 else f"{scaled:.0f}"
    return _with_spread(text, (spread or 0) / 1000**power, units[power])


def _with_spread(text: str, spread: float, unit: str) -> str:
    """Return a number, its spread to as many digits unless that is zero, and its unit."""
    digits = len(text.partition(".")[2])
    return " ".join(filter(None, [text, f"± {spread:,.{digits}f}" if round(spread, digits) else "", unit]))

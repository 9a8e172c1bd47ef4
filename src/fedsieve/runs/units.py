"""Numbers as a page shows them: three digits that matter, and a unit."""

from __future__ import annotations

import math
from collections.abc import Sequence


def three(value: float) -> str:
    """Return three significant digits, never fewer than the whole number's, without an exponent."""
    rounded = float(f"{value:.3g}") if abs(value) < 1000 else value
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{min(max(digits, 0), 9)}f}"


def times(reference: float, measured: float, words: tuple[str, str] = ("less", "more"), than: str = "") -> str:
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


def percent(share: float, spread: float | None = None) -> str:
    """Return a share in percent, with its standard deviation if there is one."""
    text = three(100 * share) if abs(share) < 0.01 else f"{100 * share:.1f}"
    return _with(text, None if spread is None else 100 * spread, "%")


def _with(text: str, spread: float | None, unit: str) -> str:
    """Return a number with its standard deviation, unless that is zero to as many digits, and its unit."""
    digits = len(text.partition(".")[2])
    by = "" if spread is None or round(spread, digits) == 0 else f"± {spread:,.{digits}f}"
    return " ".join(filter(None, [text, by, unit]))


def _units(value: float, spread: float | None, units: Sequence[str]) -> str:
    power = min(int(math.log10(value) // 3), len(units) - 1) if value >= 1 else 0
    power += round(value / 1000**power) >= 1000 and power < len(units) - 1
    scaled = value / 1000**power
    text = three(scaled) if power or scaled % 1 else f"{scaled:.0f}"
    return _with(text, None if spread is None else spread / 1000**power, units[power])


def size(value: float, spread: float | None = None) -> str:
    """Return bytes in the unit that suits."""
    return _units(value, spread, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(value: float, spread: float | None = None) -> str:
    """Return a count with the prefix that suits."""
    return _units(value, spread, ("", "k", "M", "G", "T", "P", "E"))


def megabytes(value: float, spread: float | None = None) -> str:
    """Return megabytes of 10^6 bytes in the unit that suits."""
    return size(value * 1e6, None if spread is None else spread * 1e6)


def milliseconds(value: float, spread: float | None = None) -> str:
    """Return milliseconds."""
    return _with(three(value), spread, "ms")


def duration(seconds: float, spread: float | None = None) -> str:
    """Return seconds; as minutes and hours, where they are many, which say no spread."""
    if seconds < 60:
        return _with(f"{seconds:.1f}", spread, "s")
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

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


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{three(100 * share) if abs(share) < 0.01 else format(100 * share, '.1f')} %"


def _units(value: float, units: Sequence[str]) -> str:
    power = min(int(math.log10(value) // 3), len(units) - 1) if value >= 1 else 0
    power += round(value / 1000**power) >= 1000 and power < len(units) - 1
    scaled = value / 1000**power
    return f"{three(scaled) if power or scaled % 1 else format(scaled, '.0f')} {units[power]}".strip()


def size(value: float) -> str:
    """Return bytes in the unit that suits."""
    return _units(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(value: float) -> str:
    """Return a count with the prefix that suits."""
    return _units(value, ("", "k", "M", "G", "T", "P", "E"))


def megabytes(value: float) -> str:
    """Return megabytes of 10^6 bytes in the unit that suits."""
    return size(value * 1e6)


def milliseconds(value: float) -> str:
    """Return milliseconds."""
    return f"{three(value)} ms"


def duration(seconds: float) -> str:
    """Return seconds as minutes and hours, where they are many."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

"""Write committed results into the README's marked places; a test holds them equal (python benchmarks/readme.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from accuracy import table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def filled(text: str) -> str:
    """Return the README with every marked place holding what the results say."""
    overhead = json.loads((HERE / "results" / "round.json").read_text())

    def tabled(found: re.Match[str]) -> str:
        results = json.loads((HERE / "results" / f"{found[1]}.json").read_text())
        return f"<!-- table: {found[1]} -->\n{table(results)}\n<!-- end -->"

    def figure(found: re.Match[str]) -> str:
        value = overhead[found[1]]
        shown = value if isinstance(value, str) else f"{value:.1f}" if value < 100 else f"{value:.0f}"
        return f"<!-- round: {found[1]} -->{shown}<!-- end -->"

    text = re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", tabled, text, flags=re.S)
    return re.sub(r"<!-- round: (\w+) -->.*?<!-- end -->", figure, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))

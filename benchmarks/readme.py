"""Write committed results into the marked places of README and docs, and draw step.png; a test holds pages equal."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import byzantine
import flower_table
import loose_bound
import node_cost
import performance
import picture
import private_table
import scale
from accuracy import LABELS, table, told

sys.path.append(str(Path(__file__).parent.parent / "reproductions"))
import collect
import messages_table as messages

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = (ROOT / "README.md", *sorted(p for part in ("docs", "reproductions") for p in (ROOT / part).rglob("*.md")))


def filled(text: str) -> str:
    """Return a page with every marked place holding what the results say."""
    overhead = json.loads((HERE / "results" / "round.json").read_text())

    def tabled(found: re.Match[str]) -> str:
        results = json.loads((HERE / "results" / f"{found[1]}.json").read_text())
        return f"<!-- table: {found[1]} -->\n{table(results)}\n<!-- end -->"

    def figure(found: re.Match[str]) -> str:
        value = overhead[found[1]]
        shown = value if isinstance(value, str) else f"{value:.1f}" if value < 100 else f"{value:.0f}"
        return f"<!-- round: {found[1]} -->{shown}<!-- end -->"

    def card(found: re.Match[str]) -> str:
        if found[1] == "private":
            return f"<!-- measured: private -->\n{private_table.table()}\n<!-- end -->"
        lines = [told(results, found[1]) for task, results in digits.items() if found[1] in LABELS[task]]
        return f"<!-- measured: {found[1]} -->\n{chr(10).join(lines)}\n<!-- end -->"

    def reproduced(found: re.Match[str]) -> str:
        return f"<!-- reproduced: {found[1]} -->\n{collect.table(found[1])}\n<!-- end -->"

    def reached(found: re.Match[str]) -> str:
        return f"<!-- reached: {found[1]} {found[2]} -->{collect.reached(found[1], int(found[2]))}<!-- end -->"

    def sweep(found: re.Match[str]) -> str:
        told = json.loads((HERE / "results" / "sweep.json").read_text())
        return f"<!-- sweep: {found[1]} -->{told[found[1]]:.0f}<!-- end -->"

    def performed(found: re.Match[str]) -> str:
        return f"<!-- performance: {found[1]} -->\n{performance.table(found[1], performance.committed())}\n<!-- end -->"

    def loose(found: re.Match[str]) -> str:
        return f"<!-- loose bound -->\n{loose_bound.table()}\n<!-- end -->"

    def byzantine_(found: re.Match[str]) -> str:
        return f"<!-- byzantine -->\n{byzantine.table()}\n<!-- end -->"

    def scaled(found: re.Match[str]) -> str:
        told = json.loads((HERE / "results" / "scale.json").read_text())
        return f"<!-- scale -->\n{scale.table(told)}\n<!-- end -->"

    def hardware(found: re.Match[str]) -> str:
        return f"<!-- hardware: performance -->{performance.hardware(performance.committed())}<!-- end -->"

    def weighed(found: re.Match[str]) -> str:
        return f"<!-- wire: {found[1]} -->\n{messages.table(found[1])}\n<!-- end -->"

    def flower(found: re.Match[str]) -> str:
        shown = getattr(flower_table, f"{found[1]}_table")
        return f"<!-- flower: {found[1]} -->\n{shown()}\n<!-- end -->"

    text = re.sub(r"<!-- flower: (\w+) -->\n.*?<!-- end -->", flower, text, flags=re.S)
    text = re.sub(r"<!-- wire: (\w+) -->\n?.*?<!-- end -->", weighed, text, flags=re.S)
    text = re.sub(r"<!-- performance: (\w+) -->\n.*?<!-- end -->", performed, text, flags=re.S)
    text = re.sub(r"<!-- hardware: performance -->.*?<!-- end -->", hardware, text, flags=re.S)
    text = re.sub(r"<!-- node -->.*?<!-- end -->", lambda _: f"<!-- node -->{node_cost.sentence()}<!-- end -->", text)
    text = re.sub(r"<!-- scale -->\n.*?<!-- end -->", scaled, text, flags=re.S)
    text = re.sub(r"<!-- loose bound -->\n.*?<!-- end -->", loose, text, flags=re.S)
    text = re.sub(r"<!-- byzantine -->\n.*?<!-- end -->", byzantine_, text, flags=re.S)
    text = re.sub(r"<!-- sweep: (\w+) -->.*?<!-- end -->", sweep, text)

    def differs(found: re.Match[str]) -> str:
        return f"<!-- mismatch: {found[1]} {found[2]} -->{collect.mismatch(found[1], int(found[2]))}<!-- end -->"

    text = re.sub(r"<!-- mismatch: (\S+) (\d+) -->.*?<!-- end -->", differs, text, flags=re.S)
    text = re.sub(r"<!-- reached: (\S+) (\d+) -->.*?<!-- end -->", reached, text, flags=re.S)
    text = re.sub(r"<!-- reproduced: (\w+) -->\n.*?<!-- end -->", reproduced, text, flags=re.S)
    digits = {task: json.loads((HERE / "results" / f"{task}.json").read_text()) for task in ("digits", "digits05")}
    text = re.sub(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", card, text, flags=re.S)
    text = re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", tabled, text, flags=re.S)
    return re.sub(r"<!-- round: (\w+) -->.*?<!-- end -->", figure, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    picture.main()

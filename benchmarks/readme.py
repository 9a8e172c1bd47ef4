"""Write committed results into the marked places of README and docs, and draw rounds.png; a test holds pages equal."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import authors
import byzantine
import choice
import flower_table
import generation
import gpu
import gpu_cost
import loose_bound
import lora
import messages_table as messages
import modes
import node_cost
import pack
import performance
import perplexity
import picture
import precision
import private_table
import regression
import scale
import settings
import sparselab_peer
import tokens
import topk
import whole_round
from accuracy import LABELS, card_line, table

from fedsieve.recipes.papers.parts import PaperPart, find_part
from fedsieve.report.paper_tables import (
    all_results,
    count_results,
    counts_in_words,
    paper_table,
    read_causes,
    results_summary,
)
from fedsieve.runs.reproduction.results import RowResult

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = (ROOT / "README.md", *sorted(p for part in ("docs", "reproductions") for p in (ROOT / part).rglob("*.md")))


@cache
def reproduced_results() -> tuple[dict[PaperPart, list[RowResult]], dict[str, str]]:
    """Return what is kept of the papers' rows, and the sentences of cause."""
    return all_results(ROOT / "reproductions"), read_causes(ROOT / "reproductions")


def filled(text: str) -> str:
    """Return a page with every marked place holding what the results say."""
    overhead = json.loads((HERE / "results" / "round.json").read_text())

    def tabled(match: re.Match[str]) -> str:
        results = json.loads((HERE / "results" / f"{match[1]}.json").read_text())
        return f"<!-- table: {match[1]} -->\n{table(results)}\n<!-- end -->"

    def figure(match: re.Match[str]) -> str:
        value = overhead[match[1]]
        text = value if isinstance(value, str) else f"{value:.1f}" if value < 100 else f"{value:.0f}"
        return f"<!-- round: {match[1]} -->{text}<!-- end -->"

    def card(match: re.Match[str]) -> str:
        if match[1] == "hetlora":
            return f"<!-- measured: hetlora -->\n{lora.card_line()}\n<!-- end -->"
        if match[1] == "private":
            return f"<!-- measured: private -->\n{private_table.table()}\n<!-- end -->"
        lines = [card_line(results, match[1]) for task, results in digits.items() if match[1] in LABELS[task]]
        return f"<!-- measured: {match[1]} -->\n{chr(10).join(lines)}\n<!-- end -->"

    def reproduced(match: re.Match[str]) -> str:
        results, causes = reproduced_results()
        if match[1] == "summary":
            text = results_summary(results, "md", causes)
        else:
            part = find_part(*match[1].split("_"))
            text = paper_table(part, results[part], "md", causes)
        return f"<!-- reproduced: {match[1]} -->\n{text.strip()}\n<!-- end -->"

    def counted(match: re.Match[str]) -> str:
        results, causes = reproduced_results()
        rows = [row for part, rows in results.items() if match[1] in (part.paper, "all") for row in rows]
        return f"<!-- counted: {match[1]} -->{counts_in_words(count_results(rows, causes))}<!-- end -->"

    def sweep(match: re.Match[str]) -> str:
        results = json.loads((HERE / "results" / "sweep.json").read_text())
        return f"<!-- sweep: {match[1]} -->{results[match[1]]:.0f}<!-- end -->"

    def performed(match: re.Match[str]) -> str:
        return f"<!-- performance: {match[1]} -->\n{performance.table(match[1], performance.committed())}\n<!-- end -->"

    def loose(match: re.Match[str]) -> str:
        return f"<!-- loose bound -->\n{loose_bound.table()}\n<!-- end -->"

    def authors_(match: re.Match[str]) -> str:
        return f"<!-- authors -->\n{authors.table()}\n<!-- end -->"

    def byzantine_(match: re.Match[str]) -> str:
        return f"<!-- byzantine -->\n{byzantine.table()}\n<!-- end -->"

    def scaled(match: re.Match[str]) -> str:
        results = json.loads((HERE / "results" / "scale.json").read_text())
        return f"<!-- scale -->\n{scale.table(results)}\n<!-- end -->"

    def selected(match: re.Match[str]) -> str:
        return f"<!-- topk -->\n{topk.table()}\n<!-- end -->"

    def chosen(match: re.Match[str]) -> str:
        return f"<!-- settings -->\n{settings.table()}\n<!-- end -->"

    def fine_tuned(match: re.Match[str]) -> str:
        return f"<!-- lora -->\n{lora.table()}\n<!-- end -->"

    def choice_(match: re.Match[str]) -> str:
        return f"<!-- choice -->\n{choice.table()}\n<!-- end -->"

    def layers(match: re.Match[str]) -> str:
        return f"<!-- layers -->\n{choice.layers_table()}\n<!-- end -->"

    def language(match: re.Match[str]) -> str:
        return f"<!-- perplexity -->\n{perplexity.table()}\n<!-- end -->"

    def tokens_(match: re.Match[str]) -> str:
        of = {"steps": tokens.table, "memory": tokens.memory_table, "hardware": tokens.circumstances}[match[1]]
        return f"<!-- tokens: {match[1]} -->\n{of()}\n<!-- end -->"

    def generation_(match: re.Match[str]) -> str:
        return f"<!-- generation -->\n{generation.table()}\n\n{generation.circumstances()}.\n<!-- end -->"

    def sparselab(match: re.Match[str]) -> str:
        table = f"{sparselab_peer.table()}\n\n{sparselab_peer.circumstances()}"
        return f"<!-- sparselab -->\n{table}\n<!-- end -->"

    def moded(match: re.Match[str]) -> str:
        return f"<!-- modes -->\n{modes.table(json.loads(modes.RESULTS.read_text()))}\n<!-- end -->"

    def whole(match: re.Match[str]) -> str:
        return f"<!-- whole round -->\n{whole_round.table()}\n<!-- end -->"

    def clocked(match: re.Match[str]) -> str:
        return f"<!-- rounds by the clock -->\n{whole_round.clock_table()}\n<!-- end -->"

    def multiplied(match: re.Match[str]) -> str:
        return f"<!-- precision -->\n{precision.table()}\n<!-- end -->"

    def regressed(match: re.Match[str]) -> str:
        return f"<!-- regression -->\n{regression.table()}\n<!-- end -->"

    def hardware(match: re.Match[str]) -> str:
        return f"<!-- hardware: performance -->{performance.hardware(performance.committed())}<!-- end -->"

    def weighed(match: re.Match[str]) -> str:
        return f"<!-- wire: {match[1]} -->\n{messages.table(match[1])}\n<!-- end -->"

    def computed(match: re.Match[str]) -> str:
        return f"<!-- computed: {match[1]} -->\n{gpu_cost.table(match[1])}\n<!-- end -->"

    def packed(match: re.Match[str]) -> str:
        return f"<!-- packed: {match[1]} -->\n{pack.table(match[1])}\n<!-- end -->"

    def flower(match: re.Match[str]) -> str:
        table_of = getattr(flower_table, f"{match[1]}_table")
        return f"<!-- flower: {match[1]} -->\n{table_of()}\n<!-- end -->"

    text = re.sub(r"<!-- flower: (\w+) -->\n.*?<!-- end -->", flower, text, flags=re.S)
    text = re.sub(r"<!-- computed: (\w+) -->\n?.*?<!-- end -->", computed, text, flags=re.S)
    text = re.sub(
        r"<!-- gpu -->\n.*?<!-- end -->", lambda _: f"<!-- gpu -->\n{gpu.committed()}\n<!-- end -->", text, flags=re.S
    )
    text = re.sub(r"<!-- packed: (\w+) -->\n?.*?<!-- end -->", packed, text, flags=re.S)
    text = re.sub(r"<!-- wire: (\w+) -->\n?.*?<!-- end -->", weighed, text, flags=re.S)
    text = re.sub(r"<!-- performance: (\w+) -->\n.*?<!-- end -->", performed, text, flags=re.S)
    text = re.sub(r"<!-- hardware: performance -->.*?<!-- end -->", hardware, text, flags=re.S)
    text = re.sub(r"<!-- node -->.*?<!-- end -->", lambda _: f"<!-- node -->{node_cost.sentence()}<!-- end -->", text)
    text = re.sub(r"<!-- scale -->\n.*?<!-- end -->", scaled, text, flags=re.S)
    text = re.sub(r"<!-- loose bound -->\n.*?<!-- end -->", loose, text, flags=re.S)
    text = re.sub(r"<!-- authors -->\n.*?<!-- end -->", authors_, text, flags=re.S)
    text = re.sub(r"<!-- byzantine -->\n.*?<!-- end -->", byzantine_, text, flags=re.S)
    text = re.sub(r"<!-- topk -->\n.*?<!-- end -->", selected, text, flags=re.S)
    text = re.sub(
        r"<!-- lora -->\n.*?<!-- end -->", lambda _: f"<!-- lora -->\n{lora.table()}\n<!-- end -->", text, flags=re.S
    )
    text = re.sub(r"<!-- sparselab -->\n.*?<!-- end -->", sparselab, text, flags=re.S)
    text = re.sub(r"<!-- generation -->\n.*?<!-- end -->", generation_, text, flags=re.S)
    text = re.sub(r"<!-- tokens: (\w+) -->\n.*?<!-- end -->", tokens_, text, flags=re.S)
    text = re.sub(r"<!-- modes -->\n.*?<!-- end -->", moded, text, flags=re.S)
    text = re.sub(r"<!-- whole round -->\n.*?<!-- end -->", whole, text, flags=re.S)
    text = re.sub(r"<!-- rounds by the clock -->\n.*?<!-- end -->", clocked, text, flags=re.S)
    text = re.sub(r"<!-- layers -->\n.*?<!-- end -->", layers, text, flags=re.S)
    text = re.sub(r"<!-- choice -->\n.*?<!-- end -->", choice_, text, flags=re.S)
    text = re.sub(r"<!-- perplexity -->\n.*?<!-- end -->", language, text, flags=re.S)
    text = re.sub(r"<!-- settings -->\n.*?<!-- end -->", chosen, text, flags=re.S)
    text = re.sub(r"<!-- precision -->\n.*?<!-- end -->", multiplied, text, flags=re.S)
    text = re.sub(r"<!-- regression -->\n.*?<!-- end -->", regressed, text, flags=re.S)
    text = re.sub(r"<!-- sweep: (\w+) -->.*?<!-- end -->", sweep, text)

    text = re.sub(r"<!-- counted: (\w+) -->.*?<!-- end -->", counted, text, flags=re.S)
    text = re.sub(r"<!-- reproduced: (\w+) -->\n.*?<!-- end -->", reproduced, text, flags=re.S)
    digits = {task: json.loads((HERE / "results" / f"{task}.json").read_text()) for task in ("digits", "digits05")}
    text = re.sub(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", card, text, flags=re.S)
    text = re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", tabled, text, flags=re.S)
    return re.sub(r"<!-- round: (\w+) -->.*?<!-- end -->", figure, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    picture.main()

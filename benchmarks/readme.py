"""Write committed results into the marked places of README and docs, and draw rounds.png; a test holds pages equal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import adapters
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


def method_line(method: str) -> str:
    """Return what a method's card says."""
    if method == "hetlora":
        return lora.card_line()
    if method == "private":
        return private_table.table()
    tasks = [task for task in ("digits", "digits05") if method in LABELS[task]]
    return "\n".join(card_line(read(task), method) for task in tasks)


def paper_cells(part: str) -> str:
    """Return a paper's table with ours in its cells, or ("summary") how many cells there are."""
    results, causes = reproduced_results()
    if part == "summary":
        return results_summary(results, "md", causes).strip()
    own = find_part(*part.split("_"))
    return paper_table(own, results[own], "md", causes).strip()


def count_line(paper: str) -> str:
    """Return how many numbers of a paper, or of all, are filled, in words."""
    results, causes = reproduced_results()
    rows = [row for part, rows in results.items() if paper in (part.paper, "all") for row in rows]
    return counts_in_words(count_results(rows, causes))


def figure(name: str) -> str:
    """Return a number of benchmarks/round.py."""
    value = read("round")[name]
    return value if isinstance(value, str) else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def read(name: str) -> Any:
    """Return committed results."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


TOKENS = {"steps": tokens.table, "memory": tokens.memory_table, "hardware": tokens.circumstances}
PLACES: dict[str, Callable[[str], str]] = {
    "adapters": lambda _: adapters.table(),
    "authors": lambda _: authors.table(),
    "byzantine": lambda _: byzantine.table(),
    "choice": lambda _: choice.table(),
    "computed": gpu_cost.table,
    "counted": count_line,
    "flower": lambda name: getattr(flower_table, f"{name}_table")(),
    "generation": lambda _: f"{generation.table()}\n\n{generation.circumstances()}.",
    "gpu": lambda _: gpu.committed(),
    "hardware": lambda _: performance.hardware(performance.committed()),
    "layers": lambda _: choice.layers_table(),
    "loose bound": lambda _: loose_bound.table(),
    "lora": lambda _: lora.table(),
    "measured": method_line,
    "modes": lambda _: modes.table(read("modes")),
    "node": lambda _: node_cost.sentence(),
    "packed": pack.table,
    "performance": lambda name: performance.table(name, performance.committed()),
    "perplexity": lambda _: perplexity.table(),
    "precision": lambda _: precision.table(),
    "regression": lambda _: regression.table(),
    "reproduced": paper_cells,
    "round": figure,
    "rounds by the clock": lambda _: whole_round.clock_table(),
    "scale": lambda _: scale.table(read("scale")),
    "settings": lambda _: settings.table(),
    "sparselab": lambda _: f"{sparselab_peer.table()}\n\n{sparselab_peer.circumstances()}.",
    "sweep": lambda name: f"{read('sweep')[name]:.0f}",
    "table": lambda task: table(read(task)),
    "tokens": lambda name: TOKENS[name](),
    "topk": lambda _: topk.table(),
    "whole round": lambda _: whole_round.table(),
    "wire": messages.table,
}
"""What stands in a place marked ``<!-- name: argument -->``, by its name."""
PLACE = re.compile(rf"<!-- ({'|'.join(PLACES)})(?:: (\w+))? -->(\n?).*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with every marked place holding what the results say."""

    def of(match: re.Match[str]) -> str:
        name, argument, line = match.groups()
        mark = f"<!-- {name}: {argument} -->" if argument else f"<!-- {name} -->"
        return f"{mark}{line}{PLACES[name](argument)}{line}<!-- end -->"

    return PLACE.sub(of, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    picture.main()

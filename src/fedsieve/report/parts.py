"""What the parts of the page share: escaped text, samples of looks, legends, tables, and the script that sorts them."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape

from fedsieve.report.configurations import Configuration, kind
from fedsieve.report.svg import legend_list, swatch

LISTED = 6
"""So many configurations are named where some of them are meant."""
NONE = "<span class=soft>–</span>"
SORT = """
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => {
    const data = row.cells[i].querySelector("data");
    return data ? Number(data.value) : heads[i].className ? NaN : row.cells[i].textContent.trim();
  };
  const order = (a, b) =>
    typeof a === "string" ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const now = head.getAttribute("aria-sort");
      const up = now ? now === "descending" : !head.className;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((one, two) => {
        const a = key(one, i), b = key(two, i), lacking = (a !== a) - (b !== b);
        return lacking || a !== a ? lacking : up ? order(a, b) : order(b, a);
      }));
    };
  });
}
"""
"""Numbers from the largest on, names from the first letter on; a second click turns that round. What lacks is last."""
ALLOWED = f"sha256-{base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()}"
"""What the page's policy knows the script by."""


def section(title: str, inner: str) -> str:
    """Return a part of the page under its title; nothing without content."""
    return f"<section><h2>{title}</h2>\n{inner}\n</section>\n" if inner else ""


def soft(text: str) -> str:
    """Return the text escaped, with places to break a line after what joins a name's parts."""
    return re.sub(r"(?<=[_=/])(?=\w)|(?<=\.)(?=[^\W\d])", "<wbr>", escape(text))


def sample(where: str, look: int | None) -> str:
    """Return a line as the plots draw it; ``where`` it stands makes it unique."""
    return f"<span class=swatch>{swatch(f'{where}{look}', look)}</span>"


def legend(where: str, every: Sequence[Configuration]) -> str:
    """Return a sample and the label of each configuration."""
    return legend_list([f"{sample(where, one.look)}<span>{soft(one.label)}</span>" for one in every])


def whose(some: Sequence[Configuration], every: Sequence[Configuration]) -> str:
    """Return which configurations are meant: all, all of a method, or by their labels, as far as there is room."""
    if len(some) == len(every):
        return "all"
    many = {name: sum(kind(one.runs[0]) == name for one in every) for name in {kind(one.runs[0]) for one in some}}
    own = {name: [one.label for one in some if kind(one.runs[0]) == name] for name in dict.fromkeys(
        kind(one.runs[0]) for one in some)}  # fmt: skip
    said = [
        text
        for name, labels in own.items()
        for text in ([f"{name} (all {len(labels)})"] if 1 < len(labels) == many[name] else labels)
    ]
    return "; ".join([*said[:LISTED], *([f"and {len(said) - LISTED} more"] if len(said) > LISTED else [])])


def wide(table: str, kind: str) -> str:
    """Return a table that scrolls by itself where it is wider than the page."""
    return f'<div class=wide tabindex=0 role=region aria-label="Table"><table class="{kind}">{table}</table></div>\n'


def folded(title: str, inner: str, number: int | None = None) -> str:
    """Return what is read only by who opens it."""
    many = "" if number is None else f" <small>({number})</small>"
    return f"<details><summary>{title}{many}</summary>\n{inner}</details>\n"

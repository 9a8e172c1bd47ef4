"""Draw docs/images/rounds.png from committed results: how many times as fast whole rounds are, and their steps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import whole_round
from matplotlib.figure import Figure

PICTURE = Path(__file__).parent.parent / "docs/images/rounds.png"
ROUND, STEP = "#0072b2", "#a6cee3"


def ratios(rows: Iterable[whole_round.Row]) -> list[tuple[str, float, float]]:
    """Return (label, ratio of a whole round, ratio of its training step) of each recipe: PyTorch's time over ours."""
    return [(label(row.recipe), row.dense / row.kernels, row.dense_step / row.kernels_step) for row in rows]


def label(recipe: str) -> str:
    """Return a recipe with how sparse it is."""
    setting = next((word for word in whole_round.CASES[recipe] if word.startswith("method.")), "")
    name, _, value = setting.removeprefix("method.").partition("=")
    zeros = {"density": lambda d: 1 - d, "sparsity": lambda s: s}
    return f"{recipe}, {100 * zeros[name](float(value)):g} % zeros" if name in zeros else f"{recipe}, dense"


def main() -> None:
    """Draw the picture."""
    rows = [whole_round.Row(**row) for row in json.loads(whole_round.RESULTS.read_text())["rows"]]
    labels, whole, steps = zip(*reversed(ratios(rows)), strict=True)
    figure = Figure(figsize=(7.2, 0.62 * len(rows) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    for values, colour, shift, name in (
        (whole, ROUND, 0.2, "a whole round, tested"),
        (steps, STEP, -0.2, "its training step"),
    ):
        places = [place + shift for place in range(len(labels))]
        patches = axes.barh(places, values, 0.36, color=colour, label=name)
        axes.bar_label(patches, [f"{value:.1f}x" for value in values], padding=4)
    axes.axvline(1, color="#4d4d4d", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="times as fast as dense PyTorch, one thread")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.savefig(PICTURE, dpi=160)


if __name__ == "__main__":
    main()

"""Draw docs/images/step.png from committed results: what a training step takes, dense and sparse: readme.py's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import performance
from matplotlib.figure import Figure

PICTURE = Path(__file__).parent.parent / "docs/images/step.png"
DENSE, SPARSE = "#4d4d4d", "#0072b2"


def bars(rows: Iterable[dict[str, Any]]) -> list[tuple[str, float, str, str]]:
    """Return (label, ms, ratio, colour) of the first table's steps: the fastest dense ones, then the sparse ones.

    Ratios are the table's, each between times of one measurement.
    """
    frozen = sorted((row for row in rows if row["table"] == "frozen"), key=lambda row: row["case"]["sparsity"])
    dense = [
        (label, min(row[key] for row in frozen), "", DENSE)
        for label, key in (("PyTorch, dense fp32", "ms_dense_fp32"), ("PyTorch, bf16 autocast", "ms_dense_bf16"))
    ]
    return dense + [
        (
            f"FedSieve, fp32, {100 * row['case']['sparsity']:g} % zeros",
            row["ms_sparse"],
            performance.shown(row, "ratio_fp32"),
            SPARSE,
        )
        for row in frozen
    ]


def main() -> None:
    """Draw the picture."""
    labels, values, ratios, colours = zip(*reversed(bars(performance.committed())), strict=True)
    figure = Figure(figsize=(7.2, 2.3), layout="constrained")
    axes = figure.add_subplot()
    patches = axes.barh(labels, values, color=colours, height=0.66)
    axes.bar_label(patches, ratios, padding=4)
    axes.set(xlabel="a training step of ResNet-18, batch 16, two cores: milliseconds")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(PICTURE, dpi=160)


if __name__ == "__main__":
    main()

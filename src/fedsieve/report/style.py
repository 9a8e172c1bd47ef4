"""What every plot shares: its palette, matplotlib's settings, and the looks of its lines.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart. The looks of lines are numbered: the
first seven differ in colour and marker, the next seven in dash and marker too, and so on, 196 of them all different.
"""

from __future__ import annotations

from typing import Any

PALETTE = {  # name: (light, dark)
    "ink": ("#1c2126", "#e4e7ea"),
    "soft": ("#59626b", "#a3acb5"),
    "rule": ("#d9dde1", "#363d44"),
    "page": ("#ffffff", "#15191d"),
    "tint": ("#f5f7f8", "#1d2328"),
    "mark": ("#fff3d6", "#3d3318"),
    "run0": ("#0072b2", "#56b4e9"),
    "run1": ("#d55e00", "#e8762b"),
    "run2": ("#009e73", "#1fb98d"),
    "run3": ("#cc79a7", "#d98fb8"),
    "run4": ("#e69f00", "#f0b429"),
    "run5": ("#56b4e9", "#f0e442"),
    "run6": ("#4d4d4d", "#c4c4c4"),
}
"""Light ones are told apart by their hex code in the SVG, so all differ."""
INK, SOFT, RULE = (PALETTE[name][0] for name in ("ink", "soft", "rule"))
MARKERS = "os^DvPX"
COLOURS = 7
DASHES = ("-", "--", "-.", (0, (1, 1.2)))

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsieve",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11.5 * 0.72,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": SOFT,
    "axes.titlesize": 11.5 * 0.72,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.left": False,
    "lines.linewidth": 1.5,
}
"""Of a plot on the page; the settings of ``PAPER`` come on top of it in a figure's file."""

PAPER: dict[Any, Any] = {
    **RC,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.spines.left": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.left": True,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.labelspacing": 0.25,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0.2,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "savefig.dpi": 300,
}


def palette_css() -> str:
    """Return the CSS variables of the palette, light, and dark for a reader who prefers it (never on paper)."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in PALETTE.items()) for i in (0, 1))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"

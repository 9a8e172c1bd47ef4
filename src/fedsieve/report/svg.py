"""How the report looks: its style sheet, and its plots as inline SVG.

A plot is drawn with the light colours of the palette, and each colour is then replaced by a CSS variable: one picture
serves light and dark pages. Text stays text in the page's own font. The same input gives the same bytes: ids are
salted hashes, made unique in the page by the plot's name.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedsieve.report.style import PALETTE, RC, Axis, Bits, Line, map_bits, plot, style

MANY = 7
SIZE = (4.6, 2.9)
"""Inches at 100 px: small enough that a phone does not shrink the text much."""


def chart(name: str, lines: Sequence[Line], x: Axis, y: Axis, says: str) -> str:
    """Return a plot of ``lines`` as inline SVG; ``says`` is what a screen reader reads."""
    with mpl.rc_context(RC):
        figure, axes = _blank(SIZE)
        plot(axes, lines, x, y)
        axes.set_xlabel(x.name)
        axes.set_title(y.name)
        return _svg(figure, name, says)


def bits(name: str, shown: Bits, says: str) -> str:
    """Return a map of what is present as inline SVG."""
    with mpl.rc_context({**RC, "axes.grid": False}):
        figure, axes = _blank(SIZE)
        map_bits(axes, shown)
        axes.set_title(shown.y)
        return _svg(figure, name, says)


def heat(name: str, classes: Sequence[str], counts: NDArray[np.float64], clients: int, x_name: str, says: str) -> str:
    """Return a heat map of ``counts`` [columns, classes] as inline SVG, its columns spread over ``clients``."""
    with mpl.rc_context({**RC, "axes.grid": False}):
        figure, axes = _blank((SIZE[0], SIZE[1] if len(classes) <= 20 else 1.6 * SIZE[1]))
        look: dict[str, Any] = {"aspect": "auto", "interpolation": "none", "cmap": "Blues"}
        norm = PowerNorm(0.5, 0, max(1.0, float(counts.max())))
        axes.imshow(counts.T, norm=norm, extent=(-0.5, clients - 0.5, len(classes) - 0.5, -0.5), **look)
        step = math.ceil(len(classes) / 22)
        shown = range(0, len(classes), step)
        axes.set_yticks(list(shown), [_short(classes[i]) for i in shown])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set_xlabel(x_name)
        axes.set_title("class", y=1.035, pad=0)
        _key(axes, norm, look)
        return _svg(figure, name, says)


def swatch(name: str, run: int | None, level: bool = False) -> str:
    """Return the sample of a line for a legend, drawn as the plots draw it; it says nothing to a screen reader."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(0.3, 0.12), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        axes.plot(
            [0.1, 1, 1.9],
            [0, 0, 0],
            **{**style(Line([], [], run), (run or 0) + 1), "markevery": [1] * (not level)},
        )
        return _svg(figure, name, "")


def legend_list(items: Sequence[str]) -> str:
    """Return samples with their labels side by side, in columns where they are many."""
    kind = "legend many" if len(items) > MANY else "legend"
    return f"<ul class='{kind}'>{''.join(f'<li>{item}</li>' for item in items)}</ul>\n"


def palette_css() -> str:
    """Return the CSS variables of the palette, light, and dark for a reader who prefers it (never on paper)."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in PALETTE.items()) for i in (0, 1))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _blank(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def _key(axes: Axes, norm: PowerNorm, look: dict[str, Any]) -> None:
    """Draw what the colours of a heat map stand for, above its right half."""
    top = norm.vmax or 1
    key = axes.inset_axes((0.6, 1.04, 0.4, 0.03))
    key.imshow(np.linspace(0, top, 256)[None], norm=norm, extent=(0, top, 0, 1), **look)
    key.set_yticks([0.5], ["examples"])
    key.tick_params("y", length=0)
    key.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    key.xaxis.tick_top()


def _short(text: str) -> str:
    return text if len(text) <= 12 else text[:11] + "…"


def _svg(figure: Figure, name: str, says: str) -> str:
    """Return the figure as an element of the page: no outside names, unique ids, colours and font left to the page."""
    raw = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text, and has the glyph
        figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None})
    svg = raw.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|defs)>.*?</\1>", "", svg, count=2, flags=re.S)  # the second is a style for every tag
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, (light, _) in PALETTE.items():
        svg = svg.replace(f": {light}", f": var(--{colour})")
    spoken = f'role="img" aria-label="{escape(says)}"' if says else 'aria-hidden="true"'
    return svg.replace("<svg", f"<svg {spoken}", 1).strip()


STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:3rem 0 .75rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:0 0 .25rem}
p{margin:.25rem 0;max-width:75ch}
.soft,small{color:var(--soft)}
small{font-size:.8125rem}
svg{max-width:100%;height:auto;font-family:inherit;stroke-linejoin:round}
.swatch{flex:none}
.swatch svg{width:1.9rem;height:.75rem;vertical-align:baseline;flex:none}
ul{list-style:none;margin:0;padding:0}
.runs{margin-top:1.5rem;border-top:1px solid var(--rule)}
.runs li{display:flex;flex-wrap:wrap;align-items:baseline;gap:.1rem .9rem;padding:.5rem 0;
border-bottom:1px solid var(--rule)}
.runs li:last-child{border:0}
.runs li>*{overflow-wrap:anywhere}
.runs .state{margin-left:auto;white-space:nowrap}
.named{display:flex;align-items:baseline;gap:.4rem}
.going{font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:2.25rem 2.5rem}
figure{margin:0;min-width:0;break-inside:avoid}
figure svg[role=img]{display:block;width:100%}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.15rem 0 .5rem;font-size:.8125rem}
.legend li{display:flex;align-items:baseline;gap:.35rem;overflow-wrap:anywhere}
.many{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr))}
.paper{margin:0 0 2.75rem}
.paper h4{font-size:.875rem;margin:.5rem 0 .1rem}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:.75rem 2rem;
align-items:end;max-width:75rem}
.panels>div:only-child{max-width:36rem}
figcaption{font-size:.875rem;color:var(--soft)}
.map{margin:0 0 2rem;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:.75rem 2.5rem}
.wide{overflow-x:auto;margin:0 -1.25rem;padding:0 1.25rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{text-align:left;vertical-align:top;padding:.5rem .75rem;border-bottom:1px solid var(--rule)}
th{font-weight:600}
thead th{vertical-align:bottom;border-bottom-color:var(--soft)}
tbody th{min-width:10.5rem;max-width:18rem;overflow-wrap:anywhere;background:var(--page);position:sticky;left:0}
.number{text-align:right;white-space:nowrap}
.results td,.results thead th{padding:.5rem .6rem}
.sorts button{all:unset;cursor:pointer;text-decoration:underline dotted var(--soft);text-underline-offset:.25em}
.sorts button:focus-visible{outline:2px solid var(--run0)}
.sorts [aria-sort=ascending] button::before{content:"↑ "}
.sorts [aria-sort=descending] button::before{content:"↓ "}
td small,th small{display:block;font-weight:400;font-size:.93em}
.fields td,.fields th{padding:.3rem .75rem}
.fields td{overflow-wrap:anywhere;min-width:6rem}
.fields tbody th{font-weight:400}
tr.differs td{background:var(--mark)}
details{margin:1rem 0}
summary{cursor:pointer;padding:.25rem 0}
@media screen and (prefers-color-scheme:dark){figure image{filter:invert(1) hue-rotate(180deg)}}
@media(min-width:60rem){.runs{display:grid;grid-template-columns:auto repeat(2,minmax(0,auto)) repeat(3,auto) 1fr}
.runs li{display:grid;grid-column:1/-1;grid-template-columns:subgrid;gap:0 1.25rem}.runs .state{text-align:right}}
@media(max-width:40rem){main{padding-top:1.5rem}.runs .state{margin-left:0}tbody th{min-width:6.5rem;max-width:8rem}
.results .swatch{display:none}figure svg{overflow:visible}figure svg text{font-size:13.5px!important}}
@media print{main{max-width:none;padding:0}h2{break-after:avoid}.plots,.map,.panels{grid-template-columns:1fr 1fr}
.wide{overflow:visible}table{font-size:.7rem}th,td{padding:.25rem .35rem}tbody th{position:static}}
"""

"""Plots as inline SVG, by matplotlib, for light and dark pages alike.

A plot is drawn with the light colours of the palette, and each colour is then replaced by a CSS variable. Text stays
text in the page's own font. The same input gives the same bytes: ids are salted hashes, made unique in the page by the
plot's name.
"""

from __future__ import annotations

import io
import re
import warnings
from html import escape

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from fedsieve.report.plots import HeatMap, Line, Plot
from fedsieve.report.style import PALETTE, RC

SIZE = (4.6, 2.9)
"""Inches at 100 px: small enough that a phone does not shrink the text much."""


def inline_svg(plot: Plot, name: str, prefix: str = "") -> Markup:
    """Return a plot as an element of the page: ``name`` makes its ids unique, ``prefix`` begins its description."""
    heat, (width, height) = isinstance(plot, HeatMap), SIZE
    if isinstance(plot, HeatMap) and len(plot.classes) > 20:
        height *= 1.6
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        plot.draw(axes)
        axes.set_xlabel(plot.x.name)
        axes.set_title(plot.y.name, y=1.035 if heat else None, pad=0 if heat else None)
        return _element(figure, name, prefix + plot.description)


def swatch(name: str, look: int | None, level: bool = False) -> Markup:
    """Return the sample of a line for a legend, drawn as the plots draw it; it says nothing to a screen reader."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(0.3, 0.12), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        style = Line([], [], look).style((look or 0) + 1)
        axes.plot([0.1, 1, 1.9], [0, 0, 0], **{**style, "markevery": [1] * (not level)})
        return _element(figure, name, "")


def _element(figure: Figure, name: str, description: str) -> Markup:
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
    spoken = f'role="img" aria-label="{escape(description)}"' if description else 'aria-hidden="true"'
    return Markup(svg.replace("<svg", f"<svg {spoken}", 1).strip())

"""The page as a whole: what its sections show, its plots as inline SVG, and the file that the template makes of it.

A plot is drawn with the light colours of the palette, and each colour is then replaced by a CSS variable. Text stays
text in the page's own font. The same input gives the same bytes: ids are salted hashes, made unique in the page by the
plot's name.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
import warnings
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from fedsieve.data.storage import check_output, write_output
from fedsieve.report.configurations import (
    Configuration,
    deduplicate,
    group_configurations,
    method_name,
    settings_table,
)
from fedsieve.report.figures import paper_figures
from fedsieve.report.partitions import partition_maps
from fedsieve.report.plots import PALETTE, RC, HeatMap, Line, Plot, SizePlot
from fedsieve.report.results import (
    all_finished,
    columns_of,
    privacy_spent,
    progress_text,
    refused_updates,
    result_cells,
)
from fedsieve.report.series import best_first, curves
from fedsieve.runs.record import RunRecord, read_record
from fedsieve.types import InputError

SIZE = (4.6, 2.9)
"""Inches at 100 px: small enough that a phone does not shrink the text much."""


def report(dirs: list[Path], out: Path) -> None:
    """Write one page about the runs in ``dirs`` to ``out``; InputError names what is wrong with either."""
    if not dirs:
        raise InputError("report: no run directory given: name at least one that `fedsieve run` wrote")
    check_output(out, "report.html")
    page = _page(group_configurations(deduplicate([read_record(folder) for folder in dict.fromkeys(dirs)])))
    write_output(out, page.encode(errors="replace"))


def _page(every: list[Configuration]) -> str:
    loader = PackageLoader("fedsieve.report", "assets")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    environment.globals.update(
        svg=inline_svg, swatch=swatch, cells=result_cells, progress=progress_text, finished=all_finished
    )
    asset = {name: Markup(loader.get_source(environment, name)[0]) for name in ("style.css", "sort.js")}
    runs = [run for one in every for run in one.runs]
    plots = curves(every)
    (metric, higher), *_ = runs[0].metrics.items()
    by = next(plot for plot in plots.values() if plot.y.name.startswith(metric))
    return environment.get_template("page.html").render(
        title=_title(every, runs),
        style=Markup(palette_css()) + asset["style.css"],
        script=asset["sort.js"],
        script_hash=base64.b64encode(hashlib.sha256(asset["sort.js"].encode()).digest()).decode(),
        configurations=every,
        several=any(len(one.runs) > 1 for one in every),
        runs=runs,
        columns=columns_of(runs),
        plots=plots,
        best_first=best_first(every, by, higher),
        figures=paper_figures(runs),
        partitions=partition_maps(every),
        refused=refused_updates(every),
        privacy=privacy_spent(every),
        settings=settings_table(every, lambda run: {"recipe": run.recipe} | run.settings | run.declared),
        machines=settings_table(every, lambda run: run.machine),
    )


def _breakable(text: str) -> Markup:
    """Return the text escaped, its hashes short, with places to break a line after what joins a name's parts."""
    return Markup(re.sub(r"(?<=[_=/])(?=\w)|(?<=\.)(?=[^\W\d])", "<wbr>", escape(_short(text))))


def _short(text: str) -> str:
    """Return the text with eight digits of every sha256 in it, by which it names datasets and models of one's own."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", text)


def _title(every: list[Configuration], runs: list[RunRecord]) -> str:
    """Return how many runs there are, and what they have in common of method and dataset."""
    shared = [{method_name(run) for run in runs}, {_short(run.settings.get("task.dataset", "")) for run in runs}]
    method, dataset = (own.pop() if len(own) == 1 else "" for own in shared)
    about = " on ".join(filter(None, [method, dataset])) if method else f"on {dataset}" if dataset else ""
    if len(runs) == 1:
        return about
    many = f"{len(runs)} runs"
    if len(every) < len(runs):
        many += f" of {len(every)} configuration{'s' * (len(every) > 1)}"
    return " ".join(filter(None, [many, about if about.startswith("on ") else about and f"of {about}"]))


def palette_css() -> str:
    """Return the CSS variables of the palette, light, and dark for a reader who prefers it (never on paper)."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in PALETTE.items()) for i in (0, 1))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def inline_svg(plot: Plot, name: str, prefix: str = "") -> Markup:
    """Return a plot as an element of the page: ``name`` makes its ids unique, ``prefix`` begins its description."""
    heat, (width, height) = isinstance(plot, HeatMap), SIZE
    if isinstance(plot, HeatMap) and len(plot.classes) > 20:
        height *= 1.6
    if isinstance(plot, SizePlot):
        height *= 0.6
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
    spoken = f'role="img" aria-label="{html.escape(description)}"' if description else 'aria-hidden="true"'
    return Markup(svg.replace("<svg", f"<svg {spoken}", 1).strip())

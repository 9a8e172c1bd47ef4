"""The papers' figures as a section of the report page: each with its title, legend, plots and caption."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from fedsieve.report.figures import Map, Panel, Picture, pictures
from fedsieve.report.style import Line
from fedsieve.report.svg import MANY, bits, chart, legend_list, swatch
from fedsieve.runs.record import RunRecord


def gallery(runs: list[RunRecord]) -> str:
    """Return those of the papers' figures that ``runs`` have data for; nothing if there are none."""
    return "".join(_figure(picture) for picture in pictures(runs))


def _figure(picture: Picture) -> str:
    name = picture.name
    panels = [_panel(f"{name}-{i}", picture, panel) for i, panel in enumerate(picture.panels)]
    maps = [_map(f"{name}-{i}", picture, shown) for i, shown in enumerate(picture.maps)]
    lines = {label: line for panel in reversed(picture.panels) for label, line in panel.lines.items()}
    legend = _legend(name, lines) if len(lines) > 1 else ""
    plots = f"{legend}<div class=panels>{''.join(panels + maps)}</div>"
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f"<figure class=paper><h3>{escape(picture.title)}</h3>{plots}{caption}</figure>\n"


def _panel(name: str, picture: Picture, panel: Panel) -> str:
    ends = "; ".join(f"{label}: {line.y[0]:.4g} to {line.y[-1]:.4g}" for label, line in panel.lines.items())
    says = f"{picture.title}. {panel.title or panel.x.name}: {panel.y.name}, first to last: {ends}."
    drawn = chart(name, list(panel.lines.values()), panel.x, panel.y, says)
    return f"<div>{_title(panel.title)}{drawn}</div>"


def _map(name: str, picture: Picture, shown: Map) -> str:
    rounds, share = shown.bits.columns, 100 * shown.bits.present.mean()
    span = f"rounds {rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"round {rounds[0]}"
    says = f"{picture.title}. {shown.title}, {span}: {share:.1f} % of what is shown is present."
    return f"<div>{_title(shown.title)}{bits(name, shown.bits, says)}</div>"


def _title(text: str) -> str:
    return f"<h4>{escape(text)}</h4>" if text else ""


def _legend(name: str, lines: Mapping[str, Line]) -> str:
    """Return a sample and the label of each line, in the order of their looks; many are folded."""
    ordered = sorted(lines.items(), key=lambda item: item[1].run or 0)
    samples = [(label, swatch(f"{name}-key{i}", line.run, line.level)) for i, (label, line) in enumerate(ordered)]
    listed = legend_list([f"<span class=swatch>{drawn}</span><span>{escape(label)}</span>" for label, drawn in samples])
    if len(samples) <= MANY:
        return listed
    return f"<details><summary>Legend <small>({len(samples)})</small></summary>{listed}</details>"

"""The page as a whole: what its sections show, and the file that the template makes of it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fedsieve.data.storage import check_output, write_output
from fedsieve.report.configurations import Configuration, deduplicate, group_configurations, method_name
from fedsieve.report.curves import best_first, curves
from fedsieve.report.figures import paper_figures
from fedsieve.report.partitions import partition_maps
from fedsieve.report.remarks import privacy_spent, refused_updates
from fedsieve.report.results import COLUMNS, all_finished, progress_text, result_cells
from fedsieve.report.settings import settings_table
from fedsieve.report.style import palette_css
from fedsieve.report.svg import inline_svg, swatch
from fedsieve.runs.record import RunRecord, read_record
from fedsieve.types import InputError


def report(dirs: list[Path], out: Path) -> None:
    """Write one page about the runs in ``dirs`` to ``out``; InputError names what is wrong with either."""
    if not dirs:
        raise InputError("report: no run directory given: name at least one that `fedsieve run` wrote")
    check_output(out, "report.html")
    page = _page(group_configurations(deduplicate([read_record(folder) for folder in dict.fromkeys(dirs)])))
    write_output(out, page.encode(errors="replace"))


def _page(every: list[Configuration]) -> str:
    environment = Environment(
        loader=PackageLoader("fedsieve.report", "assets"),
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
    asset = {name: _source(environment, name) for name in ("style.css", "sort.js")}
    runs = [run for one in every for run in one.runs]
    plots = curves(every)
    return environment.get_template("page.html").render(
        title=_title(every, runs),
        style=Markup(palette_css()) + asset["style.css"],
        script=asset["sort.js"],
        script_hash=base64.b64encode(hashlib.sha256(asset["sort.js"].encode()).digest()).decode(),
        configurations=every,
        several=any(len(one.runs) > 1 for one in every),
        runs=runs,
        columns=COLUMNS,
        plots=plots,
        best_first=best_first(every, plots["accuracy"]),
        figures=paper_figures(runs),
        partitions=partition_maps(every),
        refused=refused_updates(every),
        privacy=privacy_spent(every),
        settings=settings_table(every, lambda run: {"recipe": run.recipe} | run.settings | run.declared),
        machines=settings_table(every, lambda run: run.machine),
    )


def _source(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _breakable(text: str) -> Markup:
    """Return the text escaped, with places to break a line after what joins a name's parts."""
    return Markup(re.sub(r"(?<=[_=/])(?=\w)|(?<=\.)(?=[^\W\d])", "<wbr>", escape(text)))


def _title(every: list[Configuration], runs: list[RunRecord]) -> str:
    """Return how many runs there are, and what they have in common of method and dataset."""
    shared = [{method_name(run) for run in runs}, {run.settings.get("task.dataset", "") for run in runs}]
    method, dataset = (own.pop() if len(own) == 1 else "" for own in shared)
    about = " on ".join(filter(None, [method, dataset])) if method else f"on {dataset}" if dataset else ""
    if len(runs) == 1:
        return about
    many = f"{len(runs)} runs"
    if len(every) < len(runs):
        many += f" of {len(every)} configuration{'s' * (len(every) > 1)}"
    return " ".join(filter(None, [many, about if about.startswith("on ") else about and f"of {about}"]))

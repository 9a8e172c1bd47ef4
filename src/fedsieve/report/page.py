"""The page as a whole: its head, its sections, and the file that it becomes."""

from __future__ import annotations

from html import escape
from pathlib import Path

from fedsieve.report.configurations import Configuration, configurations, kind, once
from fedsieve.report.curves import curves
from fedsieve.report.fields import fields
from fedsieve.report.gallery import gallery
from fedsieve.report.partitions import partitions
from fedsieve.report.parts import ALLOWED, SORT, folded, sample, section, soft
from fedsieve.report.remarks import privacy, refused
from fedsieve.report.results import results, state
from fedsieve.report.svg import STYLE, palette_css
from fedsieve.runs.output import check_output, write_output
from fedsieve.runs.record import RunRecord, read_record
from fedsieve.types import InputError

HEAD = f"""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none';script-src '{ALLOWED}';\
style-src 'unsafe-inline';img-src data:">
<meta name=viewport content="width=device-width,initial-scale=1">
<meta name=color-scheme content="light dark">
"""
LISTED = 6
"""A list of more configurations is folded: the table of results, right below, has them too."""


def report(dirs: list[Path], out: Path) -> None:
    """Write one page about the runs in ``dirs`` to ``out``; InputError names what is wrong with either."""
    if not dirs:
        raise InputError("report: no run directory given: name at least one that `fedsieve run` wrote")
    check_output(out, "report.html")
    page = _page(configurations(once([read_record(folder) for folder in dict.fromkeys(dirs)])))
    write_output(out, page.encode(errors="replace"))


def _page(every: list[Configuration]) -> str:
    runs = [run for one in every for run in one.runs]
    what = _what(every, runs)
    body = [
        f"<header><h1>FedSieve report</h1><p class=soft>{escape(what)}</p>{_list(every)}</header>",
        section("Results", results(every)),
        section("Round by round", curves(every)),
        section("The papers’ figures", gallery(runs)),
        section("Who holds what", partitions(every)),
        section("Refused updates", refused(every)),
        section("Privacy", privacy(every)),
        section("Settings", fields(every, lambda run: {"recipe": run.recipe} | run.settings | run.declared)),
        section("Machines and versions", fields(every, lambda run: run.machine)),
    ]
    title = f"<title>FedSieve report: {escape(what)}</title>\n<style>\n{palette_css()}{STYLE}</style>\n</head>\n"
    script = f"<script>{SORT}</script>\n" if len(runs) > 1 else ""
    return f"{HEAD}{title}<body>\n<main>\n{''.join(body)}</main>\n{script}</body>\n</html>\n"


def _what(every: list[Configuration], runs: list[RunRecord]) -> str:
    """Return how many runs there are, and what they have in common of method and dataset."""
    shared = [{kind(run) for run in runs}, {run.settings.get("task.dataset", "") for run in runs}]
    method, dataset = (own.pop() if len(own) == 1 else "" for own in shared)
    about = " on ".join(filter(None, [method, dataset])) if method else f"on {dataset}" if dataset else ""
    if len(runs) == 1:
        return about
    many = (
        f"{len(runs)} runs"
        if len(every) == len(runs)
        else f"{len(runs)} runs of {len(every)} configuration{'s' * (len(every) > 1)}"
    )
    return " ".join(filter(None, [many, about if about.startswith("on ") else about and f"of {about}"]))


def _list(every: list[Configuration]) -> str:
    lines = f"<ul class=runs>\n{''.join(map(_line, every))}</ul>"
    return lines if len(every) <= LISTED else folded("Configurations", lines, len(every))


def _line(one: Configuration) -> str:
    run = one.runs[0]
    task = ", ".join(run.settings[f"task.{key}"] for key in ("dataset", "partition") if f"task.{key}" in run.settings)
    seeds = ", ".join(own.settings.get("seed", "–") for own in one.runs)
    where = run.folder.name if len(one.runs) == 1 else f"{len(one.runs)} runs"
    about = (run.method, task, f"seed{'s' * (len(one.runs) > 1)} {seeds}", where)
    cells = "".join(f"<span class=soft>{soft(text)}</span>" for text in about if text)
    return f"<li>{sample('list', one.look)}<strong>{soft(one.label)}</strong>{cells}{state(one.runs)}</li>\n"

"""One page about one or several runs: what they reached, what they sent, and how they were set.

The page is a single file that opens offline: no script, nothing fetched (its own policy forbids both), plots inline.
It is made from run directories alone, finished or not, and holds no date of its own: the same runs, the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsieve.drawing import Axis, Line
from fedsieve.figures import STYLE, chart, heat, palette_css, swatch
from fedsieve.gallery import gallery
from fedsieve.output import check_place, save
from fedsieve.privacy import EPSILON, REHEARSED
from fedsieve.recorded import Recorded, labelled, number, read
from fedsieve.types import InputError
from fedsieve.units import count, duration, megabytes, milliseconds, percent, size, three, times

NONE = "<span class=soft>–</span>"
HEAD = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none';style-src 'unsafe-inline';img-src data:">
<meta name=viewport content="width=device-width,initial-scale=1">
<meta name=color-scheme content="light dark">
"""
NOTE = """Bytes are those of the encoded messages, as counted; 1 MB is 10<sup>6</sup> bytes. Dense is what plain
federated averaging of the same model costs in the same rounds. A factor is the reference over the measured value. A
step is a client's, with what goes before and after its steps; sparse is by the kernels, dense by PyTorch. Below, if it
was measured at the end of the run: one step each way, alone, and the peak memory of a process that takes it."""

ABOUT_NOISE = {
    EPSILON: "",
    REHEARSED: " – of a rehearsal: the noise came from the run\u2019s seed, and whoever has run.json can subtract it. "
    "With method.secret=true it would hold",
}
"""What is said after an epsilon, by its column."""


def report(dirs: list[Path], out: Path) -> None:
    """Write one page about the runs in ``dirs`` to ``out``; InputError names what is wrong with either."""
    if not dirs:
        raise InputError("report: no run directory given: name at least one that `fedsieve run` wrote")
    check_place(out, "report.html")
    page = _page(labelled([read(folder) for folder in dict.fromkeys(dirs)]))
    save(out, page.encode(errors="replace"))


def _page(runs: list[Recorded]) -> str:
    what = f"{len(runs)} runs" if len(runs) > 1 else runs[0].label
    body = [
        f"<header><h1>FedSieve report</h1><p class=soft>{escape(what)}</p>{_list(runs)}</header>",
        _section("Results", _results(runs)),
        _section("Round by round", _plots(runs)),
        _section("The papers’ figures", gallery(runs)),
        _section("Who holds what", _partitions(runs)),
        _section("Refused updates", _refused(runs)),
        _section("Privacy", _privacy(runs)),
        _section("Settings", _fields(runs, [run.settings for run in runs])),
        _section("Machines and versions", _fields(runs, [run.machine for run in runs])),
    ]
    title = f"<title>FedSieve report: {escape(what)}</title>\n<style>\n{palette_css()}{STYLE}</style>\n</head>\n"
    return f"{HEAD}{title}<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{title}</h2>\n{inner}\n</section>\n" if inner else ""


def _soft(text: str) -> str:
    """Return the text escaped, with places to break a line after what joins a name's parts."""
    return re.sub(r"(?<=[._=/])(?=\w)", "<wbr>", escape(text))


def _list(runs: list[Recorded]) -> str:
    return f"<ul class=runs>\n{''.join(_line(place, run) for place, run in enumerate(runs))}</ul>"


def _line(place: int, run: Recorded) -> str:
    task = ", ".join(run.settings[f"task.{key}"] for key in ("dataset", "partition") if f"task.{key}" in run.settings)
    about = (run.method, task, f"seed {run.settings.get('seed', '–')}", run.folder.name)
    cells = "".join(f"<span class=soft>{_soft(text)}</span>" for text in about if text)
    return f"<li>{_key('list', place)}<strong>{_soft(run.label)}</strong>{cells}{_state(run)}</li>\n"


def _key(where: str, place: int) -> str:
    return f"<span class=swatch>{swatch(f'{where}{place}', place)}</span>"


def _state(run: Recorded) -> str:
    done, planned = run.done, run.settings.get("rounds", "?")
    if not run.whole:
        return f'<span class="state going">{done} of {escape(planned)} rounds</span>'
    return f"<span class=state>finished, {done} round{'s' * (done != 1)}</span>"


def _results(runs: list[Recorded]) -> str:
    names = (
        "Accuracy",
        "Density",
        "Bytes up",
        "Bytes down",
        "One upload",
        "Multiply-adds",
        "A step",
        "Time",
        "Peak memory",
    )
    top = "<th scope=col>Run</th>" + "".join(f"<th scope=col class=number>{name}</th>" for name in names)
    body = "".join(_result(place, run) for place, run in enumerate(runs))
    return f"<p><small>{NOTE}</small></p>" + _wide(f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>", "results")


def _wide(table: str, kind: str) -> str:
    return f'<div class=wide tabindex=0 role=region aria-label="Table"><table class={kind}>{table}</table></div>'


def _result(place: int, run: Recorded) -> str:
    cells = [
        _value(run.last("accuracy"), percent),
        _value(run.last("density"), percent),
        *(
            _measured(run.total(f"bytes_{way}"), size, "dense", run.total(f"bytes_dense_{way}"))
            for way in ("up", "down")
        ),
        _measured(run.upload(), size, "paper", run.final("paper_bytes_up")),
        _measured(run.total("multiply_adds"), count, "dense", run.total("multiply_adds_dense")),
        _step(run),
        _value(run.total("seconds"), duration),
        _value(run.final("peak_memory_mb"), megabytes),
    ]
    name = f"<span class=named>{_key('result', place)}<span>{_soft(run.label)}</span></span>"
    below = f"<small class=method>{_soft(run.method)}</small><small>{'' if run.whole else _state(run)}</small>"
    numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
    return f"<tr><th scope=row>{name}{below}</th>{numbers}</tr>\n"


def _step(run: Recorded) -> str:
    """Return the milliseconds of a training step and which way it was computed; and both ways, where measured."""
    both = [
        f"<small>{escape(way)} {_value(number(of.get('ms_per_step')), milliseconds)}, "
        f"{_value(number(of.get('peak_memory_mb')), megabytes)}</small>"
        for way, of in run.measured.items()
    ]
    way = [f"<small>{escape(run.kernels)}</small>"] if run.kernels else []
    return "".join([_value(run.step(), milliseconds), *way, *both])


def _value(value: float | None, form: Callable[[float], str]) -> str:
    return NONE if value is None else f'<data value="{value!r}">{form(value)}</data>'


def _measured(value: float | None, form: Callable[[float], str], what: str, reference: float | None) -> str:
    """Return a measure, and under it what it stands against, with the factor between the two."""
    if value is None or reference is None:
        return _value(value, form)
    factor = f"<small>{text}</small>" if (text := times(reference, value)) else ""
    return f"{_value(value, form)}<small>{what} {_value(reference, form)}</small>{factor}"


def _sent(run: Recorded, place: int) -> Line:
    """Return accuracy over the megabytes sent until then."""
    each = [(number(row.get("bytes_up")) or 0) + (number(row.get("bytes_down")) or 0) for row in run.rows]
    sent = {row["round"]: total / 1e6 for row, total in zip(run.rows, accumulate(each), strict=True)}
    rounds, accuracy = run.series("accuracy", 100)
    points = [(sent[t], value) for t, value in zip(rounds, accuracy, strict=True) if sent[t] > 0]
    return Line([x for x, _ in points], [y for _, y in points], place)


def _plots(runs: list[Recorded]) -> str:
    rounds, reached = Axis("round", whole=True), Axis("accuracy, %", percent=True)
    accuracy = [Line(*run.series("accuracy", 100), place) for place, run in enumerate(runs)]
    density = [Line(*run.series("density", 100), place) for place, run in enumerate(runs)]
    sent = [_sent(run, place) for place, run in enumerate(runs)]
    cost = Axis("sent up and down so far, MB", log=_spans([line.x[-1] for line in sent if line.x], 10))
    kept = Axis("density, %", percent=True, zero=True, log=_spans([y for line in density for y in line.y], 30))
    plots = [
        _plot("accuracy", "Accuracy over rounds", runs, accuracy, rounds, reached),
        _plot("sent", "Accuracy over bytes sent", runs, sent, cost, reached),
        _plot("density", "Density over rounds", runs, density, rounds, kept),
        _traffic(runs, rounds),
    ]
    return f"<div class=plots>\n{''.join(plots)}</div>"


def _spans(values: Sequence[float], factor: float) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > factor


def _traffic(runs: list[Recorded], rounds: Axis) -> str:
    """Return the plot of bytes per round: up solid, down dashed, and each distinct dense reference dotted, once."""
    ways = [(place, run, way, dash) for place, run in enumerate(runs) for way, dash in (("up", "-"), ("down", "--"))]
    dense = {tuple(map(tuple, run.series(f"bytes_dense_{way}"))) for _, run, way, _ in ways}
    lines = [Line(x, y, None, ":") for x, y in sorted(dense)]
    lines += [Line(*run.series(f"bytes_{way}"), place, dash) for place, run, way, dash in ways]
    values = [y for line in lines for y in line.y]
    unit, size = ("MB", 1e6) if max(values, default=0) >= 1e6 else ("kB", 1e3)
    lines = [replace(line, y=[y / size for y in line.y]) for line in lines]
    return _plot(
        "traffic",
        "Bytes in a round",
        runs,
        lines,
        rounds,
        Axis(f"{unit} in a round", zero=True, log=_spans(values, 10)),
    )


def _plot(name: str, title: str, runs: list[Recorded], lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Return a titled plot with its legend; without a point to show, the sentence that says so."""
    lines = [line for line in lines if line.x]
    if not lines:
        return f"<figure><h3>{title}</h3><p class=soft>Nothing measured yet.</p></figure>\n"
    up = [line for line in lines if line.run is not None and line.dash == "-"]
    ends = "; ".join(f"{runs[line.run or 0].label}: {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in up)
    drawn = chart(name, lines, x, y, f"{title}. {y.name}, first to last: {ends}.")
    return f"<figure><h3>{title}</h3>{_legend(name, runs, lines)}{drawn}</figure>\n"


def _legend(name: str, runs: list[Recorded], lines: Sequence[Line]) -> str:
    """Return a sample of each run, and of each dash where they stand for directions."""
    places = sorted({line.run for line in lines if line.run is not None})
    keys = [_key(name, place) + escape(runs[place].label) for place in places]
    dashes = {line.dash for line in lines}
    ways = [
        (f"{name}-{way}", dash, way) for way, dash in (("up", "-"), ("down", "--"), ("dense", ":")) if dash in dashes
    ]
    if dashes != {"-"}:
        keys += [f"<span class=swatch>{swatch(key, None, dash)}</span>{way}" for key, dash, way in ways]
    return f"<ul class=legend>{''.join(f'<li>{key}</li>' for key in keys)}</ul>"


def _partitions(runs: list[Recorded]) -> str:
    """Return one heat map for each distinct partition, with the runs that share it."""
    groups: dict[tuple[tuple[str, ...], bytes], list[Recorded]] = {}
    for run in runs:
        if run.counts is not None:
            groups.setdefault((tuple(run.classes), run.counts.tobytes()), []).append(run)
    maps = "".join(_map(f"map{i}", group, len(group) == len(runs)) for i, group in enumerate(groups.values()))
    return f"<div class=plots>\n{maps}</div>" if len(groups) > 1 else maps


def _map(name: str, group: list[Recorded], everyone: bool) -> str:
    run = group[0]
    assert run.counts is not None
    about = (run.settings.get(f"task.{key}", "") for key in ("dataset", "partition"))
    title, says, (shown, x_name) = ", ".join(filter(None, about)), _says(run.counts), _columns(run.counts)
    drawn = heat(name, run.classes, shown, len(run.counts), x_name, f"{title}: {says}")
    whose = "" if everyone else f"<p>Runs: {escape('; '.join(run.label for run in group))}</p>"
    caption = f"<figcaption><p>{says}</p>{whose}</figcaption>"
    return f"<figure class=map><div><h3>{escape(title)}</h3>{drawn}</div>{caption}</figure>\n"


def _says(counts: NDArray[np.float64]) -> str:
    sizes, kinds = counts.sum(1), (counts > 0).sum(1)
    spread = f"{sizes.min():,.0f} to {sizes.max():,.0f} examples (median {np.median(sizes):,.0f})"
    held = spread if sizes.min() < sizes.max() else f"{sizes[0]:,.0f} examples"
    return (
        f"{sizes.sum():,.0f} examples of {counts.shape[1]} classes on {len(counts):,} clients. A client holds {held}, "
        f"of {kinds.mean():.1f} classes on average. A column is a client, a row a class; the stronger the colour, the "
        "more examples."
    )


def _columns(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """Return what the heat map shows: up to 200 clients as they are; more sorted by main class, up to 400 columns."""
    if len(counts) <= 200:
        return counts, "client"
    main, share = counts.argmax(1), counts.max(1) / np.maximum(counts.sum(1), 1)
    ordered, each = counts[np.lexsort((-share, main))], math.ceil(len(counts) / 400)
    binned = np.stack([ordered[i : i + each].mean(0) for i in range(0, len(counts), each)])
    return binned, "clients by main class" + (f", {each} to a column" if each > 1 else "")


def _refused(runs: list[Recorded]) -> str:
    return "".join(_reasons(run) for run in runs if run.refused())


def _reasons(run: Recorded) -> str:
    refused = run.refused()
    items = "".join(f"<li>{n} × {escape(reason)}</li>" for reason, n in refused.most_common())
    return f"<p><strong>{escape(run.label)}</strong>: {refused.total()} refused</p><ul class=reasons>{items}</ul>\n"


def _privacy(runs: list[Recorded]) -> str:
    """Return what the rounds of private runs have spent, and of rehearsals what they would have."""
    lines = [_spent(run, spent, kind) for run in runs for kind in ABOUT_NOISE if (spent := run.last(kind)) is not None]
    about = (
        "One client\u2019s data for another\u2019s; seen in sum, by who does not know the run\u2019s seed: "
        "docs/methods/private.md says against whom."
    )
    return f"<p><small>{about}</small></p><ul class=reasons>{''.join(lines)}</ul>" if lines else ""


def _spent(run: Recorded, spent: float, kind: str) -> str:
    delta, rounds = escape(run.settings.get("method.delta", "?")), f"{run.done} round{'s' * (run.done != 1)}"
    number = f"ε = {three(spent)} at δ = {delta}, after {rounds}"
    return f"<li><strong>{escape(run.label)}</strong>: {number}{ABOUT_NOISE[kind]}</li>\n"


def _fields(runs: list[Recorded], fields: list[dict[str, str]]) -> str:
    """Return what differs between the runs as a table, and the rest folded."""
    names = sorted(
        dict.fromkeys(name for one in fields for name in one), key=lambda name: name.split(".")[0] != "method"
    )
    values = {name: [one.get(name) for one in fields] for name in names}
    differs = {name: row for name, row in values.items() if len(set(row)) > 1}
    same = {name: row[:1] for name, row in values.items() if name not in differs}
    first = _table([run.label for run in runs], differs, "differs") if differs else ""
    about = "The same for every run" if len(runs) > 1 else "All fields"
    fold = f"<details{'' if differs else ' open'}><summary>{about} <small>({len(same)})</small></summary>"
    return first + (f"{fold}{_table(['Value'], same, 'same')}</details>" if same else "")


def _table(heads: list[str], rows: dict[str, list[str | None]], kind: str) -> str:
    top = "".join(f"<th scope=col>{_soft(head)}</th>" for head in ["Field", *heads])
    body = "".join(_row(name, values, kind) for name, values in rows.items())
    return _wide(f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>", "fields")


def _row(name: str, values: list[str | None], kind: str) -> str:
    cells = "".join(f"<td>{NONE if value is None else escape(value)}</td>" for value in values)
    return f"<tr class={kind}><th scope=row>{_soft(name)}</th>{cells}</tr>\n"

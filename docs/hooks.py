"""What mkdocs does besides: write the pages of settings, of the papers' rows and tables; lead links out of docs/."""

from __future__ import annotations

import ast
import inspect
import posixpath
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

REPOSITORY = "https://github.com/fedsieve/fedsieve/blob/main"
ROOT = Path(__file__).parent.parent
SETTINGS, PAPERS = "reference/settings.md", "reference/papers.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to mkdocs' files."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, SETTINGS, content=settings_page()))
    files.append(File.generated(config, PAPERS, content=papers_page()))
    for path, content in {**reproduction_pages(), **reproduction_drawings()}.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page whose links to files outside docs/ name them in the repository."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        return match[0] if target.startswith("docs/") else f"]({REPOSITORY}/{target})"

    return re.sub(r"\]\((\.\./[^)#]+)\)", link, markdown)


def settings_page() -> str:
    """Return the page of everything that a user can set: of a run, of each method, of the command line, of Flower."""
    return "\n".join([*_head(), *_run(), *_methods(), *_flower(), *_environment(), *_commands()])


def papers_page() -> str:
    """Return the page of the papers' rows: the protocol of every table on every dataset, and the rows as commands."""
    from fedsieve.recipes.papers import authors_by_method, rows_by_protocol

    lines = ["# The papers' rows", "", *PAPERS_HEAD]
    for title, (protocol, rows) in rows_by_protocol().items():
        lines += ["", f"## {title}", "", "| term | protocol |", "|---|---|"]
        lines += [f"| {term.replace('_', ' ')} | {_flat(text)} |" for term, text in protocol.items()]
        lines += ["", "| row | accuracy, % | command |", "|---|---|---|"]
        lines += [f"| {row.name} | {row.printed} | `{row.command}` |" for row in rows]
        if authors := authors_by_method(rows):
            lines += ["", "| method | [as the authors' code](../explanation/authors.md), add |", "|---|---|"]
            lines += [f"| {methods} | `{settings}` |" for methods, settings in authors.items()]
    return "\n".join([*lines, ""])


PAPERS_HEAD = (
    "Every number that the papers print of whole runs, with the protocol that it stands for, written from the code",
    "(`fedsieve list papers`). A term that a paper does not print says so, and what was chosen. In a report and in a",
    "sweep's table such a number stands beside a run only where data and protocol are the row's, the best accuracy",
    "beside the best and the last beside the last; else a phrase says what differs (`300 of 3,597 writers`,",
    "`round 100 of 400`). Of fewer seeds than the row's the number says so.",
)


def reproduction_pages() -> dict[str, str]:
    """Return, by their paths, the pages of the papers' tables with the committed results: a summary, and each table."""
    from fedsieve.recipes.papers.parts import PAPERS as TITLES
    from fedsieve.report import paper_tables as tables

    out = ROOT / "reproductions"
    results, causes = tables.all_results(out), tables.read_causes(out)
    figures = tables.figure_records(out)
    names = {part: f"{TITLES[part.paper]}, {_name_of(part.name)}" for part in {**results, **figures}}
    links = [f"- [{name}]({part.paper}_{part.name}.md): {part.title}" for part, name in names.items()]
    sentence = tables.counts_in_words(tables.count_results([row for rows in results.values() for row in rows], causes))
    summary = tables.results_summary(results, "html", causes)
    pages = {
        "index": "\n".join(["# Reproductions", "", *REPRODUCTIONS_HEAD, "", sentence, "", *links, "", summary, ""])
    }
    protocols = "Protocols and commands of all rows: [the papers' rows](../reference/papers.md)."
    for part, name in names.items():
        lines = [f"# {name}"]
        if cells := figures.get(part):
            lines += ["", *_figure(part, cells)]
        if rows := results.get(part):
            sentence = tables.counts_in_words(tables.count_results(rows, causes))
            lines += ["", sentence, protocols, "", tables.paper_table(part, rows, "html", causes)]
        pages[f"{part.paper}_{part.name}"] = "\n".join([*lines, ""])
    return {f"reproductions/{name}.md": text for name, text in pages.items()}


def reproduction_drawings() -> dict[str, bytes]:
    """Return, by their paths, the papers' figures drawn of the committed results, those of which there are any."""
    from fedsieve.report.figures import encode_figure, paper_figure
    from fedsieve.report.paper_tables import figure_records

    return {
        f"reproductions/{part.paper}_{part.name}.svg": encode_figure(
            paper_figure(part.figure, [record for kept in cells.values() for record in kept]), "svg"
        )
        for part, cells in figure_records(ROOT / "reproductions").items()
    }


def _name_of(name: str) -> str:
    """Return what a table or figure is called: table2 is Table 2, figure2_mnist Figure 2 on MNIST."""
    kind, number, dataset = re.fullmatch(r"([a-z]+)(\d+)_?(\w*)", name).groups()  # type: ignore[union-attr]
    return f"{kind.capitalize()} {number}" + (f" on {dataset.upper()}" if dataset else "")


def _figure(part: Any, cells: Any) -> Iterator[str]:
    """Yield a figure's drawing, what it shows, and what is missing of it."""
    there = [cell for cell, records in cells.items() if records]
    runs = sum(map(len, cells.values()))
    text = f"{part.title[0].upper()}{part.title[1:]}: {len(there)} of {len(cells)} cells, {runs} runs."
    yield f"![{text}]({part.paper}_{part.name}.svg)"
    yield ""
    yield f"{text} `fedsieve reproduce {part.label}` draws it, and runs what is missing with `--hours`:"
    yield ""
    yield from (f"- {cell.label}{'' if records else ' (missing)'}" for cell, records in cells.items())


REPRODUCTIONS_HEAD = (
    "The papers' tables as printed, with what runs of their rows reach here in each cell, written from the results in",
    "[reproductions/](../../reproductions/README.md). What the runs took and sent stands below each table.",
)


def _head() -> Iterator[str]:
    yield "# Settings"
    yield ""
    yield "Everything that can be set, written from the code. `-s NAME=VALUE` changes a field of a recipe's run on the"
    yield "command line; in Python they are the arguments of `fedsieve.Run`, `fedsieve.Task` and the method's class."


def _run() -> Iterator[str]:
    from fedsieve import Run, Task

    yield from _section("## A run", Run, "")
    yield from _section("## Its task", Task, "task.")


def _methods() -> Iterator[str]:
    from fedsieve.methods import METHODS

    yield "\n## Methods\n\nThe fields of a run's `method`; what each method does: its card."
    for name, kind in METHODS.items():
        title = f"### {name}"
        yield from _section(title, kind, "method.") if isinstance(kind, type) else ("", title, "", _first(kind))


def _flower() -> Iterator[str]:
    from fedsieve.flower.app.project import AppConfig

    yield "\n## A Flower app\n\nWhat `flwr run -c 'NAME=VALUE'` sets in an app that `fedsieve flower app` wrote."
    yield from _table(AppConfig, "", "-", [*AppConfig().run_config()])


def _section(title: str, kind: type, prefix: str) -> Iterator[str]:
    """Yield a table of a dataclass's fields, then those of every dataclass that one of them may hold."""
    yield from ("", title, "", f"`{kind.__module__}.{kind.__qualname__}`: {_first(kind)}")
    yield from _table(kind, prefix)
    hints = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        for part in _parts(hints[field.name]):
            if _settable(part):
                path = prefix + field.name
                yield from _section(f"**`{path}={part.__name__.lower()}`**", part, f"{path}.")


def _table(kind: type, prefix: str, dash: str = "_", names: list[str] | None = None) -> Iterator[str]:
    """Yield a table of a dataclass's fields, or of those with certain names, which ``dash`` joins."""
    rows = [
        f"| `{prefix}{field.name.replace('_', dash)}` | {_type(hint)} | {_default(field)} | {meaning} |"
        for field, hint, meaning in zip(fields(kind), _hints(kind), _docstrings(kind).values(), strict=True)  # type: ignore[arg-type]
        if names is None or field.name.replace("_", dash) in names
    ]
    if rows:
        yield from ("", "| setting | value | default | meaning |", "|---|---|---|---|", *rows)


def _hints(kind: type) -> list[Any]:
    hints = get_type_hints(kind)
    return [hints[field.name] for field in fields(kind)]  # type: ignore[arg-type]


def _environment() -> Iterator[str]:
    yield "\n## Environment\n\n| variable | meaning |\n|---|---|"
    for name, meaning in ENVIRONMENT.items():
        yield f"| `{name}` | {meaning} |"


ENVIRONMENT = {
    "FEDSIEVE_DATA": "the folder of the datasets, where `--data` names none",
    "FEDSIEVE_CACHE": "the folder of what is computed once from a dataset; default: `~/.cache/fedsieve`",
    "FEDSIEVE_KEY": "64 hexadecimal digits: what a deployment's messages are sealed with",
    "FEDSIEVE_KEY_FILE": "a file that holds them",
    "FEDSIEVE_ISA": "the instruction set of the kernels, where not the CPU's best; `none` switches them off",
    "FEDSIEVE_KERNELS_DIR": "another folder of compiled kernels",
    "CXX": "the C++ compiler of the kernels",
}


def _commands() -> Iterator[str]:
    import typer

    from fedsieve.cli import app

    yield "\n## The command line"
    yield from _command(typer.main.get_command(app), "fedsieve")


def _command(command: Any, path: str) -> Iterator[str]:
    """Yield the options of a command, or of every command of a group."""
    options = [one for one in command.params if one.name != "help"]
    if not hasattr(command, "commands"):
        yield f"\n### {path}\n\n{_flat(command.help)}\n\n| argument or option | default | meaning |\n|---|---|---|"
        for one in options:
            names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
            names = names if one.param_type_name == "option" else f"`{one.metavar or one.name.upper()}`"
            default = "" if one.default in (None, "", False) or one.required else f"`{one.default}`"
            yield f"| {names} | {default} | {_flat(one.help)} |"
    for name, below in getattr(command, "commands", {}).items():
        yield from _command(below, f"{path} {name}")


def _settable(kind: Any) -> bool:
    """Tell whether ``-s`` makes objects of a type from its name: a dataclass whose fields all have defaults."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return False
    return all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(kind))


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _type(hint: Any) -> str:
    """Return what a field takes, as one writes it after ``-s``."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"{_type(get_args(hint)[0])}, several by commas"
    words = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}
    named = [words.get(part) or (f"`{part.__name__.lower()}`" if _settable(part) else "") for part in _parts(hint)]
    return " or ".join(dict.fromkeys(word for word in named if word)) or "in Python alone"


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return "set by the recipe"
    shown = type(value).__name__.lower() if is_dataclass(value) else str(value) if value != "" else "empty"
    return f"`{shown}`"


def _docstrings(kind: type) -> dict[str, str]:
    """Return the text below each field of a dataclass, in one line, or what its name means in every method."""
    meanings = {f.name: f.metadata.get("help") or EVERYWHERE.get(f.name, "") for f in fields(kind)}  # type: ignore[arg-type]
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for node, after in zip(body, [*body[1:], None], strict=True):
            name = ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else ""
            if name in meanings and isinstance(after, ast.Expr):  # no field is a variable of the class's own
                meanings[name] = _flat(ast.literal_eval(after.value))
    return meanings


EVERYWHERE = {
    "density": "the share of non-zeros, in (0, 1], in the layers of the policy",
    "sparsity": "the share of zeros, in [0, 1), in the layers of the policy",
    "policy": "which layers are sparse: `all`, `swat`, `flash`, `zerofl`, or patterns of layer names by commas",
    "server": "what the server does with the mean: take it (`average`), or an Adam step towards it (`adam`)",
    "E_d": "the local epochs of the warm-up",
    "p": "DNR's first prune rate; it falls linearly to 0",
    "share": "where DNR grows weights: by the mean of a layer's non-zeros (the authors' code), or their sum (the text)",
    "excess": "a layer's density beyond 1 goes to the other layers, or is clipped off (the authors' code)",
}
"""What fields mean that several methods have, where a method says no more of its own."""


def _first(kind: object) -> str:
    """Return the first paragraph of a class's or function's docstring in one line."""
    return _flat((inspect.getdoc(kind) or "").split("\n\n")[0])


def _flat(text: str | None) -> str:
    return re.sub(r"``", "`", " ".join((text or "").split())).replace("|", "\\|")

"""The command line: run, list, report. Mistakes of the user's end in one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsieve.types import InputError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse federated learning that is sparse for real.",
)
Setting = Annotated[list[str] | None, typer.Option("-s", "--set", metavar="NAME=VALUE", help="Change a field.")]
DataDir = Annotated[str | None, typer.Option("--data", help="Folder of the datasets, or hub. Default: FEDSIEVE_DATA.")]


@app.command("run")
def run_command(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe (fedsieve list recipes) or your file.py:function.")],
    set_: Setting = None,
    engine: Annotated[str, typer.Option(help="local, or pool:N for N processes.")] = "local",
    data: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The run directory. Default: runs/RECIPE-NUMBER.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint.")] = False,
    until: Annotated[int, typer.Option(help="Stop after this round (0: the last); --resume goes on.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Run an experiment: live progress, and a directory with rounds, checkpoints, summary and model."""
    from fedsieve.data import root_from
    from fedsieve.engine import open_run
    from fedsieve.progress import show
    from fedsieve.recipes import made
    from fedsieve.settings import changed
    from fedsieve.store import Origin, keep

    run = changed(made(recipe), set_ or [])
    carrier = _engine(engine, device)
    federation = open_run(run, root_from(data))
    folder = out or _folder(recipe, resume)
    rounds = keep(folder, federation, carrier, Origin(recipe, engine, device), resume=resume, until=until)
    show(folder, federation, rounds, min(until or run.rounds, run.rounds))


@app.command("list")
def list_command(
    what: Annotated[str, typer.Argument(help="methods, recipes, datasets, engines, or all of them.")] = "all",
    data: DataDir = None,
) -> None:
    """Show the methods, recipes, datasets (and where they were found) and engines."""
    from fedsieve.catalogue import show_catalogue
    from fedsieve.data import root_from

    show_catalogue(what, root_from(data))


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN_DIR...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """Make one self-contained page of one or more runs."""
    from fedsieve.report import report

    report(runs, out)
    typer.echo(f"wrote {out}")


def _engine(name: str, device: str) -> Any:
    from fedsieve.engine import local, pool

    kind, _, number = name.partition(":")
    if kind == "local" and not number:
        return local(device)
    if kind == "pool" and number.isdecimal():
        return pool(int(number), device)
    raise InputError(f"unknown engine {name!r}; the engines are local and pool:N (pool:2 uses two processes)")


def _folder(recipe: str, resume: bool) -> Path:
    """Return runs/RECIPE-N: a new one, made here so that nobody else takes it, or with ``resume`` the last."""
    name = Path(recipe).name.replace(".py:", ".")
    endings = [p.name[len(name) + 1 :] for p in Path("runs").glob(f"{name}-*")]
    last = max((int(number) for number in endings if number.isdecimal()), default=0)
    if resume and last:
        return Path("runs") / f"{name}-{last}"
    if resume:
        raise InputError(f"there is no run of {recipe} under runs/ to go on with: drop --resume, or name it with --out")
    folder = Path("runs") / f"{name}-{last + 1}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return _folder(recipe, resume)
    return folder


def _one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    typer.echo(f"fedsieve: warning: {message}", err=True)


def main() -> None:
    """Run the command line."""
    warnings.showwarning = _one_line
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(standalone_mode=False)
    except InputError as error:
        _fail(str(error))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit("fedsieve: stopped")
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())
    except KeyboardInterrupt:
        typer.echo("\nfedsieve: stopped; every finished round is on disk: --resume goes on", err=True)
        sys.exit(130)


def _fail(line: str) -> None:
    typer.echo(f"fedsieve: {' '.join(line.split())}", err=True)
    sys.exit(2)

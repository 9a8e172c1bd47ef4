"""The command line: run, sweep, doctor, list, report, figure, bench, predict, export, flower.

Mistakes of the user's end in one line on stderr, exit code 2. What a command needs it imports itself, so that PyTorch
is not loaded for a page of help.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from fedsieve import __version__
from fedsieve.cli import results, training
from fedsieve.cli.bench.commands import bench_app
from fedsieve.cli.flower import flower_app

STOPPED = 130
"""The exit code of a run that Ctrl-C ended."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse federated learning that is sparse for real.",
)
app.add_typer(bench_app, name="bench")
app.add_typer(flower_app, name="flower")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedsieve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Show warnings of the command that follows in one line each."""
    from fedsieve.client.process import warn_in_one_line

    warn_in_one_line()


COMMANDS: dict[str, Any] = {
    "run": training.run_command,
    "sweep": training.sweep_command,
    "doctor": results.doctor_command,
    "list": results.list_command,
    "report": results.report_command,
    "figure": results.figure_command,
    "predict": results.predict_command,
    "export": results.export_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Run the command line."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: say nothing more
        code = 1
    except Exception as error:
        _fail(_line(error))
    if code == STOPPED:
        typer.echo(f"\nfedsieve: stopped{_how_to_go_on()}", err=True)
    sys.exit(code)


def _line(error: Exception) -> str:
    """Return what went wrong, if it is the user's mistake or the machine's; raise the error again if it is ours."""
    if hasattr(error, "format_message"):  # the words of the command line
        return str(error.format_message())
    from fedsieve.types import InputError
    from fedsieve.types.errors import of_machine

    if isinstance(error, InputError):
        return str(error)
    if line := of_machine(error):
        return line + _how_to_go_on()
    raise error


def _how_to_go_on() -> str:
    """Return what is left of a command that ended early, and how to go on."""
    saved = "; every finished round is on disk"
    ends = {"run": f"{saved}: --resume goes on", "sweep": f"{saved}: the same command goes on"}
    return (ends | {"bench": "; nothing was kept"}).get("".join(sys.argv[1:2]), "")


def _fail(line: str) -> NoReturn:
    if line:  # a bare `fedsieve` has printed its help
        typer.echo(f"fedsieve: {' '.join(line.split())}", err=True)
    sys.exit(2)

"""The command line: the commands, and what is said where one ends early.

Mistakes of the user's end in one line on stderr, exit code 2.
"""

from __future__ import annotations

import os
import sys

import typer

from fedsieve.cli.commands import app

__all__ = ["app", "main"]

STOPPED = 130
"""The exit code of a run that Ctrl-C ended."""


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
        if line := _line(error):  # a bare `fedsieve` has printed its help
            typer.echo(f"fedsieve: {' '.join(line.split())}", err=True)
        sys.exit(2)
    if code == STOPPED:
        typer.echo(f"\nfedsieve: stopped{_how_to_go_on()}", err=True)
    sys.exit(code)


def _line(error: Exception) -> str:
    """Return what went wrong, if it is the user's mistake or the machine's; raise the error again if it is ours."""
    if hasattr(error, "format_message"):  # the words of the command line
        message, context = str(error.format_message()), getattr(error, "ctx", None)
        return f"{message} {context.get_usage()}" if context and message.startswith("Missing") else message
    from fedsieve.types import InputError
    from fedsieve.types.errors import of_machine

    if isinstance(error, InputError):
        return str(error)
    if line := of_machine(error):
        return line + _how_to_go_on()
    raise error


def _how_to_go_on() -> str:
    """Return what is left of a command that ended early, and how to go on."""
    rounds = "; every finished round is on disk"
    ends = {
        "run": f"{rounds}: --resume goes on",
        "sweep": f"{rounds}: the same command goes on",
        "reproduce": f"{rounds}: the same command goes on",
        "bench": "; nothing was kept",
        "data": "; the same command goes on",
    }
    return ends.get("".join(sys.argv[1:2]), "")

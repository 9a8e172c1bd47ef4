"""``fedsieve flower``: FedSieve's runs for Flower's own tools."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedsieve.cli.options import Recipe, Setting, with_execution
from fedsieve.runs.execution import Execution

flower_app = typer.Typer(no_args_is_help=True, help="Run FedSieve on SuperLinks and SuperNodes of your own.")


@flower_app.callback()
def _group() -> None:
    """Keep `app` a command of its own, though it is the only one."""


@flower_app.command("app")
@with_execution("flower")
def app_command(
    recipe: Recipe,
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    set_: Setting = None,
    *,
    execution: Execution,
) -> None:
    """Write a Flower app that runs a recipe: `flwr run DIR` takes it to a simulation or to a deployment."""
    from fedsieve.flower.app.project import AppConfig, write_app
    from fedsieve.recipes import load_recipe

    settings = set_ or []
    execution.quorum.check(load_recipe(recipe, settings))
    out = str(Path(execution.out or folder / "run").absolute())
    config = AppConfig(**asdict(execution) | {"out": out}, recipe=recipe, settings=shlex.join(settings))
    write_app(folder, config)
    typer.echo(f"wrote {folder}: see {folder / 'README.md'}")

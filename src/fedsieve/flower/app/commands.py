"""``fedsieve flower``: FedSieve's runs for Flower's own tools."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

flower = typer.Typer(no_args_is_help=True, help="Run FedSieve on SuperLinks and SuperNodes of your own.")


@flower.callback()
def _group() -> None:
    """Keep `app` a command of its own, though it is the only one."""


@flower.command("app")
def app_command(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe (fedsieve list recipes) or your file.py:function.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    set_: Annotated[list[str] | None, typer.Option("-s", "--set", metavar="NAME=VALUE", help="Change a field.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory on the server. Default: DIR/run.")] = None,
    own_data: Annotated[bool, typer.Option("--own-data", help="Every SuperNode names data of its own.")] = False,
    min_clients: Annotated[int, typer.Option(help="Answers that a round needs (0: half of its clients).", min=0)] = 0,
    round_timeout: Annotated[float, typer.Option(help="Seconds after which a client is lost to its round.")] = 3600.0,
    kernels: Annotated[str, typer.Option(help="How to train: auto, sparse or dense.")] = "auto",
    measure: Annotated[str, typer.Option(help="Further columns: masks, pruned, or both by a comma.")] = "",
) -> None:
    """Write a Flower app that runs a recipe: `flwr run DIR` takes it to a simulation or to a deployment."""
    from fedsieve.engine import Patience
    from fedsieve.engine.measures import check_measures
    from fedsieve.flower.app.settings import Order
    from fedsieve.flower.app.template import licence, write_app
    from fedsieve.kernels.choice import check_choice
    from fedsieve.recipes import made
    from fedsieve.recipes.settings import changed

    Patience(min_clients, round_timeout).check(changed(made(recipe), set_ or []))
    check_choice(kernels)
    order = Order(
        recipe,
        shlex.join(set_ or []),
        str((out or folder / "run").absolute()),
        own_data=own_data,
        min_clients=min_clients,
        round_timeout=round_timeout,
        kernels=kernels,
        measure=measure,
    )
    check_measures(order.measured)
    write_app(folder, order, licence())
    typer.echo(f"wrote {folder}: see {folder / 'README.md'}")

"""The commands that train: run and sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsieve.cli.options import Recipe, Setting, is_given, with_execution
from fedsieve.runs.execution import Execution

Axis = Annotated[
    list[str] | None,
    typer.Option(
        "-s",
        "--set",
        metavar="NAME=V1,V2",
        help="The values of a field; apart by ; where a value has commas itself (quote it: -s 'task.tiers=1;.5,.5').",
    ),
]


@with_execution("run")
def run_command(context: typer.Context, recipe: Recipe, set_: Setting = None, *, execution: Execution) -> None:
    """Run an experiment: live progress, and a directory with rounds, checkpoints, summary and model."""
    from fedsieve.cli.run import start_run

    start_run(recipe, set_ or [], execution, kernels_given=is_given(context, "kernels"))


@with_execution("sweep")
def sweep_command(
    recipes: Annotated[list[str], typer.Argument(help="Recipes, as of `fedsieve run`.", metavar="RECIPE...")],
    set_: Axis = None,
    seeds: Annotated[int, typer.Option(help="How many seeds: 0 to N-1.", metavar="N")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at once, each a process with one thread.", metavar="N")] = 1,
    table: Annotated[bool, typer.Option("--table", help="Only print the table of what has been run.")] = False,
    *,
    execution: Execution,
) -> None:
    """Run every recipe with every value of every setting and every seed; the same command goes on after a stop.

    A setting of the method (method.density) concerns those recipes whose method has it.
    """
    from fedsieve.runs.sweep.grid import check_grid, check_same_sweep, default_folder, grid, open_folder
    from fedsieve.runs.sweep.jobs import run_sweep
    from fedsieve.runs.sweep.table import show_table
    from fedsieve.types import InputError

    whole = grid(recipes, set_ or [], seeds, execution)
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1 run at once, got {jobs}")
    folder = Path(execution.out) if execution.out else default_folder(whole)
    if table:
        check_same_sweep(folder, whole)
        show_table(whole, folder)
    else:
        check_grid(whole)
        with open_folder(folder, whole):
            trouble = run_sweep(whole.jobs(folder), jobs, execution)
            show_table(whole, folder, save=True)
        if trouble:
            raise InputError(trouble)

"""The options of a command that runs something, made of the fields of ``Execution``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fedsieve.runs.execution import Execution, Face, execution_options

DataDir = Annotated[str | None, typer.Option("--data", help="Folder of the datasets, or hub. Default: FEDSIEVE_DATA.")]
Model = Annotated[Path, typer.Argument(help="A run directory, or a .fsv file.", metavar="RUN_DIR")]
Own = Annotated[str, typer.Option("--recipe", help="For a network or data of your own: the file.py:function that ran.")]
REPEATABLE = ("log", "until")
"""The options of ``Execution`` whose texts are lists by commas, and that may be given again instead."""


def with_execution(face: Face) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``face`` in place of its parameter ``execution``, which is made of them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = {option.name: option for option in execution_options(face)}

        @wraps(command)
        def wrapper(**arguments: Any) -> None:
            values: dict[str, Any] = {name: arguments.pop(name) for name in flags}
            values |= {name: ",".join(values[name]) for name in REPEATABLE}
            execution = Execution(**values)
            command(**arguments, execution=execution)

        hints = get_type_hints(command, include_extras=True)
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "execution"]
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        for name, option in flags.items():
            default = [] if name in REPEATABLE else option.metadata["default"]
            flag = typer.Option(default, f"--{name.replace('_', '-')}", help=option.metadata["help"])
            kind = list[str] if name in REPEATABLE else type(option.default)
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=flag, annotation=kind))
        vars(wrapper).pop("__wrapped__")
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        vars(wrapper)["__signature__"] = inspect.Signature(parameters)
        return wrapper

    return decorate

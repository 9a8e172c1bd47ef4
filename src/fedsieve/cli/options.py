"""The options of commands that run something: a flag for each field of ``Execution`` that concerns them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from fedsieve.runs.execution import Execution, Face, execution_options

Recipe = Annotated[str, typer.Argument(help="A built-in recipe (fedsieve list recipes) or your file.py:function.")]
Setting = Annotated[list[str] | None, typer.Option("-s", "--set", metavar="NAME=VALUE", help="Change a field.")]
DataDir = Annotated[str | None, typer.Option("--data", help="Folder of the datasets, or hub. Default: FEDSIEVE_DATA.")]


def with_execution(face: Face) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``face`` in place of its parameter ``execution``, which is made of them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = {option.name: option for option in execution_options(face)}

        @wraps(command)
        def wrapper(**arguments: Any) -> None:
            execution = Execution(**{name: arguments.pop(name) for name in flags})
            command(**arguments, execution=execution)

        hints = get_type_hints(command, include_extras=True)
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "execution"]
        parameters = [p.replace(annotation=hints[p.name]) for p in own]
        for name, option in flags.items():
            flag = typer.Option(option.default, f"--{name.replace('_', '-')}", help=option.metadata["help"])
            kind = type(option.default)
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=flag, annotation=kind))
        vars(wrapper).pop("__wrapped__")
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        vars(wrapper)["__signature__"] = inspect.Signature(parameters)
        return wrapper

    return decorate


def is_given(context: typer.Context, option: str) -> bool:
    """Say whether the command of ``context`` was given an option, whatever its value."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"

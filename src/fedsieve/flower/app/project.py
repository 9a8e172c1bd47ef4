"""A Flower app as a project on disk: its run config, which ``flwr run -c`` changes, and the files that are written.

The run config is a recipe, its settings, and how it is executed; the files are that, a licence, and two modules that
call FedSieve.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

from fedsieve.data.storage import write
from fedsieve.engine import Federation, Run
from fedsieve.engine.federation import described
from fedsieve.recipes import load_recipe
from fedsieve.runs.execution import Execution, execution_options
from fedsieve.types import InputError
from fedsieve.wire.authentication import key_of_run

PACKAGE = "fedsieve_app"

MODULE = '''"""{what}"""

from pathlib import Path

from fedsieve.flower.app import {half}

app = {half}(Path(__file__).parent)
'''

PROJECT = """\
# Made by: fedsieve flower app {recipe}
[project]
name = "{name}"
version = "1.0.0"
description = {description}
license = {{ file = "LICENSE" }}
dependencies = ["flwr[simulation]>=1.41"]  # and FedSieve {fedsieve} on every machine, from its checkout

[tool.flwr.app]
publisher = "fedsieve"
fab-format-version = 1
flwr-version-target = "{flwr}"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# What `flwr run -c 'rounds...'` may change; `settings` are those after -s: "rounds=3 method.sparsity=0.95".
[tool.flwr.app.config]
{config}
"""

README = """\
# {recipe}, run by FedSieve over Flower

A simulation in one command, which keeps the traps away, is `fedsieve run {recipe} --engine flower`. This app is for
SuperLinks of your own:

```sh
fedsieve doctor                                # what bites Flower users, and how to mend it
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0
flwr run {folder} --stream                     # on Ray, by the local SuperLink that flwr starts
flwr run {folder} CONNECTION --stream          # on a deployment: FedSieve's docs/how-to/deploy.md
flwr run {folder} CONNECTION --stream -c 'resume=true'
```

The run directory, on the server's machine, is `out`. `flwr run` ends with 0 whatever happens: `flwr list` tells how.
"""


@dataclass(frozen=True)
class AppConfig(Execution):
    """A recipe and how it is executed, as a Flower app's two halves read it from the app's run config."""

    recipe: str = ""
    """A built-in recipe, or ``file.py:function`` of a file beside the app's modules."""
    settings: str = ""
    """``name=value`` as after ``-s``, apart by blanks, quoted as in a shell."""

    def run_config(self) -> dict[str, Any]:
        """Return the run config: its keys and their values."""
        return {name.replace("_", "-"): getattr(self, name) for name in _DEFAULTS}

    def run(self, here: Path) -> Run:
        """Return the recipe's run; its own file is looked for in ``here``. Raises InputError."""
        recipe = str(here / self.recipe) if ".py:" in self.recipe else self.recipe
        return load_recipe(recipe, shlex.split(self.settings))

    def federation(self, here: Path) -> Federation:
        """Return the run with the recipe's own data. Raises InputError."""
        return self.open(self.run(here))


_DEFAULTS: dict[str, Any] = {"recipe": "", "settings": ""}
_DEFAULTS |= {option.name: option.default for option in execution_options("flower")}


def read_config(keys: Mapping[str, Any]) -> AppConfig:
    """Return what an app's run config says. Raises InputError for values of a wrong kind, and where no recipe is."""
    values: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        key, kind = name.replace("_", "-"), type(default)
        value = keys.get(key, None if name == "recipe" else default)
        value = str(value) if name == "until" and type(value) is int else value
        if not isinstance(value, int | float if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            must = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise InputError(f"-c {key} must be {must}, got {value!r}")
        values[name] = value
    return AppConfig(**values)


def message_key(simulations: bytes | None) -> bytes:
    """Return what messages are sealed with: a simulation's key, or else that of the environment. Raises InputError.

    A simulation takes none from the environment: a cluster's workers have that of whoever started Ray.
    """
    return key_of_run() if simulations is None else simulations


def write_app(folder: Path, config: AppConfig) -> None:
    """Write an app into a new folder. Raises InputError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already: name a new folder")
    _check_recipe(config)
    package = folder / PACKAGE
    package.mkdir(parents=True)
    write(package / "__init__.py", b'"""A Flower app of FedSieve\'s."""\n')
    for half, what in (("server_app", "The server's loop."), ("client_app", "The client's function.")):
        write(package / f"{half}.py", MODULE.format(half=half, what=what).encode())
    config = _with_recipe(package, config)
    names = {"recipe": config.recipe, "package": PACKAGE, "folder": folder}
    text = PROJECT.format(
        **names,
        name=re.sub("[^a-z0-9]+", "-", f"fedsieve-{config.recipe}".lower()).strip("-"),
        description=json.dumps(f"{config.recipe}, run by FedSieve over Flower."),
        config="\n".join(f"{name} = {json.dumps(value)}" for name, value in config.run_config().items()),
        fedsieve=version("fedsieve"),
        flwr=version("flwr"),
    )
    write(folder / "pyproject.toml", text.encode())
    write(folder / "README.md", README.format(**names).encode())
    write(folder / "LICENSE", _licence().encode())


def _check_recipe(config: AppConfig) -> None:
    """Raise InputError for a recipe of the user's own that could not be in a bundle, or that is another at every call.

    Each process of an app calls it.
    """
    if ".py:" not in config.recipe:
        return
    name = Path(config.recipe.rsplit(":", 1)[0]).name
    modules = ("__init__.py", "server_app.py", "client_app.py")
    if name in modules or name.startswith("test_") or name.endswith("_test.py"):
        raise InputError(f"Flower's bundles need the name {name} or leave it out: rename the recipe's file")
    first, second = (described(config.run(Path()).task) for _ in range(2))
    if changing := [name for name, value in first.items() if second[name] != value]:
        raise InputError(
            f"{config.recipe} gives another {changing[0]} at every call, and every process of a Flower app calls it: "
            f"give task.{changing[0]} as a function, or seed what the recipe draws"
        )


def _with_recipe(package: Path, config: AppConfig) -> AppConfig:
    """Copy a recipe of the user's own beside the modules, and return the config that names it there."""
    if ".py:" not in config.recipe:
        return config
    path, function = config.recipe.rsplit(":", 1)
    file = Path(path)
    write(package / file.name, file.read_bytes())
    return replace(config, recipe=f"{file.name}:{function}")


def _licence() -> str:
    """Return the licence that FedSieve has, which is the app's too."""
    for path in files("fedsieve") or []:
        if path.name == "LICENSE":
            return path.read_text()
    return "Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"

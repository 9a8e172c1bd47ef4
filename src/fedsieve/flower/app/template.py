"""Write a Flower app: settings, licence, and two modules that call FedSieve."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from fedsieve.data.storage import write
from fedsieve.engine.federation import described
from fedsieve.flower.app.settings import AppConfig
from fedsieve.types import InputError

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


def write_app(folder: Path, config: AppConfig, licence: str) -> None:
    """Write an app into a new folder. Raises InputError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already: name a new folder")
    _check_name(config)
    _check_same(config)
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
        config=_toml(config),
        fedsieve=version("fedsieve"),
        flwr=version("flwr"),
    )
    write(folder / "pyproject.toml", text.encode())
    write(folder / "README.md", README.format(**names).encode())
    write(folder / "LICENSE", licence.encode())


def _check_name(config: AppConfig) -> None:
    """Raise InputError for a recipe's file that could not be in a bundle."""
    name = Path(config.recipe.rsplit(":", 1)[0]).name
    taken = ("__init__.py", "server_app.py", "client_app.py")
    if ".py:" in config.recipe and (name in taken or name.startswith("test_") or name.endswith("_test.py")):
        raise InputError(f"Flower's bundles need the name {name} or leave it out: rename the recipe's file")


def _check_same(config: AppConfig) -> None:
    """Raise InputError for a recipe that gives another run at every call: each process of an app calls it."""
    if ".py:" not in config.recipe:
        return
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


def _toml(config: AppConfig) -> str:
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in config.run_config().items())


def licence() -> str:
    """Return the licence that FedSieve has, which is the app's too."""
    from importlib.metadata import files

    found = [path for path in files("fedsieve") or [] if path.name == "LICENSE"]
    return (
        found[0].read_text() if found else "Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"
    )

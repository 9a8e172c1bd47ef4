"""What computed a run: FedSieve's version and commit, the hardware, and the user's own code.

Own code are the files of the recipe, model, dataset and method, and of what those import: what is neither FedSieve's,
nor Python's, nor an installed package's, which are known by their versions.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from fedsieve.kernels import library
from fedsieve.types import InputError

INSTALLED = (
    Path(__file__).parents[1],
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
PACKAGES = {"site-packages", "dist-packages"}


def describe_environment() -> dict[str, Any]:
    """Return version, commit, time and hardware as plain JSON."""
    return {
        "version": version("fedsieve"),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "isa": library.loaded_isa() if (why := library.unavailable_reason()) is None else f"none ({why})",
        },
    }


def cpu() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_model() -> str:
    """Return the processor's name with its family and model, which tell generations of one name apart."""
    info = Path("/proc/cpuinfo")
    pairs = [line.partition(":")[::2] for line in info.read_text().splitlines()] if info.exists() else []
    fields = {name.strip(): value.strip() for name, value in pairs}
    return ", ".join(
        [cpu(), *(f"{name[-6:].strip()} {fields[name]}" for name in ("cpu family", "model") if name in fields)]
    )


def _commit() -> str | None:
    """Return the commit of the source tree that is running, with a + if it was changed; None outside a tree."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        tracked = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True)
        commit = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() or None if tracked.returncode == 0 else None


def sources(run: Any, recipe: str = "") -> dict[str, Path]:
    """Return the files of a run's own code by their modules' names: ``mine.py``, ``package.nets.py``.

    ``recipe`` is its name; one of the user's own (``file.py:function``) has been imported.
    """
    waiting = [Path(recipe.rsplit(":", 1)[0]).stem] if ".py:" in recipe else []
    waiting += _modules(run)
    files: dict[str, Path] = {}
    names = set[str]()
    while waiting:
        name = waiting.pop()
        if name in names or (path := _own(name)) is None:
            continue
        names.add(name)
        files[path.name if name in ("__main__", "__mp_main__") else f"{name}.py"] = path
        waiting += _imported(name, path)
        if module := sys.modules.get(name):
            waiting += [other for value in list(vars(module).values()) if (other := _home(value))]
    return files


def _imported(name: str, path: Path) -> Iterator[str]:
    """Yield the names that a file imports, anywhere in it, a number or a function alone among them."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    with suppress(OSError, SyntaxError, ValueError):  # changed since it was imported
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                with suppress(ImportError):
                    base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def hashed(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Return the sha256 of every file, by its name, in the names' order."""
    return {name: hashlib.sha256(contents[name]).hexdigest() for name in sorted(contents)}


def contents_of(files: Mapping[str, Path]) -> dict[str, bytes]:
    """Return what the files hold. Raises InputError."""
    try:
        return {name: path.read_bytes() for name, path in files.items()}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): its code is a part of the run") from None


def _modules(thing: Any) -> Iterator[str]:
    """Yield the modules that a run's dataclasses and functions come from."""
    if isinstance(thing, partial):
        for part in (thing.func, *thing.args, *thing.keywords.values()):
            yield from _modules(part)
    elif isinstance(thing, Mapping):
        for part in thing.values():
            yield from _modules(part)
    elif isinstance(thing, nn.Module):
        yield from (home for module in thing.modules() if (home := _home(module)))
    elif isinstance(thing, tuple | list):
        for part in thing:
            yield from _modules(part)
    elif home := _home(thing):
        yield home
        if is_dataclass(thing) and not isinstance(thing, type):
            for field in fields(thing):
                yield from _modules(getattr(thing, field.name))


def _home(value: Any) -> str | None:
    """Return the name of the module that a value is, or that its function or class stands in."""
    if isinstance(value, ModuleType):
        return value.__name__
    home = value.__module__ if isinstance(value, type | FunctionType) else type(value).__module__
    return home if isinstance(home, str) else None


def _own(name: str) -> Path | None:
    """Return the file of a module of the user's own, imported or not yet; None for all others."""
    file, parent = getattr(sys.modules.get(name), "__file__", None), name.rpartition(".")[0]
    if name not in sys.modules and (not parent or parent in sys.modules):
        with suppress(ImportError, ValueError):
            file = getattr(importlib.util.find_spec(name), "origin", None)
    if not isinstance(file, str) or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    installed = PACKAGES & set(path.parts) or any(path.is_relative_to(place) for place in INSTALLED)
    return None if installed else path

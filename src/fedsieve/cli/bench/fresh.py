"""A measurement in a process of its own, so that no other has a part in its memory and its threads.

Threads that wait for one another spin for about a millisecond before they sleep, as in a plain PyTorch script (GNU's
default): ``fedsieve run``, where runs share the machine, lets them sleep at once, which costs some per cent.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from fedsieve.cli.bench.cases import Case
from fedsieve.types import InputError

SPINNING = {"GOMP_SPINCOUNT": "300000"}
Found = TypeVar("Found")


def fresh(function: Callable[..., Found], case: Case, threads: int, /, **options: Any) -> Found:
    """Return ``function(case, **options)``, computed by a new process with so many threads; plain JSON both ways.

    Raises InputError, with the last line of what that process had to say, if it fails.
    """
    told = json.dumps([function.__module__, function.__name__, asdict(case), threads, options])
    command = [sys.executable, "-m", "fedsieve.cli.bench.fresh", told]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | SPINNING)
    if done.returncode:
        trouble = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise InputError(f"{case.model}, batch {case.batch}, could not be measured: {trouble}")
    found: Found = json.loads(done.stdout)
    return found


def main() -> None:
    """Do what the command line says, and print what it gives."""
    module, name, case, threads, options = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    try:
        found = getattr(importlib.import_module(module), name)(Case(**case), **options)
    except InputError as error:
        sys.exit(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

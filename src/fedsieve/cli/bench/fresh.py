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

from fedsieve.cli.bench.workload import Workload
from fedsieve.types import InputError

SPINNING = {"GOMP_SPINCOUNT": "300000"}
Result = TypeVar("Result")


def run_fresh(function: Callable[..., Result], workload: Workload, threads: int, /, **options: Any) -> Result:
    """Return ``function(workload, **options)``, computed by a new process with so many threads; plain JSON both ways.

    Raises InputError, with the last line of what that process had to say, if it fails.
    """
    request = json.dumps([function.__module__, function.__name__, asdict(workload), threads, options])
    command = [sys.executable, "-m", "fedsieve.cli.bench.fresh", request]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | SPINNING)
    if done.returncode:
        trouble = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise InputError(f"{workload.model}, batch {workload.batch}, could not be measured: {trouble}")
    result: Result = json.loads(done.stdout)
    return result


def _main() -> None:
    """Compute what the command line asks for, and print it as JSON."""
    module, name, workload, threads, options = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    try:
        result = getattr(importlib.import_module(module), name)(Workload(**workload), **options)
    except InputError as error:
        sys.exit(str(error))
    print(json.dumps(result))


if __name__ == "__main__":
    _main()

"""FedSieve: sparse federated learning that is sparse for real."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsieve.client.lora import LoRA
    from fedsieve.client.losses import BinaryCrossEntropy, CrossEntropy, NextToken, Regression
    from fedsieve.client.metrics import Metric
    from fedsieve.data import Dataset
    from fedsieve.engine import Federation, Round, Run, Task, local, open_run, pool, rounds
    from fedsieve.runs.compression import compress
    from fedsieve.runs.frames import load_runs
    from fedsieve.runs.loggers import MLflow, TensorBoard, Trackio, WandB
    from fedsieve.runs.run import RunResult, run
    from fedsieve.types import SGD, AdamW, Data, Device, Expected, InputError, Method, ServerState, Sparse, Update

__version__ = "0.1.0"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP: spinning threads slow busy cores

__all__ = [
    "SGD",
    "AdamW",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Data",
    "Dataset",
    "Device",
    "Expected",
    "Federation",
    "InputError",
    "LoRA",
    "MLflow",
    "Method",
    "Metric",
    "NextToken",
    "Regression",
    "Round",
    "Run",
    "RunResult",
    "ServerState",
    "Sparse",
    "Task",
    "TensorBoard",
    "Trackio",
    "Update",
    "WandB",
    "__version__",
    "compress",
    "load_runs",
    "local",
    "open_run",
    "pool",
    "rounds",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import what is exported, and PyTorch with it, when it is first asked for: `fedsieve --help` needs neither."""
    if name in __all__:
        losses, runs = (
            ("client.metrics", "client.losses", "client.lora"),
            ("runs.run", "runs.loggers", "runs.frames", "runs.compression"),
        )
        for package in ("types", *losses, "data", "engine", *runs):
            exported = import_module(f"fedsieve.{package}")
            if hasattr(exported, name):
                return globals().setdefault(name, getattr(exported, name))
    raise AttributeError(f"module 'fedsieve' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the exported names, for completion."""
    return __all__

"""FedSieve: sparse federated learning that is sparse for real."""

import os

__version__ = "0.1.0"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP: spinning threads slow busy cores

from fedsieve.data import Dataset
from fedsieve.engine import Federation, Round, Run, Task, local, open_run, pool, run
from fedsieve.types import Data, Device, InputError, Method, Sparse, Update

__all__ = [
    "Data",
    "Dataset",
    "Device",
    "Federation",
    "InputError",
    "Method",
    "Round",
    "Run",
    "Sparse",
    "Task",
    "Update",
    "__version__",
    "local",
    "open_run",
    "pool",
    "run",
]

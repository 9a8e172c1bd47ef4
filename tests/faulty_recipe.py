"""A recipe whose clients fail as a test says: the file ROUND-MARK in the folder FEDSIEVE_FAULTS holds how."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from fedsieve import Device, Run, Task, Update
from fedsieve.engine.federation import Federation
from fedsieve.methods import NST
from fedsieve.types import Data, Tree


@dataclass(frozen=True)
class Faulty(NST):
    """NST, whose clients remember their masks, and fail."""

    def client(self, down: Tree, device: Device) -> Update:
        fault = Path(os.environ.get("FEDSIEVE_FAULTS", ".")) / f"{device.round}-{mark(device.data)}"
        if fault.exists():
            how = fault.read_text()
            fault.with_suffix(".met").touch()
            if how == "raise":
                raise OSError("the disk is gone")
            if how == "die":
                os._exit(3)
            time.sleep(600)
        return super().client(down, device)


def mark(data: Data) -> int:
    """Return a number that tells clients apart, who do not know their own."""
    return int(data.y.sum())


def marks(federation: Federation) -> list[int]:
    """Return every client's mark."""
    model = federation.model()
    return [mark(federation.device(1, c, model, "cpu", {}).data) for c in range(federation.run.task.clients)]


def recipe() -> Run:
    """Three clients, all in every round."""
    return Run(Faulty(density=0.2), Task("digits_net", "digits", 3, "lda:1.0"), rounds=5, per_round=3)

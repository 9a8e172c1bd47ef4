"""Random numbers that depend on nothing but a run's seed and what they are for."""

from __future__ import annotations

import hashlib

import torch


def rng(seed: int, role: str, t: int = 0, client: int = 0) -> torch.Generator:
    """Return a CPU generator for one purpose: independent of every other purpose, round, client, and of order."""
    digest = hashlib.sha256(f"fedsieve/{seed}/{role}/{t}/{client}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

"""Loading (provisional)."""
from __future__ import annotations
import ctypes, os
from functools import cache
import torch
@cache
def load() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ.get("FS_LIB", "/tmp/k/libfs.so"))
def reason() -> str | None:
    return None
def threads() -> int:
    return torch.get_num_threads()
def isa() -> str:
    return "avx512"

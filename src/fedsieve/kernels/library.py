"""The shared library of the native kernels: chosen by what the CPU can do, checked, and loaded once a process.

``FEDSIEVE_ISA`` forces an instruction set, or switches the kernels off (``none``); ``FEDSIEVE_KERNELS_DIR`` is another
folder to find the libraries in.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from fedsieve.kernels import decode_ops, token_ops  # noqa: F401  (whose operations are checked, too)
from fedsieve.kernels.abi import Operation
from fedsieve.types import InputError

ABI = 14
"""What ``fs_abi`` of a library must answer: raised whenever a signature changes."""

V2 = "cx16 lahf_lm pni popcnt sse4_1 sse4_2 ssse3"
V3 = f"{V2} abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
V4_BF16 = f"{V4} avx512_bf16"
NEEDS = {"avx512bf16": V4_BF16, "avx512": V4, "avx2": V3, "x86_64": V2}
"""Linux's names for the features of x86-64-v4 (with bfloat16's own instructions, or without), v3 and v2: best first."""
ISAS = (*NEEDS, "aarch64")


def supported_isas() -> tuple[str, ...]:
    """Return the instruction sets that this CPU has, best first: off Linux, only the least of x86."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ("aarch64",)
    if machine not in ("x86_64", "amd64"):
        return ()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ("x86_64",)
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return tuple(isa for isa, needed in NEEDS.items() if flags.issuperset(needed.split()))


def load_library() -> ctypes.CDLL:
    """Return the library. Raises InputError, with the reason, where there is none."""
    library = _find_library()
    if isinstance(library, str):
        raise InputError(f"no native kernels: {library}")
    return library


@cache
def native() -> ctypes.CDLL:
    """Return the library, its functions typed and its structures checked against ours."""
    lib = load_library()
    lib.fs_run.argtypes = [c_void_p, c_int64, c_int]
    lib.fs_run.restype = lib.fs_each.restype = None
    lib.fs_bernoulli.restype, lib.fs_bernoulli.argtypes = None, [c_void_p, c_double, c_void_p, c_int64]
    lib.fs_each.argtypes = [c_void_p, c_void_p, c_int64, c_int]
    lib.fs_size.restype = c_int64
    for name, numbers, lists in (("fs_entries", 6, 3), ("fs_transposed", 8, 4)):
        getattr(lib, name).restype = None
        getattr(lib, name).argtypes = [c_void_p] + [c_int64] * numbers + [c_void_p] * lists
    for kind in Operation.__subclasses__():
        assert lib.fs_size(kind.kind) == ctypes.sizeof(kind), kind.__name__
    return lib


def unavailable_reason() -> str | None:
    """Return in one line why there are no kernels; None where there are. Raises InputError if FEDSIEVE_ISA is wrong."""
    library = _find_library()
    return library if isinstance(library, str) else None


def loaded_isa() -> str:
    """Return the instruction set of the library."""
    return _isa(load_library())


def get_num_threads() -> int:
    """Return how many threads a kernel may use: torch's number, or 1 unless both call the same OpenMP."""
    return torch.get_num_threads() if _one_openmp() else 1


@cache
def _find_library() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    isa, here = os.environ.get("FEDSIEVE_ISA"), supported_isas()
    if isa and isa not in (*ISAS, "none"):
        raise InputError(f"FEDSIEVE_ISA={isa}: there is {', '.join(ISAS)}, and none for no kernels")
    if isa == "none":
        return "FEDSIEVE_ISA=none switches them off"
    if not here:
        return f"this CPU ({platform.machine()}) is not supported"
    if isa and isa not in here:
        return f"FEDSIEVE_ISA={isa}: this CPU lacks it; it has {', '.join(here)}"
    folder = Path(os.environ.get("FEDSIEVE_KERNELS_DIR") or Path(__file__).parent / "native")
    names = [isa] if isa else here
    there = [name for name in names if _path(folder, name).is_file()]
    return _opened(_path(folder, there[0]), there[0]) if there else _absent(folder, names)


def _path(folder: Path, name: str) -> Path:
    return folder / f"libfedsieve-{name}.so"


def _absent(folder: Path, names: list[str] | tuple[str, ...]) -> str:
    try:
        why = (folder / "unbuilt.txt").read_text().strip()
    except OSError:
        why = "they were never compiled"
    return f"no compiled {' or '.join(names)} in {folder}: {why}; `python -m fedsieve.kernels.build` builds them"


def _opened(path: Path, name: str) -> ctypes.CDLL | str:
    remedy = "`python -m fedsieve.kernels.build --force` rebuilds it"
    try:
        if not _whole(path):
            return f"{path} is cut short; {remedy}"
        library = ctypes.CDLL(str(path))
        library.fs_isa.restype = ctypes.c_char_p
        abi, isa = library.fs_abi(), _isa(library)
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded ({error}); {remedy}"
    if abi != ABI:
        return f"{path} is of another version (its ABI is {abi}, not {ABI}); {remedy}"
    return library if isa == name else f"{path} is made for {isa}; {remedy}"


def _isa(library: ctypes.CDLL) -> str:
    name: bytes = library.fs_isa()
    return name.decode()


def _whole(path: Path) -> bool:
    """Tell whether an ELF file reaches to its table of sections, the last thing in it: to load less would crash."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return True
    start: int = struct.unpack_from("<Q", head, 40)[0]
    size, count = struct.unpack_from("<HH", head, 58)
    return path.stat().st_size >= start + int(size) * int(count)


@cache
def _one_openmp() -> bool:
    """Tell whether the library and torch call the same OpenMP; with two pools, threads would fight for the cores."""
    ours = _openmp(load_library())
    return ours is not None and ours == _openmp(ctypes.CDLL(torch._C.__file__))


def _openmp(library: ctypes.CDLL) -> int | None:
    """Return the address of a function of OpenMP, as a library sees it."""
    try:
        return ctypes.cast(library.omp_get_max_threads, c_void_p).value
    except AttributeError:
        return None

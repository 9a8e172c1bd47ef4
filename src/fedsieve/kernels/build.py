"""Compile ``native/*.cpp`` into one shared library an instruction set; which one a CPU takes is decided at load.

``setup.py`` runs this file before anything is installed, so it needs the standard library alone. A machine that
cannot compile is told so in one line and gets no kernels; that is never an error.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

NATIVE = Path(__file__).parent / "native"
UNBUILT = "unbuilt.txt"
"""The file beside the libraries that says why some of them are not there."""

COMMON = "-O3 -std=c++17 -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra -Wno-psabi"
MARCH = {
    "avx512bf16": "-march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx2": "-march=x86-64-v3",
    "x86_64": "-march=x86-64-v2",
    "aarch64": "-march=armv8-a",
}
TARGETS = {
    "x86_64": ("avx512bf16", "avx512", "avx2", "x86_64"),
    "amd64": ("avx512bf16", "avx512", "avx2", "x86_64"),
    "aarch64": ("aarch64",),
    "arm64": ("aarch64",),
}


def targets() -> tuple[str, ...]:
    """Return the instruction sets that are compiled on this machine."""
    return TARGETS.get(platform.machine().lower(), ())


def compiler() -> list[str]:
    """Return the command of the C++ compiler: CXX, or the first of c++, g++ and clang++; empty if it is not there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return []


def options(isa: str) -> list[str]:
    """Return the compiler's options for an instruction set, OpenMP's excepted."""
    return [*COMMON.split(), *MARCH[isa].split(), f'-DFS_ISA="{isa}"']


def openmp(command: Sequence[str]) -> list[str]:
    """Return the options for OpenMP, or those to do without where the compiler cannot build a library that uses it."""
    source = "#include <omp.h>\nint f() { return omp_get_max_threads(); }"
    with TemporaryDirectory() as folder:
        probe = [*command, "-fopenmp", "-fPIC", "-shared", "-x", "c++", "-", "-o", f"{folder}/probe"]
        works = subprocess.run(probe, input=source, capture_output=True, text=True).returncode == 0
    return ["-fopenmp"] if works else ["-Wno-unknown-pragmas"]


def build(into: Path = NATIVE, sources: Path = NATIVE, flags: Sequence[str] = (), *, force: bool = False) -> str:
    """Compile what is older than its sources, or all if ``force``, and return one line that says what happened."""
    try:
        return f"native kernels: {_build(into, sources, flags, force)}"
    except OSError as error:
        return f"native kernels: none built ({error})"


def _build(into: Path, sources: Path, flags: Sequence[str], force: bool) -> str:
    if not targets():
        return f"none (this CPU, {platform.machine()}, is not supported)"
    stale = [isa for isa in targets() if force or _stale(_library(into, isa), sources)]
    if not stale:
        return f"{', '.join(targets())} (up to date)"
    into.mkdir(parents=True, exist_ok=True)
    command = compiler()
    if not command:
        why = f"no C++ compiler found ({os.environ.get('CXX') or 'c++, g++, clang++'})"
        _explain(into, why)
        return f"none built ({why})"
    extra = [*openmp(command), *flags]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda isa: _compile([*command, *options(isa), *extra], _library(into, isa), sources), stale)
        errors = {isa: error for isa, error in zip(stale, results, strict=True) if error}
    failed = {error: ", ".join(isa for isa in errors if errors[isa] == error) for error in errors.values()}
    why = "; ".join(f"{names} failed ({error})" for error, names in failed.items())
    _explain(into, why)
    there = ", ".join(isa for isa in targets() if isa not in errors) or "none"
    alone = "" if "-fopenmp" in extra else " (without OpenMP: one thread)"
    return f"{there}{alone}" + (f"; {why}" if why else "")


def _library(folder: Path, isa: str) -> Path:
    return folder / f"libfedsieve-{isa}.so"


def _stale(library: Path, sources: Path) -> bool:
    needed = [Path(__file__), *sources.glob("*.cpp"), *sources.glob("*.h")]
    return not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in needed)


def _compile(command: list[str], library: Path, sources: Path) -> str:
    """Compile a library beside its place and rename it; return the first error, and leave no old one behind it."""
    partial = library.with_suffix(f".{os.getpid()}.tmp")
    files = [str(path) for path in sorted(sources.glob("*.cpp"))]
    try:
        process = subprocess.run([*command, "-shared", "-o", str(partial), *files], capture_output=True, text=True)
        if process.returncode == 0:
            partial.replace(library)
    finally:
        partial.unlink(missing_ok=True)
    sys.stderr.write(process.stderr)
    if process.returncode == 0:
        return ""
    library.unlink(missing_ok=True)
    lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    return next((line for line in lines if "error" in line), lines[-1]).strip()


def _explain(folder: Path, why: str) -> None:
    if why:
        (folder / UNBUILT).write_text(why + "\n")
    else:
        (folder / UNBUILT).unlink(missing_ok=True)


def run_command_line() -> None:
    """Compile as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m fedsieve.kernels.build", description="Compile the native kernels.")
    parser.add_argument("--force", action="store_true", help="compile even what is newer than its sources")
    parser.add_argument("--into", type=Path, default=NATIVE, metavar="FOLDER", help="where the libraries go")
    parser.add_argument("flags", nargs="*", help="after --: more options for the compiler")
    arguments = parser.parse_args()
    force = arguments.force or bool(arguments.flags)
    print(build(arguments.into, flags=arguments.flags, force=force))


if __name__ == "__main__":
    run_command_line()

"""The kernels without Python: each file of ``tests/native`` is a program that ends with 0 if all is well.

It is compiled with the kernels, FS_ISA given and warnings being errors, and run for every instruction set of this CPU;
for aarch64 elsewhere under qemu, where that and the compiler are installed (``scripts/aarch64`` does).
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fedsieve.kernels import build, library

DRIVERS = sorted((Path(__file__).parents[1] / "native").glob("*.cpp"))
CROSS = ("aarch64-linux-gnu-g++", "qemu-aarch64")
pytestmark = pytest.mark.system


def run(*words: str, folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("isa", library.ISAS)
def test_native(isa: str, tmp_path: Path) -> None:
    compiler, runner = build.compiler(), list[str]()
    if isa == "aarch64" and platform.machine() == "x86_64":
        if not all(map(shutil.which, CROSS)):
            pytest.skip("needs what scripts/aarch64 installs")
        compiler, runner = [CROSS[0], "-static"], [CROSS[1]]
    elif isa not in library.supported_isas() or not compiler:
        pytest.skip("no compiler, or this CPU lacks it")
    command = [*compiler, *build.options(isa), *build.openmp(compiler), f"-I{build.NATIVE}"]
    run(*command, "-Werror", "-c", *map(str, sorted(build.NATIVE.glob("*.cpp"))), folder=tmp_path)
    objects = [path.name for path in tmp_path.glob("*.o")]
    for driver in DRIVERS:
        run(*command, str(driver), *objects, "-o", driver.stem, folder=tmp_path)
        run(*runner, f"./{driver.stem}", folder=tmp_path)

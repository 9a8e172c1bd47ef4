"""The kernels without Python: each file of ``tests/native`` is a program that ends with 0 if all is well.

It is compiled with the kernels, FS_ISA given, and run for every instruction set of this CPU; for aarch64 elsewhere
under qemu, where that and the compiler are installed (``scripts/aarch64`` does).
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


@pytest.fixture(scope="module", params=library.ISAS)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path, list[str]]:
    """How a driver is compiled, the folder with the kernels' object files, and how it is run."""
    isa, folder = request.param, tmp_path_factory.mktemp(request.param)
    compiler, runner = build.compiler(), list[str]()
    if isa == "aarch64" and platform.machine() == "x86_64":
        if not all(map(shutil.which, CROSS)):
            pytest.skip("needs what scripts/aarch64 installs")
        compiler, runner = [CROSS[0], "-static"], [CROSS[1]]
    elif isa not in library.supported_isas() or not compiler:
        pytest.skip("no compiler, or this CPU lacks it")
    command = [*compiler, *build.options(isa), *build.openmp(compiler), f"-I{build.NATIVE}"]
    run(*command, "-c", *map(str, sorted(build.NATIVE.glob("*.cpp"))), folder=folder)
    return command, folder, runner


@pytest.mark.parametrize("driver", DRIVERS, ids=lambda path: path.stem)
def test_native(driver: Path, machine: tuple[list[str], Path, list[str]]) -> None:
    command, folder, runner = machine
    objects = [path.name for path in folder.glob("*.o")]
    run(*command, str(driver), *objects, "-o", "driver", folder=folder)
    run(*runner, "./driver", folder=folder)

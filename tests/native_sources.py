"""Sources that are only what loading needs, and what tests of compiling them need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsieve.kernels import build, library

ROOT = Path(__file__).parents[1]


SOURCE = """
#include <omp.h>
extern "C" const char* fs_isa(void) { return FS_ISA; }
extern "C" int fs_abi(void) { return ABI; }
extern "C" int team(int n) {
    int got = 0;
#pragma omp parallel num_threads(n)
#pragma omp atomic
    got++;
    return got;
}
"""


HERE = library.supported_isas()


SHARED = pytest.mark.skipif(not HERE or not build.compiler(), reason="no compiler, or a CPU without kernels")


def python(*words: str, **env: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return done.stdout

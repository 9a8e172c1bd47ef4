"""What is published: a wheel and a source archive of this tree, each put to use on its own."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import fedsieve
from fedsieve.kernels import build, library

ROOT = Path(__file__).parent.parent
BARE = {"PATH": "/nonexistent", "CC": "/nonexistent", "CXX": "/nonexistent", "HOME": "/nonexistent"}
"""The environment of a machine without a compiler."""


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


def output(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = run(*command, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, whose kernels need not be compiled again."""
    copy = tmp_path_factory.mktemp("packages") / "checkout"
    anywhere = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so")
    top = {"build", "dist", "runs", "sweeps", "site"}
    shutil.copytree(ROOT, copy, ignore=lambda at, names: {*anywhere(at, names), *(top if at == str(ROOT) else ())})
    native = copy / "build/lib/fedsieve/kernels/native"
    native.mkdir(parents=True)
    for path in build.NATIVE.glob("*.so"):
        shutil.copy2(path, native)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    place = checkout.parent / "wheels"
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    output(*pip, "--wheel-dir", place, checkout, cwd=checkout)
    (found,) = place.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder of the commands of an environment that has the wheel, and what it needs from this environment."""
    place = wheel.parent.parent / "venv"
    output(sys.executable, "-m", "venv", "--without-pip", place, cwd=wheel.parent)
    commands = place / "bin"
    pip = (sys.executable, "-m", "pip", "--python", commands / "python", "install", "--quiet", "--no-deps")
    output(*pip, wheel, cwd=wheel.parent, env=os.environ | BARE | {"HOME": str(place)})
    (site,) = place.glob("lib/python*/site-packages")
    (site / "other.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return commands


@pytest.mark.system
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {name.split("/")[0] for name in names} == {"fedsieve", f"fedsieve-{version('fedsieve')}.dist-info"}
    package = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/fedsieve").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name and not name.endswith("unbuilt.txt")}
    assert {name for name in names if name.startswith("fedsieve/")} == package
    assert f"\nVersion: {fedsieve.__version__}\n" in about
    assert "\nLicense-Expression: Apache-2.0 AND CC-BY-4.0 AND BSD-3-Clause\n" in about
    assert "\nDescription-Content-Type: text/markdown\n" in about
    targets = re.findall(r"\]\(([^)]+)\)", about)
    assert len(targets) > 20
    assert all(target.startswith("https://") for target in targets)


@pytest.mark.system
@pytest.mark.skipif(not build.compiler(), reason="no compiler: the wheel has no kernels")
@pytest.mark.skipif(library.unavailable_reason() is not None, reason="no kernels here")
def test_the_wheel_works_where_there_is_no_compiler(installed: Path, tmp_path: Path) -> None:
    assert output(installed / "fedsieve", "--version", cwd=tmp_path, env=BARE) == f"fedsieve {fedsieve.__version__}\n"
    place = output(installed / "python", "-c", "import fedsieve; print(fedsieve.__file__)", cwd=tmp_path, env=BARE)
    assert Path(place).is_relative_to(installed.parent)
    for threads in ("1", "2"):
        said = run(installed / "fedsieve", "doctor", cwd=tmp_path, env=BARE | {"OMP_NUM_THREADS": threads}).stdout
        assert f"fine  the sparse kernels are there and use as many threads as PyTorch: {threads}\n" in said
    said = output(installed / "fedsieve", "run", "pdst.digits", "-s", "rounds=1", cwd=tmp_path, env=BARE)
    assert "round 1/1  accuracy" in said


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_a_repaired_wheel_brings_no_openmp_of_its_own(wheel: Path, tmp_path: Path) -> None:
    command = re.findall(r'^repair-wheel-command = "(auditwheel .*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    words = command[0].format(dest_dir=tmp_path, wheel=wheel).split()
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output(sys.executable, "-m", *words, cwd=tmp_path, env=env)
    (repaired,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(repaired) as archive:
        assert not [name for name in archive.namelist() if "libgomp" in name]


@pytest.mark.system
def test_the_source_archive_passes_its_own_quick_tests(checkout: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    name = output(sys.executable, "-W", "ignore", "-c", code, cwd=checkout).splitlines()[-1]
    output("tar", "xzf", name, cwd=tmp_path)
    (root,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not list(root.rglob("*.so"))
    env = os.environ | {"PYTHONPATH": str(root / "src"), "FEDSIEVE_KERNELS_DIR": str(build.NATIVE)}
    quick = ("data/test_data.py", "server/test_server.py", "wire/test_wire_golden.py", "test_golden.py")
    checks = ("tests/test_docs.py", "-k", "not demo and not example")
    for files in ([f"tests/{file}" for file in quick], checks):
        said = output(
            sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files, cwd=root, env=env
        )
        assert " passed" in said

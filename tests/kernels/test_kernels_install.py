"""What an installation compiles and brings, with a compiler and without."""

import platform
import shutil
import zipfile
from pathlib import Path

import pytest

from fedsieve.kernels import build, library
from native_sources import ROOT, SHARED, SOURCE, python


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What an installation needs, with sources that compile in a moment."""
    copy = tmp_path / "checkout"
    built = shutil.ignore_patterns("*.so", "unbuilt.txt", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", copy / "src", ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    native = copy / "src/fedsieve/kernels/native"
    shutil.rmtree(native)
    native.mkdir()
    (native / "abi.cpp").write_text('#include "abi.h"\n' + SOURCE.replace("ABI;", f"{library.ABI};"))
    (native / "abi.h").touch()
    return copy


PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")


LOCAL = ("--no-deps", "--no-build-isolation")


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "fedsieve/kernels/native").glob("*")}


@pytest.mark.system
@SHARED
def test_an_installation_brings_its_libraries(checkout: Path, tmp_path: Path) -> None:
    python(*PIP, "install", *LOCAL, "--target", str(tmp_path / "site"), str(checkout))
    libraries = {f"libfedsieve-{isa}.so" for isa in build.targets()}
    assert names(tmp_path / "site") == {"abi.cpp", "abi.h"} | libraries
    code = "from fedsieve.kernels import library; print(library.__file__, library.unavailable_reason())"
    said = python("-c", code, PYTHONPATH=str(tmp_path / "site"), FEDSIEVE_KERNELS_DIR="")
    assert said == f"{tmp_path}/site/fedsieve/kernels/library.py None\n"
    assert not list((checkout / "src").rglob("*.so"))


@pytest.mark.system
def test_an_installation_without_a_compiler_succeeds(checkout: Path, tmp_path: Path) -> None:
    python(*PIP, "install", *LOCAL, "--target", str(tmp_path / "site"), str(checkout), CXX="/nonexistent")
    assert names(tmp_path / "site") == {"abi.cpp", "abi.h", "unbuilt.txt"}
    code = "from fedsieve.kernels import library; print(library.unavailable_reason())"
    said = python("-c", code, PYTHONPATH=str(tmp_path / "site"), FEDSIEVE_KERNELS_DIR="")
    assert "no C++ compiler found (/nonexistent);" in said


@pytest.mark.system
@SHARED
def test_an_editable_installation_compiles_in_place(checkout: Path, tmp_path: Path) -> None:
    target = ("--target", str(tmp_path / "site"))
    python(*PIP, "install", *LOCAL, *target, "--editable", str(checkout))
    assert {f"libfedsieve-{isa}.so" for isa in build.targets()} < names(checkout / "src")


@pytest.mark.system
@SHARED
@pytest.mark.parametrize("compiler", [True, False])
def test_the_wheel_is_for_this_platform_if_it_holds_libraries(compiler: bool, checkout: Path, tmp_path: Path) -> None:
    env = {} if compiler else {"CXX": "/nonexistent"}
    python(*PIP, "wheel", *LOCAL, "--wheel-dir", str(tmp_path / "wheels"), str(checkout), **env)
    (wheel,) = (tmp_path / "wheels").iterdir()
    tag = wheel.stem.partition("-py3-none-")[2]
    assert platform.machine() in tag if compiler else tag == "any"
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith(".so") for name in archive.namelist()) == compiler
        (about,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/WHEEL"))
    assert f"Root-Is-Purelib: {str(not compiler).lower()}\n" in about
    assert f"Tag: py3-none-{tag}\n" in about


@pytest.mark.system
def test_the_source_archive_holds_the_sources(checkout: Path, tmp_path: Path) -> None:
    code = "import os, setuptools.build_meta as b; os.chdir({!r}); print(b.build_sdist({!r}))"
    name = python("-W", "ignore", "-c", code.format(str(checkout), str(tmp_path))).splitlines()[-1]
    shutil.unpack_archive(tmp_path / name, tmp_path / "unpacked")
    (root,) = (tmp_path / "unpacked").iterdir()
    assert names(root / "src") == {"abi.cpp", "abi.h"}
    assert (root / "setup.py").exists()

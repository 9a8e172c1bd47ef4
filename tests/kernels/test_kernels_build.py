"""Compiling, choosing and loading the native kernels; and what is said where that fails."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedsieve import InputError
from fedsieve.kernels import build, library
from native_sources import HERE, ROOT, SHARED, SOURCE, python

BUILD = str(ROOT / "src/fedsieve/kernels/build.py")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources that are only what loading needs, compiled for every instruction set."""
    folder = tmp_path_factory.mktemp("native")
    (folder / "abi.cpp").write_text(SOURCE.replace("ABI;", f"{library.ABI};"))
    assert build.build(folder, folder) == f"native kernels: {', '.join(build.targets())}"
    return folder


@pytest.fixture
def folder(compiled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(compiled, tmp_path / "native")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look for the libraries in the test's own folder, and forget afterwards what was found there."""
    monkeypatch.delenv("FEDSIEVE_ISA", raising=False)
    monkeypatch.setenv("FEDSIEVE_KERNELS_DIR", str(tmp_path / "native"))
    _forget()
    yield
    _forget()


def _forget() -> None:
    library._find_library.cache_clear()
    library._one_openmp.cache_clear()


def best(folder: Path) -> Path:
    return folder / f"libfedsieve-{HERE[0]}.so"


def test_what_is_compiled_is_what_can_be_loaded() -> None:
    assert tuple(build.MARCH) == library.ISAS
    assert {name for names in build.TARGETS.values() for name in names} == set(library.ISAS)
    assert set(HERE) <= set(build.targets())


@SHARED
@pytest.mark.parametrize("isa", build.targets())
@pytest.mark.system
def test_an_instruction_set_can_be_forced(isa: str, folder: Path) -> None:
    if isa not in HERE:
        pytest.skip("this CPU lacks it")
    code = "from fedsieve.kernels.library import *; print(loaded_isa(), load_library()._name)"
    assert python("-c", code, FEDSIEVE_ISA=isa) == f"{isa} {folder}/libfedsieve-{isa}.so\n"


@SHARED
def test_the_best_that_is_there_is_taken(folder: Path) -> None:
    assert library.loaded_isa() == HERE[0]
    if len(HERE) > 1:
        best(folder).unlink()
        _forget()
        assert library.loaded_isa() == HERE[1]


@SHARED
@pytest.mark.system
def test_threads_are_torchs_even_beside_another_openmp(folder: Path) -> None:
    code = """
import sklearn.cluster, torch  # brings an OpenMP of its own
from fedsieve.kernels.library import get_num_threads, load_library
torch.set_num_threads(2)
print(get_num_threads(), load_library().team(2))
"""
    assert python("-c", code) == "2 2\n"


@SHARED
def test_one_thread_where_the_library_has_another_openmp_than_torch(folder: Path) -> None:
    (folder / "own.cpp").write_text('extern "C" int omp_get_max_threads() { return 7; }')
    build.build(folder, folder, force=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert library.unavailable_reason() is None
        assert library.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@SHARED
def test_only_what_is_older_than_its_sources_is_compiled_again(folder: Path) -> None:
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.so")}
    assert build.build(folder, folder).endswith("(up to date)")
    best(folder).unlink()
    build.build(folder, folder)
    second = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.so")}
    assert {name for name in first if first[name] != second[name]} == {best(folder).name}
    (folder / "new.h").touch()
    assert not build.build(folder, folder).endswith("(up to date)")


@pytest.mark.skipif(not HERE, reason="a CPU without kernels")
@pytest.mark.parametrize("env", [{"CXX": "/nonexistent"}, {"CXX": "", "PATH": "/nonexistent"}], ids=["CXX", "PATH"])
def test_without_a_compiler_one_line_says_so(env: dict[str, str], tmp_path: Path) -> None:
    said = python(BUILD, "--into", str(tmp_path / "native"), **env)
    assert said.startswith("native kernels: none built (no C++ compiler found (")
    assert said.count("\n") == 1
    why = library.unavailable_reason()
    assert why is not None
    assert f"in {tmp_path / 'native'}: no C++ compiler found (" in why
    assert why.endswith("; `python -m fedsieve.kernels.build` builds them")
    assert "\n" not in why


def test_without_libraries_load_gives_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^no native kernels: no compiled .* they were never compiled; `python -m"):
        library.load_library()


@SHARED
def test_an_error_in_the_sources_is_one_line_and_leaves_no_old_library(folder: Path) -> None:
    (folder / "wrong.cpp").write_text("#error not this\n")
    said = build.build(folder, folder)
    assert said.startswith(f"native kernels: none; {', '.join(build.targets())} failed (")
    assert said.count("not this") == 1
    assert "\n" not in said
    assert not list(folder.glob("*.so"))
    assert "not this" in str(library.unavailable_reason())
    (folder / "wrong.cpp").unlink()
    build.build(folder, folder)
    _forget()
    assert library.unavailable_reason() is None
    assert sorted(path.suffix for path in folder.iterdir()) == [".cpp", *[".so"] * len(build.targets())]


@SHARED
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 has more than one")
def test_one_instruction_set_that_fails_leaves_the_others(folder: Path) -> None:
    (folder / "wrong.cpp").write_text("#ifdef __AVX512F__\n#error not this\n#endif\n")
    said = build.build(folder, folder)
    assert said.startswith("native kernels: avx2, x86_64; avx512bf16, avx512 failed (")
    assert not (folder / "libfedsieve-avx512.so").exists()


@SHARED
@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert build.build(tmp_path / "file").startswith("native kernels: none built (")


@SHARED
def test_a_compiler_without_openmp_compiles_for_one_thread(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = " ".join(build.compiler())
    fake = tmp_path / "without-openmp"
    fake.write_text(f'#!/bin/sh\nfor word; do [ "$word" != -fopenmp ] || exit 1; done\nexec {real} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    (tmp_path / "native").mkdir()
    (tmp_path / "native/abi.cpp").write_text(
        SOURCE.replace("ABI;", f"{library.ABI};").replace("#include <omp.h>\n", "")
    )
    said = build.build(tmp_path / "native", tmp_path / "native")
    assert said == f"native kernels: {', '.join(build.targets())} (without OpenMP: one thread)"
    assert library.load_library().team(2) == 1
    assert library.get_num_threads() == 1


@SHARED
@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"garbage" * 1000, b"\x7fELF" + b"\xff" * 4096], ids=len)
def test_garbage_is_not_loaded(content: bytes, folder: Path) -> None:
    best(folder).unlink()
    best(folder).write_bytes(content)
    _check_broken(folder)


@SHARED
@pytest.mark.slow
def test_a_library_that_is_cut_short_is_not_loaded(folder: Path) -> None:
    code = """
import sys
from pathlib import Path
from fedsieve.kernels import library

path = Path(sys.argv[1])
whole = path.read_bytes()
for share in (0.01, 0.3, 0.6, 0.9, 0.999):
    path.unlink()
    path.write_bytes(whole[: int(share * len(whole))])
    library._find_library.cache_clear()
    print(library.unavailable_reason())
"""
    said = python("-c", code, str(best(folder))).splitlines()
    assert len(said) == 5
    assert all(line.startswith(f"{best(folder)} is cut short; ") for line in said)


def _check_broken(folder: Path) -> None:
    """One line that names the file; and its advice helps."""
    why = library.unavailable_reason()
    assert why is not None
    assert why.startswith(str(best(folder)))
    assert why.endswith("`python -m fedsieve.kernels.build --force` rebuilds it")
    assert "\n" not in why
    assert "none" not in build.build(folder, folder, force=True)
    _forget()


@SHARED
@pytest.mark.parametrize("other", [library.ABI - 1, library.ABI + 1])
def test_a_library_of_another_version_is_not_used(folder: Path, other: int) -> None:
    (folder / "abi.cpp").write_text(SOURCE.replace("ABI;", f"{other};"))
    build.build(folder, folder)
    assert f"(its ABI is {other}, not {library.ABI})" in str(library.unavailable_reason())


@SHARED
def test_a_library_that_is_not_of_the_kernels_is_not_used(folder: Path) -> None:
    (folder / "abi.cpp").write_text('extern "C" int other() { return 0; }')
    build.build(folder, folder)
    assert "undefined symbol: fs_isa" in str(library.unavailable_reason())


@SHARED
@pytest.mark.skipif(len(HERE) < 2, reason="one instruction set")
def test_a_library_under_anothers_name_is_not_used(folder: Path) -> None:
    shutil.copy(folder / f"libfedsieve-{HERE[1]}.so", best(folder))
    assert f"is made for {HERE[1]};" in str(library.unavailable_reason())


@pytest.mark.parametrize("value", ["avx", "AVX2", "neon"])
def test_an_unknown_instruction_set_is_a_mistake(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIEVE_ISA", value)
    for ask in (library.unavailable_reason, library.load_library, library.loaded_isa, library.get_num_threads):
        with pytest.raises(
            InputError, match=f"FEDSIEVE_ISA={value}: .*avx512bf16, avx512, avx2, x86_64, aarch64, .*none"
        ):
            ask()


def test_none_switches_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIEVE_ISA", "none")
    assert library.unavailable_reason() == "FEDSIEVE_ISA=none switches them off"


def test_the_cpu_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"x86_64": library.V2, "avx2": library.V3, "avx512": library.V4, "avx512bf16": library.V4_BF16}

    def cpu(machine: str, info: str) -> tuple[str, ...]:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(Path, "read_text", lambda self: f"processor : 0\nflags\t\t: {info}\n")
        return library.supported_isas()

    assert cpu("x86_64", flags["avx512bf16"]) == ("avx512bf16", "avx512", "avx2", "x86_64")
    assert cpu("x86_64", flags["avx512"]) == ("avx512", "avx2", "x86_64")
    assert cpu("x86_64", flags["avx512"].replace("avx512vl", "")) == ("avx2", "x86_64")
    assert cpu("x86_64", flags["avx2"].replace("fma", "fma4")) == ("x86_64",)
    assert cpu("x86_64", "sse sse2") == ()
    assert cpu("aarch64", "") == cpu("arm64", "") == ("aarch64",)
    assert cpu("riscv64", "") == ()
    assert library.unavailable_reason() == "this CPU (riscv64) is not supported"
    assert build.build(Path("nowhere")) == "native kernels: none (this CPU, riscv64, is not supported)"
    cpu("x86_64", flags["avx2"])
    _forget()
    monkeypatch.setenv("FEDSIEVE_ISA", "avx512")
    assert library.unavailable_reason() == "FEDSIEVE_ISA=avx512: this CPU lacks it; it has avx2, x86_64"


@SHARED
@pytest.mark.system
def test_the_sources_compile_without_a_warning_where_there_is_no_openmp() -> None:
    """With OpenMP, tests/kernels/test_native.py compiles them for every instruction set, warnings being errors."""
    serial = [*build.options(build.targets()[0]), "-Wno-unknown-pragmas", "-Werror", "-fsyntax-only"]
    command = [*build.compiler(), *serial, *map(str, build.NATIVE.glob("*.cpp"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The faults that ``scripts/mutants`` plants: each has one place in the sources, and tests that are to notice it."""

import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    loader = SourceFileLoader("mutants", str(ROOT / "scripts" / "mutants"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setitem(sys.modules, loader.name, module)
        loader.exec_module(module)
        yield module


def test_every_mutant_has_one_place_in_the_sources_and_files_of_tests(script: ModuleType) -> None:
    sources, listed = script.sources_of(ROOT), script.mutants()
    assert len({mutant.id for mutant in listed}) == len(listed) >= 150
    for mutant in listed:
        mutant.place(sources)
        assert mutant.replace != mutant.find
        assert mutant.selections(ROOT / "tests")


def test_what_stands_nowhere_or_twice_cannot_be_planted(script: ModuleType) -> None:
    mutant = script.Mutant("a", "b", "x = 1", "x = 2", ("test_mutants.py", "test_of_nothing.py"))
    for text in ("y = 1", "x = 1; x = 1"):
        with pytest.raises(script.NotPlantable, match="in the sources"):
            mutant.place({Path("a.py"): text})
    with pytest.raises(script.NotPlantable, match=r"0 files of tests are called test_of_nothing\.py"):
        mutant.selections(ROOT / "tests")

"""The layers, held by reading the imports; and what must not be there."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import fedsieve

ROOT = Path(fedsieve.__file__).parent
LAYERS = [
    {"types", "sparse", "wire", "data"},
    {"kernels", "client", "server"},
    {"methods", "engine"},
    {"recipes", "runs"},
    {"report", "flower", "cli"},
]


def module(path: Path) -> str:
    """Return a file's module, below ``fedsieve``: ``engine.loop``, or ``engine`` for its ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {module(p): p for p in sorted(ROOT.rglob("*.py")) if p.parent != ROOT or not p.stem.startswith("__")}


@cache
def names(path: Path) -> set[str]:
    """Return what a file imports, anywhere in it: ``flwr.app``, ``fedsieve.types.Data``."""
    tree = ast.parse(path.read_text())
    whole = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return whole | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


@cache
def imports(path: Path) -> set[str]:
    """Return the modules of FedSieve that a file imports, also inside functions and for type checking alone."""
    inside = {name.removeprefix("fedsieve.") for name in names(path) if name.startswith("fedsieve.")}
    return {name if name in modules() else name.rpartition(".")[0] for name in inside} & modules().keys()


def test_layers() -> None:
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    for name, path in modules().items():
        for other in imports(path):
            assert layer[other.split(".")[0]] <= layer[name.split(".")[0]], (name, other)


def test_the_top_is_small() -> None:
    assert {name.split(".")[0] for name in modules()} == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) <= 14


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return what is left when all that imports nothing of it, or is imported by nothing of it, is taken away."""
    left = {name: others - {name} for name, others in arrows.items()}
    while free := {n for n in left if not left[n]} | (left.keys() - set().union(*left.values())):
        left = {name: others - free for name, others in left.items() if name not in free}
    return sorted(left)


def test_no_circle() -> None:
    assert circle({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b"]
    assert circle({name: imports(path) for name, path in modules().items()}) == []


def test_no_circle_of_packages() -> None:
    arrows: dict[str, set[str]] = {}
    for name, path in modules().items():
        arrows.setdefault(name.split(".")[0], set()).update(other.split(".")[0] for other in imports(path))
    assert circle(arrows) == []


def test_no_name_is_defined_twice() -> None:
    kinds = ast.ClassDef | ast.FunctionDef
    defined = [
        node.name for path in modules().values() for node in ast.parse(path.read_text()).body if isinstance(node, kinds)
    ]
    classes_and_functions = Counter(name for name in defined if name[0] != "_" or name[1].isupper())
    assert {name for name, times in classes_and_functions.items() if times > 1} == set()


def test_no_export_hides_a_module() -> None:
    hidden = []
    for name in modules():
        package, _, stem = name.rpartition(".")
        exported = getattr(importlib.import_module(f"fedsieve.{package}".rstrip(".")), stem, None)
        if exported is not None and not isinstance(exported, ModuleType):
            hidden.append(name)
    assert hidden == []


def test_methods_know_neither_engine_nor_wire_nor_one_another() -> None:
    for path in (ROOT / "methods").glob("[a-z]*.py"):
        assert not {"engine", "wire", "methods"} & {name.split(".")[0] for name in imports(path)}, path


def test_nothing_unpickles() -> None:
    for path in modules().values():
        text = path.read_text()
        assert not {"pickle", "cloudpickle", "joblib", "shelve", "marshal"} & {n.split(".")[0] for n in names(path)}
        assert "torch.load" not in text, path
        assert "allow_pickle=True" not in text, path


def test_flower_is_imported_by_its_package_alone() -> None:
    for name, path in modules().items():
        if not name.startswith("flower."):
            assert not {n.split(".")[0] for n in names(path)} & {"flwr", "ray"}, path


@pytest.mark.parametrize("module", ["fedsieve.flower.engine", "fedsieve.flower.mod"])
@pytest.mark.system
def test_fedsieve_and_its_command_line_need_no_flower(module: str) -> None:
    code = f"import sys; sys.modules['flwr'] = None; import fedsieve.cli, {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("eeds Flower: pip install '.[flower]' in FedSieve's checkout")
    assert "cli" not in done.stderr.splitlines()[-2]


def test_exports_exist() -> None:
    assert all(hasattr(fedsieve, name) for name in fedsieve.__all__)


def test_files_stay_small() -> None:
    for path in modules().values():
        assert len(path.read_text().splitlines()) <= 350, path


def test_no_test_file_imports_another() -> None:
    files = [*Path(__file__).parent.rglob("*.py")]
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    for path in files:
        imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)
        assert not tests & {*imported}, path

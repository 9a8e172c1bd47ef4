"""The layers, held by reading the imports; and what must not be there."""

import ast
import subprocess
import sys
from pathlib import Path

import fedsieve

ROOT = Path(fedsieve.__file__).parent
ORDER = [
    {"types"},
    {"sparsity", "files", "failures"},
    {"wire", "layers", "server", "data", "models"},
    {"kernels", "expected", "flower", "products"},
    {"local", "robust", "privacy"},
    {"masks", "work"},
    {"measures"},
    {"methods"},
    {"engine"},
    {"recipes", "settings", "circumstances", "summary"},
    {"run_json", "checkpoints", "source"},
    {"store"},
    {"recorded", "drawing", "output", "published", "units"},
    {"configurations"},
    {"figures", "plots", "deployed"},
    {"gallery"},
    {"report", "progress", "catalogue"},
    {"flower_app"},
    {"doctor", "launch"},
    {"sweep"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    found = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return found + [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_module_has_its_layer_and_imports_only_lower_ones() -> None:
    for path in modules():
        own = part(path)
        for name in imports(path):
            if name.startswith("fedsieve."):
                other = name.split(".")[1]
                assert LEVEL[other] < LEVEL[own] or other == own or {own, other} == {"local", "sparsity"}, (path, name)


def test_methods_know_neither_engine_nor_wire_nor_one_another() -> None:
    for path in (ROOT / "methods").glob("[a-z]*.py"):
        inside = [name.split(".")[1] for name in imports(path) if name.startswith("fedsieve.")]
        assert not {"engine", "wire", "methods"} & set(inside), path


def test_nothing_unpickles() -> None:
    for path in modules():
        names = imports(path)
        text = path.read_text()
        assert not {"pickle", "cloudpickle", "joblib", "shelve", "marshal"} & set(names), path
        assert "torch.load" not in text, path
        assert "allow_pickle=True" not in text, path


def test_flower_is_imported_by_its_engine_and_the_drop_in_alone() -> None:
    inside = (ROOT / "engine/flower", ROOT / "flower")
    outside = [p for p in modules() if not any(p.is_relative_to(folder) for folder in inside)]
    for path in outside:
        types_only = path == ROOT / "flower_app/__init__.py"
        assert not {name.split(".")[0] for name in imports(path)} & {"flwr", "ray"} or types_only, path


def test_fedsieve_and_its_command_line_need_no_flower() -> None:
    code = "import sys; sys.modules['flwr'] = None; import fedsieve.cli, fedsieve.engine.flower"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("this needs Flower: pip install '.[flower]' in FedSieve's checkout")
    assert "cli" not in done.stderr.splitlines()[-2]


def test_exports_exist() -> None:
    assert all(hasattr(fedsieve, name) for name in fedsieve.__all__)


def test_files_stay_small() -> None:
    for path in modules():
        assert len(path.read_text().splitlines()) <= 350, path

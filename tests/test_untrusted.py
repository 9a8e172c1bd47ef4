"""Nothing that network bytes or checkpoints reach can run what they hold: read from the syntax trees of all of src/."""

import ast
from pathlib import Path

import pytest

import fedsieve

ROOT = Path(fedsieve.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
FORBIDDEN_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "runpy",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"torch.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load", "np.fromfile"}
PICKLERS = {"multiprocessing.reduction"}
"""Asks whether something can be sent to a process of one's own (engine/engines.py); reads nothing."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(source: str) -> list[str]:
    """Return what a module must not do, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [
                f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES
            ]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            if module.split(".")[0] in FORBIDDEN_MODULES or names & FORBIDDEN_METHODS:
                found.append(f"{node.lineno}: from {module}")
        elif isinstance(node, ast.Call):
            name, unpickles = dotted(node.func), True
            for told in node.keywords:
                if told.arg == "allow_pickle":
                    unpickles = not (isinstance(told.value, ast.Constant) and told.value.value is False)
                    found += [f"{node.lineno}: allow_pickle"] * unpickles
            if name in FORBIDDEN_CALLS or (name in FORBIDDEN_METHODS and unpickles):
                found.append(f"{node.lineno}: {name}()")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_evaluates(path: Path) -> None:
    assert offences(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load(x)",
        "torch.load(x, weights_only=True)",
        "torch.jit.load(x)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "np.load(x, allow_pickle=y)",
        "open_array(x, allow_pickle=True)",
        "eval('1')",
        "exec(x)",
        "__import__(x)",
        "import yaml",
        "import dill.source",
    ],
)
def test_the_rule_sees(source: str) -> None:
    assert offences(source)


def test_the_rule_lets_plain_arrays_pass() -> None:
    assert offences("np.load(x, allow_pickle=False)\nmodel.eval()\nre.compile(x)") == []


def test_the_rule_reads_all_modules_there_are() -> None:
    assert {"wire", "engine", "sweep"} <= {path.parent.name for path in MODULES}
    assert ROOT / "runs/recorder.py" in MODULES


def test_pool_asks_only_whether_something_can_be_sent() -> None:
    users = [path for path in MODULES if any(name in path.read_text() for name in PICKLERS)]
    assert users == [ROOT / "engine/engines.py"]
    assert "ForkingPickler.loads" not in users[0].read_text()

"""The files around the code say the same as the code: versions, papers, scripts, what hosted CI runs."""

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fedsieve
from fedsieve.methods import METHODS

yaml = pytest.importorskip("yaml", reason="the docs' tools are not installed: pip install '.[docs]'")
ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_hosted_ci_runs_every_python_with_lowest_and_newest_versions() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["project"]["classifiers"]), re.M)
    assert jobs["tests"]["strategy"]["matrix"] == {"python": named, "versions": ["lowest", "newest"]}
    assert f">={named[0]}" == PROJECT["project"]["requires-python"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert {"scripts/setup", "bash .ci/run", ".venv/bin/mkdocs build --strict"} <= {*steps}
    for script in re.findall(r"scripts/\w+", " ".join(steps)):
        assert (ROOT / script).exists()


DISTRIBUTIONS = {"PIL": "pillow", "dp_accounting": "dp-accounting", "ray": "flwr", "markupsafe": "jinja2"}
"""What a module is installed by, where its name is another; two come with others."""


def test_what_is_imported_is_declared() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    names = {re.split(r"[^\w-]", line)[0] for lines in (PROJECT["project"]["dependencies"], *extras) for line in lines}
    for path in (ROOT / "src").rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        outside = {module.split(".")[0] for module in modules} - {"fedsieve", "_typeshed", *sys.stdlib_module_names}
        outside -= {"triton"}  # a part of PyTorch's builds for GPUs
        assert {DISTRIBUTIONS.get(name, name) for name in outside} <= names, path


def test_wheels_are_for_the_three_platforms() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["wheels"]["strategy"]["matrix"]["runner"] == ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"]
    linux = PROJECT["tool"]["cibuildwheel"]["linux"]
    assert linux["manylinux-x86_64-image"] == linux["manylinux-aarch64-image"] == "manylinux_2_28"
    assert "--exclude libgomp.so.1" in linux["repair-wheel-command"]


def test_the_citation_names_the_version_and_every_methods_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fedsieve.__version__
    assert citation["title"] == f"FedSieve: {PROJECT['project']['description'].rstrip('.').lower()}"
    titles = {paper["title"].lower() for paper in citation["references"]}
    for name in METHODS:
        source = (ROOT / f"docs/reference/methods/{name}.md").read_text().rpartition("## Source")[2]
        assert re.findall(r'"(.*?)"', source)[0].lower() in titles, name
    assert f"\n## {fedsieve.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_commits_are_checked_for_style_and_types() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["id"] for hook in local["hooks"]] == ["ruff", "ruff-format", "mypy"]

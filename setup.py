"""Compile the native kernels into what is installed, and lead the README's links to the repository; the rest stands in
pyproject.toml."""

import re
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/fedsieve/fedsieve"
build = runpy.run_path(str(HERE / "src/fedsieve/kernels/build.py"))["build"]


class WithKernels(build_py):
    """Copy the modules, then compile: beside the sources of an editable installation, else beside the copies."""

    def run(self) -> None:
        """Do both."""
        super().run()
        print(build() if self.editable_mode else build(Path(self.build_lib) / "fedsieve/kernels/native"))


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3, but for this platform alone if kernels were compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform, after the files are in place."""
        if not list(Path(self.bdist_dir).rglob("libfedsieve-*.so")):
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


def readme() -> str:
    """Return the README for a package index, where links and pictures must be whole addresses."""

    def whole(found: re.Match[str]) -> str:
        return f"{found[1]}({REPOSITORY}/{'raw' if found[1].startswith('!') else 'blob'}/main/{found[2]})"

    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?\[[^\]]*\])\((?!https?:)([^)]+)\)", whole, text)


setup(
    cmdclass={"build_py": WithKernels, "bdist_wheel": PlatformWheel},
    long_description=readme(),
    long_description_content_type="text/markdown",
)

"""What somebody adds to the sources, to try what CONTRIBUTING says: which files that touches."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Extension(NamedTuple):
    """What somebody adds: new files, and in files that are there already what stands in place of what."""

    new: dict[str, str]
    changed: dict[str, list[tuple[str, str]]]

    def apply(self, folder: Path) -> None:
        """Add it to a copy of the sources."""
        for path, text in self.new.items():
            (folder / path).write_text(text)
        for path, changes in self.changed.items():
            for before, after in changes:
                text = (folder / path).read_text()
                assert text.count(before) == 1, (path, before)
                (folder / path).write_text(text.replace(before, after))

    def assert_named(self, row: str) -> str:
        """Assert that a row of CONTRIBUTING names every file, a new one by its folder, and return the row."""
        (line,) = re.findall(rf"^\| {row} \| .*`src/.*$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
        for path in self.changed:
            assert Path(path).name in line, path
        for path in self.new:
            assert f"{Path(path).parent}/" in line, path
        return str(line)

"""What a SuperNode's client remembers between rounds: files by round, so that a round can be asked for again."""

from __future__ import annotations

import re
from pathlib import Path

from fedsieve.data.storage import write
from fedsieve.engine.rollback import DEPTH

VERSIONS = DEPTH + 2
"""Versions kept: of the rounds that a server may go back, the one before, and one to spare."""


class ClientMemory:
    """The memories of one client in one run, each after a round."""

    def __init__(self, folder: Path, run: str, client: int):
        if not re.fullmatch(r"[0-9a-f]{8,64}", run):
            raise ValueError("the server names no run: it is not FedSieve's, or of another version")
        self.folder = folder / run / str(client)

    def before(self, t: int) -> bytes:
        """Return what was kept before round ``t``, nothing at the beginning."""
        known = [r for r in self._rounds() if r < t]
        return self._path(known[-1]).read_bytes() if known else b""

    def keep(self, t: int, memory: bytes) -> None:
        """Keep a round's memory, forgetting what came after it in a run that was taken up again."""
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        write(self._path(t), memory, 0o600)
        rounds = self._rounds()
        for old in [r for r in rounds if r > t] + [r for r in rounds if r <= t][:-VERSIONS]:
            self._path(old).unlink(missing_ok=True)

    def _path(self, t: int) -> Path:
        return self.folder / f"{t:06d}.bin"

    def _rounds(self) -> list[int]:
        return sorted(int(p.stem) for p in self.folder.glob("*.bin") if p.stem.isdecimal())

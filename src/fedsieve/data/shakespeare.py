"""Shakespeare, by speaking role: a character language model's text of 1,115,394 characters, 65 different (Karpathy).

Read from ``shakespeare/tinyshakespeare.txt``: parts of the plays, public domain, as karpathy/char-rnn has them. A block
is a role's name and a colon, then what it says, up to an empty line. What a role says is joined by line breaks; the 227
roles of 200 characters or more are kept. The last fifth of each is for testing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.source import Source, damaged, md5, read_download
from fedsieve.data.storage import Arrays
from fedsieve.data.version import Version
from fedsieve.types import InputError

CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""A character's place here is its number."""
FILE = "tinyshakespeare.txt"
HOW = (
    "download https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt into a folder "
    "and run: fedsieve data shakespeare --from FOLDER"
)
LEAST = 200
"""The characters that a role speaks at least."""
MD5 = "6fb458f1232090904fb40fe944165e91"
TEST = 0.2
"""The share of a role's text that is for testing."""


class Shakespeare(Source):
    """Windows of ``seq`` characters, int64 [n, seq], and the characters that follow each, alike; owned by roles.

    A window begins where the one before ends; the characters left at an end are nobody's.
    """

    name, classes, instructions = "shakespeare", tuple(CHARACTERS), HOW
    versions = (Version("", {"characters": 1_115_394}),)
    files = (FILE,)

    def __init__(self, seq: int = 80):
        if not 1 <= seq < int(LEAST * (1 - TEST)):
            raise InputError(
                f"shakespeare: a window must have 1 to {int(LEAST * (1 - TEST)) - 1} characters, got {seq}"
            )
        self.seq = seq

    def form(self, folder: Path) -> str | None:
        """Return "text" or None."""
        return "text" if (folder / FILE).is_file() else None

    def target(self, name: str) -> str | None:
        """Return the file's name for it and for char-rnn's ``input.txt``."""
        return FILE if PurePosixPath(name).name in (FILE, "input.txt") else None

    def examine(self, target: str, content: bytes) -> Mapping[str, int | set[str]]:
        """Return the number of characters; ValueError if it is another text."""
        if md5(content) != MD5:
            raise ValueError("is not the published text (its md5)")
        return {"characters": len(content)}

    def read(self, folder: Path) -> Arrays:
        """Return the windows of all roles."""
        content = read_download(folder / FILE, HOW, (MD5,))
        try:
            return self.windows(spoken(content.decode("ascii")))
        except ValueError as error:
            raise damaged(folder / FILE, str(error), HOW) from None

    def windows(self, texts: Mapping[str, str]) -> Arrays:
        """Return the windows of what each role says, in the order of the roles; those that say too little are not."""
        groups = sorted(role for role, text in texts.items() if len(text) >= LEAST)
        cuts = {role: len(texts[role]) - int(TEST * len(texts[role])) for role in groups}
        train = [_windows(texts[role][: cuts[role]], self.seq) for role in groups]
        test = [_windows(texts[role][cuts[role] :], self.seq) for role in groups]
        arrays: Arrays = {"group": np.repeat(np.arange(len(groups)), [len(part) for part in train])}
        for part, several in (("train", train), ("test", test)):
            tokens = np.concatenate(several)
            arrays |= {f"{part}_x": tokens[:, :-1].copy(), f"{part}_y": tokens[:, 1:].copy()}
        owners = np.repeat(np.arange(len(groups)), [len(part) for part in test])
        return arrays | {"groups": np.array(groups), "test_group": owners}


def spoken(text: str) -> dict[str, str]:
    """Return what every role says in a text of blocks; ValueError if a block has no role."""
    speeches = defaultdict[str, list[str]](list)
    for block in re.split(r"\n\n+", text.strip("\n")):
        role, colon, speech = block.partition(":\n")
        if "\n" in role or not (colon or role.endswith(":")):
            raise ValueError(f"a block begins {block[:20]!r}, not with a role and a colon")
        speeches[role.removesuffix(":")].append(speech)
    return {role: "\n".join(several) for role, several in speeches.items()}


def _windows(text: str, seq: int) -> NDArray[np.int64]:
    """Return windows of ``seq`` characters and the one after, int64 [n, seq + 1], each ``seq`` after the one before."""
    numbers = np.array([CHARACTERS.index(character) for character in text], dtype=np.int64)
    n = max(len(numbers) - 1, 0) // seq
    return np.stack([numbers[i * seq : (i + 1) * seq + 1] for i in range(n)]) if n else np.empty((0, seq + 1), np.int64)

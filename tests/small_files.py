"""What tests of datasets share: small files, a cache of their own, refusals in one line."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import fedsieve.data as data
from fedsieve.types import InputError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def md5(contents: bytes) -> str:
    return hashlib.md5(contents).hexdigest()


def refuses(name: str, root: Path | None, *words: str) -> None:
    """The error is one line that has all of the words."""
    with pytest.raises(InputError) as caught:
        data.load_dataset(name, root)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def homeless(*_: object) -> None:
    """What Path.home() and expanduser() do without HOME and without an entry for the user."""
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "cache"))

"""What tests of datasets share: small files, a cache of their own, refusals in one line."""

import hashlib
import json
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


def leaf_text(samples: dict[str, list[int]]) -> bytes:
    """Return what LEAF writes of writers and their labels, with random images."""
    users = {name: {"x": (pixels(len(y), 784) / 255).tolist(), "y": y} for name, y in samples.items()}
    sizes = [len(y) for y in samples.values()]
    return json.dumps({"users": list(users), "num_samples": sizes, "user_data": users}).encode()


def pickled(
    batch: np.ndarray, call: bytes = b"numpy.core.multiarray\n_reconstruct", labels_: bytes = b"labels"
) -> bytes:
    """Return a batch as Python 2 pickled it: labels, then an array, whose parts a pickle names and calls."""
    labels = b"]q\x05(" + b"".join(bytes([ord("K"), label]) for label in batch[:, 0]) + b"e"
    array = b"c" + call + b"\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09U\x01b\x87Rq\x0a(K\x01"
    array += b"J" + len(batch).to_bytes(4, "little") + b"M\x00\x0c\x86"
    array += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    images = batch[:, 1:].tobytes()
    array += b"\x89T" + len(images).to_bytes(4, "little") + images + b"tb"
    start = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U"
        + bytes([len(labels_)])
        + labels_
        + b"q\x04"
    )
    names = b"U\x09filenamesq\x0b]q\x0c(" + b"".join(b"U\x06%02d.png" % (i % 100) for i in range(len(batch))) + b"e"
    return start + labels + b"U\x04dataq\x06" + array + names + b"u."

"""Handwritten digits, 8x8, that come with scikit-learn: nothing to download (Alpaydin and Kaynak 1998, UCI).

1,797 images. The split is fixed: in the file's order, every fifth image of each class is for testing (355), the other
four train (1,442).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.dataset import Dataset, assemble

CLASSES = tuple("0123456789")


def load() -> Dataset:
    """Return the digits, float32 [n, 1, 8, 8] in 0..1 (the file's grey levels are 0..16)."""
    table = _table()
    x, y = (table[:, :64].astype(np.float32) / 16).reshape(-1, 1, 8, 8), table[:, 64].astype(np.int64)
    test = np.zeros(len(y), bool)
    for digit in range(10):
        test[np.flatnonzero(y == digit)[4::5]] = True
    arrays = {"train_x": x[~test], "train_y": y[~test], "test_x": x[test], "test_y": y[test]}
    return assemble("digits", arrays, CLASSES)


def _table() -> NDArray[np.float64]:
    """Return [1797, 65], the label last; from scikit-learn's file, since importing scikit-learn takes half a second."""
    spec = find_spec("sklearn")
    for place in spec.submodule_search_locations or () if spec else ():
        file = Path(place) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])

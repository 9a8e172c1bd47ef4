"""Handwritten digits, 8x8, that FedSieve ships: nothing to download (Alpaydin and Kaynak 1998, UCI, CC BY 4.0).

1,797 images, those of scikit-learn's ``load_digits``. The split is fixed: in the file's order, every fifth image of
each class is for testing (355), the other four train (1,442).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsieve.data.dataset import Dataset, assemble

FILE = Path(__file__).with_name("digits.npz")
"""``x``, uint8 [1797, 64], grey levels 0 to 16; ``y``, uint8 [1797]; where they come from: digits-LICENSE.txt."""
CLASSES = tuple("0123456789")


def load_digits() -> Dataset:
    """Return the digits, float32 [n, 1, 8, 8] in 0..1 (the file's grey levels are 0..16)."""
    with np.load(FILE, allow_pickle=False) as file:
        x, y = (file["x"].astype(np.float32) / 16).reshape(-1, 1, 8, 8), file["y"].astype(np.int64)
    test = np.zeros(len(y), bool)
    for digit in range(10):
        test[np.flatnonzero(y == digit)[4::5]] = True
    arrays = {"train_x": x[~test], "train_y": y[~test], "test_x": x[test], "test_y": y[test]}
    return assemble("digits", arrays, CLASSES)

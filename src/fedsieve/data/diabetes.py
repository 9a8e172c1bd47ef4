"""The diabetes regression that FedSieve ships: nothing to download (Efron, Hastie, Johnstone and Tibshirani 2004).

442 patients, ten numbers each, and how far the disease had gone a year later: those of scikit-learn's
``load_diabetes(scaled=False)``. The split is fixed: a fifth, drawn with a seed of its own, is for testing (88).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedsieve.data.dataset import Dataset
from fedsieve.types import Data, rng

TABLE = Path(__file__).with_name("diabetes.npz")
"""``x``, float32 [442, 10]; ``y``, float32 [442]; where they come from: diabetes-LICENSE.txt."""
FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


def load_diabetes() -> Dataset:
    """Return the patients, float32 [n, 10], and the disease's progress, float32 [n], both standardised.

    Both have mean 0 and standard deviation 1 over the training examples, so that one less the squared error is the
    share of the variance that is explained. The columns ``age`` and ``sex`` are for partitions.
    """
    with np.load(TABLE, allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    order = torch.randperm(len(y), generator=rng(0, "test"))
    test, train = order[: len(y) // 5].sort().values, order[len(y) // 5 :].sort().values
    mean, std = x[train].double().mean(0), x[train].double().std(0, correction=0)
    y = ((y - y[train].double().mean()) / y[train].double().std(correction=0)).float()
    scale = tuple(mean.tolist()), tuple(std.tolist())
    columns = {name: x[train, FEATURES.index(name)].long() for name in ("age", "sex")}
    return Dataset("diabetes", Data(x[train], y[train], *scale), Data(x[test], y[test], *scale), (), columns=columns)

"""The bytes that the papers count: METHODS, section 7, of trees as they are sent."""

import pytest
import torch
from torch import Tensor

from fedsieve.client.models import MODELS
from fedsieve.sparse.csr import csr_bytes
from fedsieve.sparse.masks import top
from fedsieve.sparse.policy import select_weights
from fedsieve.types import Sparse


def resnet() -> tuple[dict[str, Tensor], tuple[str, ...]]:
    model = MODELS["resnet18"](3, 10)
    floats = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    return floats, tuple(select_weights("zerofl", model))


@pytest.mark.parametrize(("q", "printed"), [(0.05, 5.9), (0.1, 10.1), (0.15, 14.4), (0.2, 18.7), (0.25, 23.0)])
def test_zerofls_file_sizes(q: float, printed: float) -> None:
    floats, sparse = resnet()
    tree = {name: Sparse.of(v, top(v, q)) if name in sparse else v for name, v in floats.items()}
    assert csr_bytes(tree) / 1_024_000 == pytest.approx(printed, abs=0.06)


def test_a_whole_model_needs_no_positions() -> None:
    floats, _ = resnet()
    dense = 4 * sum(value.numel() for value in floats.values())
    assert csr_bytes(floats, dense) == dense
    assert dense / 1_024_000 == pytest.approx(43.7, abs=0.05)
    part = dict([*floats.items()][:-1])
    assert csr_bytes(part, dense) == 8 * sum(value.numel() for value in part.values()) + 130 * len(part)


def test_trees_below_trees_count_and_numbers_do_not() -> None:
    sparse = Sparse.of(torch.ones(4, 5), torch.eye(4, 5) > 0)
    assert csr_bytes({"a": {"b": sparse}, "n": 3.0, "c": torch.zeros(7)}) == 8 * (4 + 7) + 2 * 130

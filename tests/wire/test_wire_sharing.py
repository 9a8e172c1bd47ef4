"""Positions that rows share are found by looking, told once for all of them, and come back; others cost a look."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from fedsieve.runs.model import ModelMetadata, encode_model
from fedsieve.sparse.masks import layer_counts, random_masks
from fedsieve.types import Sparse
from fedsieve.wire import Known, Manifest, decode, encode
from fedsieve.wire.sharing import find_sharing
from messages import same

SHAPES = [(10, 3, 3, 3), (64, 32, 3, 3), (20, 7), (3, 5), (33, 1), (2, 100), (40, 1, 3, 3)]


def drawn(shape: tuple[int, ...], unit: int, d: float = 0.2, seed: int = 3) -> torch.Tensor:
    like = {"w": torch.empty(shape)}
    return random_masks(seed, layer_counts({"w": d}, like, unit), like, unit)["w"]


@pytest.mark.parametrize(("shape", "unit"), [*product(SHAPES, (1, 2, 4, 8, 16))])
def test_every_mask_in_units_comes_back_whatever_is_known(shape: tuple[int, ...], unit: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask, moved = drawn(shape, unit), drawn(shape, unit, seed=4)
    manifest = Manifest.of({"w": w})
    bases = [w * 0.99, torch.where(mask, w, 0.0), torch.where(moved, w, 0.0), torch.where(mask, w, w / 1000)]
    for known in (None, Known(manifest), *(Known(manifest, {"w": base}) for base in bases)):
        for tree in ({"w": Sparse.of(w, mask)}, {"w": torch.where(mask, w, 0.0)}):
            assert same(tree, decode(encode(tree, known), known))


@pytest.mark.parametrize("unit", [2, 8, 64])
def test_positions_of_units_are_told_once(unit: int) -> None:
    """Rows alike in groups of a power of two are found, up to the last, smaller group; of another number, its share."""
    shape = (100, 40)
    sharing, units, index = find_sharing(np.flatnonzero(drawn(shape, unit)), shape)
    assert (sharing.rows, sharing.unit) == (100, unit)
    inner, first = shape[1], drawn(shape, unit)[::unit]
    assert units.tolist() == first.reshape(-1).nonzero().squeeze(1).tolist()
    assert len(units) == math.ceil(0.2 * math.ceil(100 / unit) * inner)
    assert index.tolist() == drawn(shape, unit).reshape(-1).nonzero().squeeze(1).tolist()
    assert find_sharing(np.flatnonzero(drawn(shape, 12)), shape)[0].unit == 4


def test_single_weights_are_told_as_ever() -> None:
    for shape in SHAPES:
        index = np.flatnonzero(drawn(shape, 1, 0.3))
        for fill in (False, True):
            sharing, units, whole = find_sharing(index, shape, fill)
            assert sharing.unit == 1 or len(whole) == len(index) or shape[1:] == (1,)
            assert units is index or sharing.unit > 1


def test_eight_channels_cost_an_eighth_of_the_positions() -> None:
    w = torch.randn((128, 64, 3, 3), generator=torch.Generator().manual_seed(1))
    sizes = []
    for unit in (1, 8):
        mask = drawn(w.shape, unit, 0.05)
        manifest = Manifest.of({"w": w})
        told, drawn_too = (len(encode({"w": Sparse.of(w, mask)}, known)) for known in (
            Known(manifest), Known(manifest, masks={"w": mask})))  # fmt: skip
        sizes.append(told - drawn_too)
    entropy = w.numel() * -(0.05 * math.log2(0.05) + 0.95 * math.log2(0.95)) / 8
    assert sizes[0] == pytest.approx(entropy, rel=0.05)
    assert sizes[1] == pytest.approx(entropy / 8, rel=0.12)


def test_a_file_of_a_model_sends_some_zeros_where_rows_then_share_positions() -> None:
    """A dead channel of a mask in units: its zeros are among the values, and the weights come back as they were."""
    w = torch.randn((64, 32, 3, 3), generator=torch.Generator().manual_seed(1))
    whole = torch.where(drawn(w.shape, 8), w, 0.0)
    dead = whole.clone()
    dead[5::16] = 0
    about = ModelMetadata("x", "0", {"task": {"model": "x"}}, (), (), (0.0,), (1.0,))
    files = [encode_model(about, {"w": v}) for v in (whole, dead)]
    assert len(files[1]) < len(files[0])
    back = decode(files[1][:-32])["weights"]["w"]  # type: ignore[index, call-overload]
    assert isinstance(back, Sparse)
    assert len(back.values) == int(whole.count_nonzero())
    assert torch.equal(back.dense(), dead)

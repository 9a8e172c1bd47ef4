"""Masks in units of output channels against loops over channels and positions, and the methods that train on them."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsieve import local
from fedsieve.cli.bench.workload import Workload
from fedsieve.engine.loop import rounds
from fedsieve.methods import DNR, FLASH, NST, PDST, FedDST, HeteroFLASH
from fedsieve.sparse.masks import (
    draw_counts,
    global_top,
    keep_topk,
    largest_on,
    layer_counts,
    random_masks,
    to_sparse,
    wrong_units,
)
from fedsieve.sparse.regrowth import prune_grow, prune_regrow
from fedsieve.sparse.units import in_units
from fedsieve.types import InputError, RoundContext, rng
from oracles import reference_dynamic as dynamic
from tiny import TinyNet, tiny_run

SHAPES = {"conv": (10, 3, 2, 2), "linear": (16, 5), "narrow": (3, 7), "vector": (9,)}
Unit = tuple[int, int]


def members(shape: tuple[int, ...], unit: int) -> dict[Unit, list[int]]:
    """Return the flat positions of every unit (group, position), in the units' order."""
    inner = math.prod(shape[1:])
    found: dict[Unit, list[int]] = {}
    for group, j in product(range(math.ceil(shape[0] / unit)), range(inner)):
        channels = range(group * unit, min((group + 1) * unit, shape[0]))
        found[group, j] = [c * inner + j for c in channels]
    return found


def norms(x: Tensor, unit: int) -> list[float]:
    """Return the score of every unit: root mean square times sqrt(unit)."""
    flat = x.double().flatten().tolist()
    each = members(tuple(x.shape), unit).values()
    return [math.sqrt(sum(flat[i] ** 2 for i in own) / len(own)) * math.sqrt(unit) for own in each]


def expanded(kept: Any, shape: tuple[int, ...], unit: int) -> Tensor:
    """Return the mask of the units numbered ``kept``."""
    flat = torch.zeros(math.prod(shape), dtype=torch.bool)
    every = [*members(shape, unit).values()]
    for one in kept:
        flat[every[one]] = True
    return flat.view(shape)


def numbers(mask: Tensor, unit: int) -> list[int]:
    """Return which units a mask keeps, after checking that it keeps each whole or not at all."""
    flat, kept = mask.flatten().tolist(), []
    for i, own in enumerate(members(tuple(mask.shape), unit).values()):
        assert len({flat[at] for at in own}) == 1, "a unit in parts"
        kept += [i] * flat[own[0]]
    return kept


def best(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def weights(seed: int, ties: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return {name: torch.ones_like(v) if ties else v for name, v in drawn.items()}


@pytest.mark.parametrize("unit", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.filterwarnings("ignore:the global cut")
def test_the_largest_units_are_those_of_the_largest_norms(unit: int, ties: bool) -> None:
    """By layer, on a mask, and by one cut; a last group of fewer channels competes by its root mean square."""
    params, d = weights(unit, ties), 0.3
    scores = {name: norms(v, unit) for name, v in params.items()}
    counts = layer_counts(dict.fromkeys(params, d), params, unit)
    assert counts.tolist() == [math.ceil(d * len(own)) for own in scores.values()]
    everywhere = {name: torch.ones_like(v, dtype=torch.bool) for name, v in params.items()}
    cut, kept = largest_on(params, everywhere, counts, unit), keep_topk(params, dict.fromkeys(params, d), unit)
    less = largest_on(params, cut, counts - 1, unit)
    for (name, v), k in zip(params.items(), counts.tolist(), strict=True):
        wanted = expanded(best(scores[name], k), tuple(v.shape), unit)
        assert torch.equal(cut[name], wanted)
        assert torch.equal(kept[name], v * wanted)
        assert numbers(less[name], unit) == best(scores[name], k - 1)
    together = [(name, i) for name, own in scores.items() for i in range(len(own))]
    chosen = best([scores[name][i] for name, i in together], math.ceil(d * len(together)))
    for name, own in global_top(params, tuple(params), d, unit).items():
        assert numbers(own, unit) == [together[i][1] for i in chosen if together[i][0] == name]


@pytest.mark.parametrize("unit", [4, 8])
def test_random_units_are_those_of_the_lowest_scores_and_nested(unit: int) -> None:
    like, d = weights(0), dict.fromkeys(SHAPES, 0.4)
    counts, coins = (draw_counts(how, 11, d, like, unit) for how in ("exact", "bernoulli"))  # type: ignore[arg-type]
    mask, inner = random_masks(11, counts, like, unit), random_masks(11, counts - 1, like, unit)
    for i, (name, shape) in enumerate(SHAPES.items()):
        key = int.from_bytes(hashlib.sha256(f"fedsieve/mask/11/{name}".encode()).digest()[:16], "little")
        scores = [int(s) for s in np.random.Philox(key=key).random_raw(len(members(shape, unit)))]
        lowest = sorted(range(len(scores)), key=scores.__getitem__)
        assert numbers(mask[name], unit) == sorted(lowest[: counts[i]])
        assert numbers(inner[name], unit) == sorted(lowest[: counts[i] - 1])
        assert coins[i] == max(1, sum(score < 0.4 * 2**64 for score in scores))
    with pytest.raises(InputError, match="do not fit the 4 layers"):
        random_masks(11, torch.tensor([12 * math.ceil(10 / unit) + 1, 1, 1, 1]), like, unit)


@pytest.mark.parametrize("seed", range(3))
def test_prune_and_regrow_by_units(seed: int) -> None:
    """Each layer loses the ceil(p n) units of the smallest norms, and as many units in all grow elsewhere, at 0."""
    unit, p = 4, 0.3
    mask = random_masks(seed, layer_counts(dict.fromkeys(SHAPES, 0.5), weights(0), unit), weights(0), unit)
    params = {name: v * mask[name] for name, v in weights(seed).items()}
    left, after = prune_regrow(params, mask, p, "mean", torch.Generator().manual_seed(seed), unit)
    before = {name: numbers(own, unit) for name, own in mask.items()}
    for name, own in before.items():
        scores, k = norms(params[name], unit), len(own) - min(math.ceil(round(p * len(own), 6)), len(own) - 1)
        kept = sorted(own[i] for i in best([scores[i] for i in own], k))
        assert torch.equal(left[name], params[name] * expanded(kept, SHAPES[name], unit))
        assert {*kept} <= {*numbers(after[name], unit)}
    assert sum(len(numbers(own, unit)) for own in after.values()) == sum(map(len, before.values()))


@pytest.mark.parametrize("growth", ["inactive", "all"])
def test_prune_and_grow_by_units_is_that_of_their_norms(growth: Any) -> None:
    """The reference of single weights, given every unit's norm, says which units stay and which grow."""
    unit, half = 8, dict.fromkeys(SHAPES, 0.5)
    counts = layer_counts(half, weights(0), unit)
    mask = random_masks(5, counts, weights(0), unit)
    params, g = {name: v * mask[name] for name, v in weights(1).items()}, weights(2)
    left, after = prune_grow(params, dict(mask), g, counts - 1, counts, growth, unit)
    for name, k in zip(SHAPES, counts.tolist(), strict=True):
        on = np.zeros(len(members(SHAPES[name], unit)), dtype=bool)
        on[numbers(mask[name], unit)] = True
        sizes, slopes = (np.array(norms(x[name], unit)) for x in (params, g))
        kept, wanted, _ = dynamic.prune_and_grow(sizes, on, slopes, k - 1, k, growth == "all")
        assert numbers(after[name], unit) == np.flatnonzero(wanted).tolist()
        assert torch.equal(left[name], params[name] * expanded(np.flatnonzero(kept), SHAPES[name], unit))


METHODS = {
    "pdst": PDST(0.3, unit=4),
    "pdst, coins": PDST(0.3, draw="bernoulli", unit=4),
    "nst": NST(0.3, unit=4),
    "nst, independent, pruned": NST(0.3, first_mask="independent", deployment="pruned", unit=4),
    "dnr": replace(DNR(0.3), unit=4),
    "flash": FLASH(0.3, c_d=2, E_d=3, unit=4),
    "hetero_flash": HeteroFLASH((0.6, 0.4, 0.2), c_d=2, E_d=2, unit=4),
    "hetero_flash, anew": HeteroFLASH((0.6, 0.4, 0.2), c_d=2, E_d=2, subset="magnitude", unit=4),
    "feddst": FedDST(0.3, interval=1, end=1.0, unit=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_units(name: str) -> None:
    """Rounds over the wire: no client sends anything else, every mask is in units, and device classes' masks nest."""
    method = METHODS[name]
    *_, last = rounds(tiny_run(method, rounds=2), local())
    assert not last.refused
    masks = [last.state.mask]
    if isinstance(method, HeteroFLASH):
        masks = [method.mask_of(last.state, tier) for tier in range(3)]
        for large, small in pairwise(masks):
            assert all((small[n] <= large[n]).all() for n in large)
    for mask, counts in zip(masks, last.state.counts.view(len(masks), -1).tolist(), strict=True):
        kept = [len(numbers(own, 4)) for own in mask.values()]
        assert kept == counts or (method.name in ("nst", "dnr") and sum(kept) >= sum(counts))  # a union
    for weight, own in masks[0].items():
        left = last.model[weight] != 0
        assert not (left & ~own).any()
        assert "pruned" not in name or len(numbers(left, 4)) == math.ceil(0.3 * own.numel() / 4)


def test_a_client_that_answers_off_the_units_is_refused() -> None:
    state = NST(0.3, unit=4).init(TinyNet(), rng(0, "init"))
    expected = NST(0.3, unit=4).expected(state, RoundContext())
    tree: Mapping[str, Any] = to_sparse(state.params, state.mask)
    expected.check(tree)
    odd = {name: own.clone() for name, own in state.mask.items()}
    odd["fc1.weight"].view(-1)[int((~odd["fc1.weight"]).view(-1).nonzero()[0])] = True
    most = int(state.counts.sum())
    assert wrong_units(4, state.sparse, most, to_sparse(state.params, odd)) == (
        "fc1.weight is not on a mask in units of 4 output channels"
    )
    assert wrong_units(4, state.sparse, most - 1, tree) == (
        f"{most} units of 4 output channels, where {most - 1} are allowed"
    )


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.fc = nn.ConvTranspose2d(2, 8, 3), nn.Linear(8, 3)


@pytest.mark.parametrize("method", [PDST, NST, FLASH, HeteroFLASH, FedDST])
def test_what_is_no_unit_is_refused_in_a_line(method: Any) -> None:
    with pytest.raises(InputError, match="unit must be 1 or more output channels that share a pattern, got 0"):
        method(unit=0)
    with pytest.raises(InputError, match=r"unit=8: up.weight is a transposed convolution's.* take unit=1, or leave it"):
        method(policy="up,fc", unit=8).init(Upsampling(), rng(0, "init"))
    method(policy="fc", unit=8).init(Upsampling(), rng(0, "init"))


def test_the_benchmarks_masks_are_in_units() -> None:
    workload = Workload("leaf_cnn", sparsity=0.95, unit=8)
    mask = workload.mask(workload.network())
    assert all(in_units(own, 8) and not in_units(own, 16) for own in mask.values())

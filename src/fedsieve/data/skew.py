"""Partitions with more skew than ``lda``'s: unequal sizes, few classes a client, unequal amounts alone.

``dirichlet`` is Yurochkin et al. 2019 ("Bayesian Nonparametric Federated Learning of Neural Networks") as Flower's
``DirichletPartitioner`` has it, without self-balancing; ``shards`` is the pathological split of McMahan et al. 2017;
``quantity`` is the quantity skew of Li et al. 2022 ("Federated Learning on Non-IID Data Silos", NIID-Bench).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.types import InputError, rng

ALPHA_MIN = 1e-6
"""Every client of ``lda`` draws from one class at a time long before; much smaller ones overflow."""
MINIMUM = 10
"""The examples that every client has at least: those of NIID-Bench and of Flower's ``DirichletPartitioner``."""
DRAWS = 1000
"""How often ``dirichlet`` draws to give every client its minimum."""


def dirichlet(labels: Tensor, clients: int, alpha: float, seed: int, minimum: int = MINIMUM) -> list[Tensor]:
    """Deal each class by its own shares of the clients, drawn from Dir(alpha): unequal sizes, nothing left over.

    All is drawn again until every client has ``minimum`` examples. Raises InputError if no draw of a thousand does.
    """
    check_share(len(labels), clients)
    check_alpha("dirichlet", alpha)
    _check_minimum(f"dirichlet:{alpha:g}", len(labels), clients, minimum)
    generator = _generator(seed)
    pools = [generator.permutation(np.flatnonzero(labels.numpy() == c)) for c in range(int(labels.max()) + 1)]
    for _ in range(DRAWS):
        cuts = [_cuts(len(pool), clients, alpha, generator) for pool in pools]
        sizes = sum(np.diff(cut, prepend=0, append=len(pool)) for cut, pool in zip(cuts, pools, strict=True))
        if np.min(sizes) >= minimum:
            parts = zip(*(np.split(pool, cut) for pool, cut in zip(pools, cuts, strict=True)), strict=True)
            return [_sorted(np.concatenate(part)) for part in parts]
    fewer = "" if minimum <= 1 else f"write dirichlet:{alpha:g}:1 for at least one each, "
    raise InputError(
        f"partition dirichlet:{alpha:g}: none of {DRAWS} draws gives each of {clients} clients {minimum} of "
        f"{len(labels)} examples: {fewer}raise alpha, or lower task.clients"
    )


def shards(labels: Tensor, clients: int, k: int, seed: int) -> list[Tensor]:
    """Deal ``k`` shards to every client: examples sorted by class, cut into ``k * clients`` parts as equal as can be.

    A shard is of one class where the classes' sizes are multiples of its size, else some are of two.
    """
    check_share(len(labels), clients)
    if not (k >= 1 and k * clients <= len(labels)):
        raise InputError(
            f"partition shards:{k}: {k} shards for each of {clients} clients cannot be cut from {len(labels)} "
            f"examples; take 1 to {len(labels) // clients}"
        )
    generator = _generator(seed)
    order = generator.permutation(len(labels))
    parts = np.array_split(order[np.argsort(labels.numpy()[order], kind="stable")], k * clients)
    dealt = generator.permutation(k * clients).reshape(clients, k)
    return [_sorted(np.concatenate([parts[i] for i in own])) for own in dealt]


def quantity(n: int, clients: int, alpha: float, seed: int, minimum: int = MINIMUM) -> list[Tensor]:
    """Deal ``n`` examples at random in unequal amounts: ``minimum`` to each, the others by shares from Dir(alpha)."""
    check_share(n, clients)
    check_alpha("quantity", alpha)
    _check_minimum(f"quantity:{alpha:g}", n, clients, minimum)
    generator = _generator(seed)
    rest = _cuts(n - minimum * clients, clients, alpha, generator)
    cuts = rest + minimum * np.arange(1, clients)
    return [_sorted(part) for part in np.split(generator.permutation(n), cuts)]


def check_share(n: int, clients: int) -> None:
    """Raise InputError unless each of the clients can have one of ``n`` examples."""
    if not 1 <= clients <= n:
        raise InputError(f"partition: {clients} clients cannot share {n} examples; take 1 to {n} clients")


def check_alpha(kind: str, alpha: float) -> None:
    """Raise InputError unless a Dirichlet distribution can be drawn from."""
    if not (alpha >= ALPHA_MIN and math.isfinite(alpha)):
        raise InputError(
            f"partition {kind}:{alpha:g}: alpha must be a number from {ALPHA_MIN:g} up, such as {kind}:1.0"
        )


def _check_minimum(spec: str, n: int, clients: int, minimum: int) -> None:
    if minimum < 1:
        raise InputError(f"partition {spec}:{minimum}: a client without an example cannot train: write {spec}:1")
    if minimum * clients > n:
        most = n // clients
        raise InputError(
            f"partition {spec}: {clients} clients cannot have {minimum} of {n} examples each: write {spec}:{most} or "
            "less, or lower task.clients"
        )


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(rng(seed, "partition").initial_seed())


def _cuts(n: int, clients: int, alpha: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return where ``n`` examples are cut into the clients' parts, [clients - 1]: shares drawn from Dir(alpha)."""
    shares = generator.dirichlet(np.full(clients, alpha))
    return np.minimum((shares.cumsum()[:-1] * n).astype(np.int64), n)


def _sorted(index: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.sort(index))

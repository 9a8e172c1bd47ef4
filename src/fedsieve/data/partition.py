"""Who holds what: training examples to clients, as one list of indices a client.

``lda`` is the latent Dirichlet allocation of Hsu, Qi and Brown 2019 and Reddi et al. 2021 (app. C.1) with equal shards;
``by_group`` is LEAF's natural partition; ``dirichlet``, ``shards`` and ``quantity`` are in ``data.skew``. The same
arguments give the same lists in every process.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.dataset import Dataset, type_name
from fedsieve.data.partitioner import FlowerPartitioner
from fedsieve.data.skew import MINIMUM, check_alpha, check_share, dirichlet, quantity, shards
from fedsieve.data.storage import Arrays, cached_arrays
from fedsieve.types import InputError, rng
from fedsieve.types.errors import error_of

FORMS = (
    "iid, lda:ALPHA (such as lda:1.0), dirichlet:ALPHA, shards:K, quantity:ALPHA, group, or group:COLUMN; "
    f"dirichlet:ALPHA:MIN and quantity:ALPHA:MIN give every client at least MIN examples, not {MINIMUM}; "
    "lists of indices, a function or a partitioner are given in Python, Task(partition=...)"
)


@dataclass(frozen=True, eq=False)
class Indices:
    """A partition as a user gave it: every client's training examples, int64, sorted, none twice in one client."""

    shards: tuple[Tensor, ...]

    @classmethod
    def of(cls, shards: object) -> Indices:
        """Return the indices in a list, one entry a client: tensors, arrays or lists. Raises InputError."""
        if (
            isinstance(shards, str | bytes | Mapping)
            or not isinstance(shards, Iterable)
            or not getattr(shards, "ndim", 1)
        ):
            raise InputError(f"partition: a list of indices for each client is needed, got {type_name(shards)}")
        return cls(tuple(_shard(client, shard) for client, shard in enumerate(shards)))

    @cached_property
    def digest(self) -> str:
        """A hash of them."""
        return hashlib.sha256(repr([shard.tolist() for shard in self.shards]).encode()).hexdigest()

    def checked(self, n: int, clients: int) -> list[Tensor]:
        """Return the indices if they fit ``n`` examples and that many clients. Raises InputError."""
        if len(self.shards) != clients:
            raise InputError(
                f"partition: it holds the indices of {len(self.shards)} clients, but task.clients is {clients}"
            )
        for client, shard in enumerate(self.shards):
            if shard[0] < 0 or shard[-1] >= n:
                wrong = int(shard[0] if shard[0] < 0 else shard[-1])
                raise InputError(f"partition: client {client} has example {wrong} of {n}")
        return [*self.shards]


Partition: TypeAlias = (
    str | Callable[[Dataset, int, int], Sequence[Tensor]] | Sequence[Tensor] | Indices | FlowerPartitioner
)
"""Its name; or a function of dataset, clients and seed that gives every client's indices; or these themselves; or a
partitioner of flwr-datasets."""


def iid(n: int, clients: int, seed: int) -> list[Tensor]:
    """Deal all of ``n`` examples at random; sizes differ by at most one."""
    check_share(n, clients)
    order = torch.randperm(n, generator=rng(seed, "partition"))
    return [shard.sort().values for shard in order.tensor_split(clients)]


def lda(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Deal ``n // clients`` examples to every client, by its own class mixture drawn from Dir(alpha).

    A client draws classes from its mixture and examples without replacement; when a class runs out, the mixture is
    renormalised over the others. The ``n % clients`` last examples are nobody's.
    """
    check_share(len(labels), clients)
    check_alpha("lda", alpha)
    generator = np.random.default_rng(rng(seed, "partition").initial_seed())
    pools = [generator.permutation(np.flatnonzero(labels.numpy() == c)) for c in range(int(labels.max()) + 1)]
    left = np.array([len(pool) for pool in pools])
    shards = []
    for _ in range(clients):
        take = _draw(left, len(labels) // clients, alpha, generator)
        shards.append(np.concatenate([pool[k - t : k] for pool, k, t in zip(pools, left, take, strict=True)]))
        left = left - take
    return [torch.from_numpy(np.sort(shard)) for shard in shards]


def by_group(group: Tensor, clients: int, seed: int, name: str = "group") -> list[Tensor]:
    """Make clients of ``clients`` groups (writers, speakers), chosen at random, one of each; ``name`` is in errors."""
    names, sizes = np.unique(group.numpy(), return_counts=True)
    if not 1 <= clients <= len(names):
        remedy = f"{'lower' if clients > 0 else 'raise'} task.clients"
        raise InputError(f"partition {name}: {clients} clients, but the data has {len(names)} groups: {remedy}")
    members = _split(np.argsort(group.numpy(), kind="stable"), sizes)
    groups = torch.randperm(len(names), generator=rng(seed, "partition"))[:clients]
    return [members[i] for i in groups.sort().values.tolist()]


def partition(spec: Partition, dataset: Dataset, clients: int, seed: int) -> list[Tensor]:
    """Return every client's training examples, int64 and sorted. Raises InputError.

    ``spec`` is one of ``FORMS`` (these are cached), the users' own indices, a function that gives them, or a
    partitioner of flwr-datasets.
    """
    if isinstance(spec, str):
        return _named(spec, dataset, clients, seed)
    if isinstance(spec, FlowerPartitioner):
        lists: object = spec.indices(dataset, clients)
    else:
        try:
            inspect.signature(spec).bind(dataset, clients, seed) if callable(spec) else None
        except ValueError:
            pass  # a builtin tells no signature
        except TypeError as error:
            raise InputError(f"partition: a function takes dataset, clients and seed ({error})") from None
        try:
            lists = spec(dataset, clients, seed) if callable(spec) else spec
        except (InputError, MemoryError):
            raise
        except Exception as error:
            raise InputError(f"partition: {error_of(spec, error)}") from error
    indices = lists if isinstance(lists, Indices) else Indices.of(lists)
    return indices.checked(len(dataset.train), clients)


def hold_out(index: Tensor, fraction: float, seed: int, client: int) -> tuple[Tensor, Tensor]:
    """Split a client's examples into training and validation: ``int(fraction * len(index))`` at random are held out."""
    order = torch.randperm(len(index), generator=rng(seed, "hold_out", 0, client))
    count = int(fraction * len(index))
    return index[order[count:]], index[order[:count]]


def counts(clients_examples: list[Tensor], labels: Tensor, classes: int) -> Tensor:
    """Return how many examples of each class every client holds, int64 [clients, classes]."""
    return torch.stack([labels[shard].bincount(minlength=classes) for shard in clients_examples])


def holdings(clients_examples: Sequence[Tensor], dataset: Dataset) -> tuple[tuple[str, ...], Tensor]:
    """Return class names and how many examples of each every client holds; no name and one column without classes."""
    if (labels := dataset.labels) is None:
        return (), torch.tensor([[len(shard)] for shard in clients_examples])
    return dataset.classes, counts(list(clients_examples), labels, len(dataset.classes))


def _named(spec: str, dataset: Dataset, clients: int, seed: int) -> list[Tensor]:
    """Return every client's examples of a partition by its name, from the cache if it was dealt before."""
    make: Callable[[], list[Tensor]]
    kind, _, text = spec.partition(":")
    if kind == "group":
        values = _column(spec, text, dataset)
        make = partial(by_group, values, clients, seed, spec)
    elif spec == "iid" or kind == "quantity":
        values = torch.tensor(len(dataset.train))
        make = _maker(spec, int(values), clients, seed)
    else:
        make = _maker(spec, values := _labels(spec, dataset), clients, seed)
    key = f"partition/{spec}/{clients}/{seed}/{hashlib.sha256(values.numpy().tobytes()).hexdigest()}"
    arrays = cached_arrays(key, lambda: _pack(make()))
    return _split(arrays["index"], arrays["sizes"])


def _column(spec: str, name: str, dataset: Dataset) -> Tensor:
    """Return what ``group`` or ``group:COLUMN`` goes by. Raises InputError."""
    if spec == "group" and dataset.group is not None:
        return dataset.group
    if spec == "group":
        raise InputError(f"partition group: {dataset.name} does not say whose its examples are; use iid or lda:ALPHA")
    if name not in dataset.columns:
        there = f"it has {', '.join(dataset.columns)}" if dataset.columns else "it has none"
        raise InputError(f"partition {spec}: {dataset.name} has no column {name!r} ({there}): name one, or use iid")
    return dataset.columns[name]


def _labels(spec: str, dataset: Dataset) -> Tensor:
    """Return the labels that a partition goes by. Raises InputError."""
    if (labels := dataset.labels) is None:
        raise InputError(
            f"partition {spec} goes by class, but the targets of {dataset.name} are no class labels: "
            "use iid, quantity:ALPHA, group, or a function"
        )
    return labels


def _maker(spec: str, values: Any, clients: int, seed: int) -> Callable[[], list[Tensor]]:
    """Return what deals by a name: ``owned`` are the labels, or how many examples there are."""
    kind, *parts = spec.split(":")
    try:
        match kind, [float(part) for part in parts[:1]], [int(part) for part in parts[1:]]:
            case "iid", [], []:
                return partial(iid, values, clients, seed)
            case "lda", [alpha], []:
                return partial(lda, values, clients, alpha, seed)
            case "dirichlet", [alpha], [*least] if len(least) < 2:
                return partial(dirichlet, values, clients, alpha, seed, *least)
            case "quantity", [alpha], [*least] if len(least) < 2:
                return partial(quantity, values, clients, alpha, seed, *least)
            case "shards", [k], [] if k == int(k):
                return partial(shards, values, clients, int(k), seed)
    except (ValueError, OverflowError):
        pass
    raise InputError(f"partition {spec!r}: write {FORMS}")


def _shard(client: int, examples: Any) -> Tensor:
    try:
        index = torch.as_tensor(examples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"partition: client {client} has no list of whole numbers ({error})") from None
    if not index.numel():
        raise InputError(f"partition: client {client} has no example: give it one, or lower task.clients")
    if index.dim() != 1 or index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        remedy = ", of a mask give mask.nonzero().squeeze(1)" if index.dtype == torch.bool else ""
        raise InputError(
            f"partition: client {client} needs the numbers of its examples, whole and in one dimension, got "
            f"{index.dtype} {list(index.shape)}{remedy}"
        )
    shard = index.long().sort().values
    if (again := shard[1:][shard[1:] == shard[:-1]]).numel():
        raise InputError(f"partition: client {client} has example {int(again[0])} twice")
    return shard


def _pack(clients_examples: list[Tensor]) -> Arrays:
    return {"index": torch.cat(clients_examples).numpy(), "sizes": np.array([len(shard) for shard in clients_examples])}


def _split(index: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[Tensor]:
    return [torch.from_numpy(shard) for shard in np.split(index, np.cumsum(sizes)[:-1])]


def _draw(left: NDArray[np.int64], size: int, alpha: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return how many examples of each class one client takes.

    To take min(drawn, left) of every class, and draw as many again as that falls short, is the law of drawing one by
    one: ignoring the draws of a class that has run out is the renormalised mixture. The mixture is drawn in logarithms
    (gamma(a) is gamma(a + 1) times U^(1 / a)), because at a small alpha most of its weights underflow, and those are
    all that remain when the large ones have run out.
    """
    log_mixture = np.log(generator.standard_gamma(alpha + 1, len(left)))
    log_mixture -= generator.standard_exponential(len(left)) / alpha
    take = np.zeros_like(left)
    while missing := size - int(take.sum()):
        weights = np.where(take < left, log_mixture, -np.inf)
        weights = np.exp(weights - weights.max())
        take += np.minimum(generator.multinomial(missing, weights / weights.sum()), left - take)
    return take

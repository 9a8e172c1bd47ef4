"""Differential privacy for methods whose clients all send values at the same positions: clip, then add noise there.

McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1 (an update is clipped as
a whole, every client counts alike); Kairouz et al. 2021, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", Sec. 1 (the clients add the noise, a share each, so that the sum has it). On a frozen
mask (FLASH, PDST) clip and noise fall on the mask's values alone, and all clients send vectors of one length.

How much privacy the rounds have spent is for Google's accountant to say (the extra ``dp``); there is none of our own. A
client is protected as a whole: epsilon bounds what exchanging all data of one client can change. Sampling is as
FedSieve's: a fixed number of clients without replacement (Wang, Balle and Kasiviswanathan 2019, Theorem 27). Exchanging
an update of norm at most C for another moves the sum by up to 2 C, so that a noise of z C is z / 2 of it.
"""

from __future__ import annotations

import itertools
import math
import secrets
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.server.aggregate import mean
from fedsieve.types import Device, Expected, InputError, Method, Params, RoundContext, ServerState, Tree, Update
from fedsieve.types.contract import Whole, is_statistic
from fedsieve.types.errors import check_interval, install
from fedsieve.types.method import expected_of

EPSILON, REHEARSED = "epsilon", "epsilon_rehearsed"
"""Columns of a run's rows: what holds, and what would hold if the noise did not come from the run's seed."""
ORDERS = (1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256)
"""Renyi orders that are tried: epsilon is the best of them, so fewer never claim more."""


class TooFew(UserWarning):
    """A round's answers were fewer than its noise needs."""


@dataclass(frozen=True)
class Private(Method[Any]):
    """FLASH, PDST or dense training, its updates clipped and noised on the clients.

    The mean has noise of the standard deviation ``noise * clip`` over the number of clients.
    """

    inner: Method[Any]
    """The method whose updates are clipped and noised; its fields are ``method.inner.NAME``."""
    clip: float = 1.0
    """The norm that an update is shortened to."""
    noise: float = 1.0
    """The standard deviation of the sum's noise, in clips."""
    cohort: int = 5
    """How many clients' noise adds up to that: a round with fewer answers changes nothing."""
    delta: float = 1e-5
    """The delta of (epsilon, delta)-differential privacy that epsilon is told for."""
    secret: bool = False
    """Whether noise comes from the system. From the run's seed, which stands in run.json, it can be subtracted: that
    is a rehearsal, which repeats and protects nobody."""

    def __post_init__(self) -> None:
        check_interval("clip", self.clip, "(0, 1e6)")
        check_interval("noise", self.noise, "(0, 1e6)")
        check_interval("delta", self.delta, "(0, 1)")
        if self.cohort < 1:
            raise InputError(f"cohort must be at least 1, got {self.cohort}")
        if (self.inner.tiers or 1) > 1:
            raise InputError(
                f"of {self.inner.name} clients send values at different positions: take flash, pdst, fedavg"
            )
        if self.inner.copies > 1:
            raise InputError(f"{self.inner.name}'s clients send more than a model: take flash, pdst, fedavg, fedprox")
        if (fewest := min(self.warm_ups, default=self.cohort)) < self.cohort:
            raise InputError(f"a warm-up of {fewest} clients is below the cohort of {self.cohort}: raise inner.c_d")

    @property
    def target_density(self) -> float | None:
        """What the method aims at without privacy."""
        return self.inner.target_density

    @property
    def policy(self) -> str:
        """The layer policy without privacy."""
        return self.inner.policy

    @property
    def warm_up(self) -> int | tuple[int, ...]:
        """The clients of the rounds before round 1."""
        return self.inner.warm_up

    def check_run(self, run: Any) -> None:
        """Check as without privacy."""
        self.inner.check_run(run)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Prepare as without privacy."""
        return self.inner.prepare(model)

    def init(self, model: nn.Module, rng: torch.Generator) -> Any:
        """Start as without privacy, if it can be accounted for."""
        check_accountant()
        state = self.inner.init(model, rng)
        if statistics := [name for name in state.params if is_statistic(name)]:
            raise InputError(
                f"{statistics[0]}: running statistics would drown in noise; take a model without BatchNorm"
            )
        if names := expected_of(self.inner, state, RoundContext()).client_chosen():
            raise InputError(
                f"every client of {self.inner.name} chooses its own positions ({names[0]}): take flash, pdst"
            )
        return state

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        """Send what is sent without privacy."""
        return self.inner.broadcast(state, context)

    def client(self, down: Tree, device: Device) -> Update:
        """Train as without privacy; answer with a change that is clipped and noised, and with no metrics."""
        update = self.inner.client(down, device)
        before = {name: _base(down, name, value) for name, value in update.tree.items()}
        change = {name: value - before[name] for name, value in _tensors(update.tree)}
        shorter = self.clip / max(self.clip, _norm(change))
        noise = torch.Generator().manual_seed(secrets.randbits(63)) if self.secret else device.rng
        tree = {
            name: before[name] + v * shorter + self._share * torch.randn(v.shape, generator=noise, dtype=v.dtype)
            for name, v in change.items()
        }
        return Update(tree, 1)

    def expected(self, state: ServerState, context: RoundContext) -> Expected:
        """Expect what is sent without privacy, noise and all, no longer than clip and noise together can be.

        That bound depends on no client's data, so that what is refused tells nothing: the accounting stays as it is.
        """
        plain = expected_of(self.inner, state, context)
        whole = {name: entry for name, entry in plain.tree.items() if isinstance(entry, Whole)}
        down = self.broadcast(state, context)
        before = {name: _base(down, name, entry.base) for name, entry in whole.items()}
        entries = {name: Whole(entry.base, counts=entry.counts) for name, entry in whole.items()}
        rule = partial(_too_long, before, self._longest(sum(v.numel() for v in before.values())))
        return replace(plain, tree={**plain.tree, **entries}, metrics=(), rule=rule)

    def _longest(self, numel: int) -> float:
        """Return the norm that one honest answer in 2^60 is above.

        A Gaussian vector is longer than the root of its dimension by t with a chance of exp(-t² / 2) at most.
        """
        return self.clip + self._share * (math.sqrt(numel) + math.sqrt(2 * 60 * math.log(2)))

    @property
    def _share(self) -> float:
        """The standard deviation of one client's noise."""
        return self.noise * self.clip / math.sqrt(self.cohort)

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> Any:
        """Take the plain mean of the answers, brought back to values that can be, as the only answer."""
        counter = itertools.count()  # of the answers, while they stream by
        average = mean((update for update, _ in zip(updates, counter, strict=False)), "equal")
        if (answers := next(counter)) < self.cohort:
            why = f"{answers} answers, whose noise is not that of a cohort of {self.cohort}: the model stays as it was"
            warnings.warn(why, TooFew, stacklevel=2)
            return state
        plain = expected_of(self.inner, state, context)
        update = Update({name: _possible(plain, name, value) for name, value in average.items()}, 1)
        return self.inner.aggregate(state, [update], context)

    def deploy(self, state: ServerState) -> Params:
        """Ship what is shipped without privacy."""
        return self.inner.deploy(state)

    def paper_bytes(self, model: nn.Module) -> float | None:
        """Return what the method's paper says: noise costs no byte."""
        return self.inner.paper_bytes(model)

    def spent(self, t: int, per_round: int, clients: int) -> dict[str, float]:
        """Return the epsilon, at ``delta``, of rounds up to t; as that of a rehearsal unless noise is secret."""
        if per_round < self.cohort:
            raise InputError(f"method.cohort is {self.cohort} but per_round {per_round}: lower it, or raise per_round")
        warm_ups = self.warm_ups[: min(t, 0) or None]
        releases = tuple(Release(clients, number, self.noise, 1) for number in warm_ups)
        releases += (Release(clients, per_round, self.noise, t),) * (t > 0)
        return {EPSILON if self.secret else REHEARSED: epsilon(releases, self.delta)}


def _tensors(tree: Tree) -> Iterable[tuple[str, Tensor]]:
    return ((name, value) for name, value in tree.items() if isinstance(value, Tensor))


def _base(down: Tree, name: str, value: object) -> Tensor:
    """Return what a client was sent of a tensor that it answers with; zeros where it was sent none."""
    assert isinstance(value, Tensor)
    params = down.get("params", down)
    base = params.get(name) if isinstance(params, Mapping) else None
    return base if isinstance(base, Tensor) and base.shape == value.shape else torch.zeros_like(value)


def _norm(change: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in change.values()))


def _too_long(before: Mapping[str, Tensor], longest: float, tree: Tree) -> str | None:
    """Return what is wrong with the length of an answer, or None; what float32 rounds off is no part of it."""
    norm = _norm({name: value - before[name] for name, value in _tensors(tree) if name in before})
    if norm <= longest * (1 + 1e-5) + 1e-6 * _norm(before):
        return None
    return f"its norm {norm:.4g} is above the {longest:.4g} that clip and noise come to"


def _possible(plain: Expected, name: str, value: Tensor) -> Tensor:
    """Return a mean within the bounds of what clients send without noise."""
    entry = plain.tree[name]
    assert isinstance(entry, Whole)
    low, high = (torch.as_tensor(bound, dtype=value.dtype) for bound in (entry.least, entry.most))
    return value.clamp(low, high)


@dataclass(frozen=True)
class Release:
    """Noisy sums that were released: ``clients`` of a ``population``, noise of ``noise`` times the clip, so often."""

    population: int
    clients: int
    noise: float
    times: int


def check_accountant() -> None:
    """Raise InputError unless the accountant is installed."""
    if find_spec("dp_accounting") is None:
        raise InputError(f"private training needs an accountant: {install('dp')}")


@lru_cache(maxsize=64)
def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Return the epsilon at ``delta`` of all ``releases`` together; infinite without noise. Raises InputError."""
    check_accountant()
    from dp_accounting import GaussianDpEvent, SampledWithoutReplacementDpEvent
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_ONE)
    for one in releases:
        event = GaussianDpEvent(one.noise / 2)
        accountant.compose(SampledWithoutReplacementDpEvent(one.population, one.clients, event), one.times)
    return float(accountant.get_epsilon(delta))

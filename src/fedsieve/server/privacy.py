"""How much privacy the rounds have spent, by Google's accountant (the extra ``dp``); there is none of our own.

A client is protected as a whole: epsilon bounds what exchanging all data of one client can change. Sampling is as
FedSieve's: a fixed number of clients without replacement (Wang, Balle and Kasiviswanathan 2019, Theorem 27). Exchanging
an update of norm at most C for another moves the sum by up to 2 C, so that a noise of z C is z / 2 of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

from fedsieve.types import InputError
from fedsieve.types.errors import install

EPSILON, REHEARSED = "epsilon", "epsilon_rehearsed"
"""Columns of a run's rows: what holds, and what would hold if the noise did not come from the run's seed."""
ORDERS = (1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256)
"""Renyi orders that are tried: epsilon is the best of them, so fewer never claim more."""


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

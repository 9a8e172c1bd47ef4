"""How many of a round's clients must answer, and how long an engine whose clients may be lost waits for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsieve.engine.experiment import Run
from fedsieve.types import InputError


class QuorumMissed(InputError):
    """Too few clients have answered, however often they were asked."""


@dataclass(frozen=True)
class Quorum:
    """How long an engine waits for clients that may fail, and how many of them must answer."""

    min_clients: int = 0
    """The answers that a round needs; 0: half of its clients, rounded up. A warm-up of fewer clients needs them all."""
    round_timeout: float = 3600.0
    """Seconds after which a client that has not answered is lost to the round; and those that the round waits for its
    clients to be there, too few of them."""
    attempts: int = 3
    """How often a round is tried: the lost ones are asked again, the other answers stay good."""

    def __post_init__(self) -> None:
        if self.min_clients < 0:
            raise InputError(f"min_clients must be at least 1 (0: half of the round's), got {self.min_clients}")
        if not 0 < self.round_timeout < math.inf:
            raise InputError(f"round_timeout must be a positive number of seconds, got {self.round_timeout}")
        if self.attempts < 1:
            raise InputError(f"attempts must be at least 1, got {self.attempts}")

    def needed(self, clients: int) -> int:
        """Return how many of a round's ``clients`` must answer."""
        return min(self.min_clients or (clients + 1) // 2, clients)

    def check(self, run: Run) -> None:
        """Raise InputError if no round of a run has as many clients as must answer."""
        if self.min_clients > run.per_round:
            raise InputError(
                f"min_clients is {self.min_clients} but a round has {run.per_round} clients: lower it to that or less, "
                "or raise per_round"
            )

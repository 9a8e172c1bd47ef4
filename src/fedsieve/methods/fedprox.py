"""FedProx: federated averaging whose clients are drawn back to the model that they were sent.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2: every client minimises its own loss and
``mu / 2 |w - w_t|^2``, so that ``mu (w - w_t)`` is added to the gradients of every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import Average, ServerOptimizer, tensors
from fedsieve.server.dense import DenseMethod
from fedsieve.types import Correction, Device, ServerState, Tree, Update
from fedsieve.types.errors import check_interval


@dataclass(frozen=True)
class FedProx(DenseMethod[ServerState]):
    """Dense local training with a proximal term; the server averages, or steps towards the average."""

    mu: float = 0.01
    """The weight of the proximal term; 0 is FedAvg."""
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        check_interval("mu", self.mu, "[0, 1e6]")

    def client(self, down: Tree, device: Device) -> Update:
        """Train near the model that was sent, and send the whole model back."""
        load_(device.model, tensors(down))
        metrics = train(replace(device, correction=Correction(mu=self.mu) if self.mu else None))
        return Update(params_of(device.model), len(device.data), metrics)

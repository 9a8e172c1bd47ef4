"""Dense federated averaging, and FedAdam, the same with an adaptive server.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", Algorithm 1.
Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsieve.client.training import load_, params_of, train
from fedsieve.server.aggregate import Adam, Average, ServerOptimizer, tensors
from fedsieve.server.dense import DenseMethod
from fedsieve.types import Device, ServerState, Tree, Update


@dataclass(frozen=True)
class FedAvg(DenseMethod[ServerState]):
    """Dense local training; the server averages, or steps towards the average."""

    server: ServerOptimizer = Average()

    @property
    def name(self) -> str:
        """What tables and figures call the method."""
        return "fedavg" if isinstance(self.server, Average) else "fedadam"

    def client(self, down: Tree, device: Device) -> Update:
        """Train, and send the whole model back."""
        load_(device.model, tensors(down))
        metrics = train(device)
        return Update(params_of(device.model), len(device.data), metrics)


def FedAdam(eta: float = 0.01, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3) -> FedAvg:
    """Dense local training; the server takes an Adam step along the mean update."""
    return FedAvg(server=Adam(eta, b1, b2, tau))

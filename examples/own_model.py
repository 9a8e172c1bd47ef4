"""Your own model and data: federated ZeroFL in one file (python examples/own_model.py)."""

import torch
from torch import Tensor, nn

from fedsieve import Data, Dataset, Run, Task, local, rounds
from fedsieve.methods import ZeroFL


def network() -> nn.Module:
    """Return the plain model: any module that gives logits; FedSieve prepares its layers itself."""
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def patients() -> Dataset:
    """Return the Wisconsin breast cancer data, every fifth patient for testing."""
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    x, y = torch.tensor(table.data, dtype=torch.float32), torch.tensor(table.target)
    test = torch.arange(len(y)) % 5 == 0
    x = (x - x[~test].mean(0)) / x[~test].std(0)

    def part(which: Tensor) -> Data:
        return Data(x[which], y[which])

    return Dataset("patients", part(~test), part(test), ("malignant", "benign"))


def main() -> None:
    """Train ten hospitals, four a round, and watch."""
    method = ZeroFL(sparsity=0.8, r_mask=0.1, policy="2")  # the middle layer
    task = Task(network, patients, clients=10, partition="lda:1.0")
    for r in rounds(Run(method, task, rounds=20, per_round=4, batch=8), engine=local()):
        print(f"round {r.t}: accuracy {r.accuracy:.1%}, {r.bytes_up:,} bytes up, dense {r.bytes_dense_up:,}")


if __name__ == "__main__":
    main()

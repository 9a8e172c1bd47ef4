"""The model, the data of one node, training and testing: nothing of Flower's."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two convolutions and two linear layers, for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Return a node's examples to train on, and to test with."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target)
    own = torch.arange(partition_id, len(y), num_partitions)
    train, test = own[: 4 * len(own) // 5], own[4 * len(own) // 5 :]
    shuffled = torch.Generator().manual_seed(partition_id)
    return (
        DataLoader(TensorDataset(x[train], y[train]), batch_size, shuffle=True, generator=shuffled),
        DataLoader(TensorDataset(x[test], y[test]), batch_size),
    )


def train(net: Net, loader: DataLoader, epochs: int, lr: float) -> float:
    """Train, and return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net: Net, loader: DataLoader) -> tuple[float, float]:
    """Return loss and accuracy."""
    net.eval()
    loss, right, n = 0.0, 0, 0
    with torch.no_grad():
        for x, y in loader:
            output = net(x)
            loss += functional.cross_entropy(output, y, reduction="sum").item()
            right += int((output.argmax(1) == y).sum())
            n += len(y)
    return loss / n, right / n

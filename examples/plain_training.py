"""Handwritten digits in plain PyTorch: what federated_training.py trains across devices (needs scikit-learn)."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Digits(Dataset[tuple[Tensor, int]]):
    """Images with their labels, of which every fifth is for testing."""

    def __init__(self, test: bool):
        images, labels = load_digits(return_X_y=True)
        self.items = [i for i in range(len(labels)) if (i % 5 == 0) == test]
        self.images, self.labels = torch.tensor(images, dtype=torch.float32) / 16, labels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[self.items[i]].view(1, 8, 8), int(self.labels[self.items[i]])


def network() -> nn.Module:
    """Return two convolutions and two linear layers."""
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


WEIGHTS = (1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0)

if __name__ == "__main__":
    train, test, model = DataLoader(Digits(False), 16, shuffle=True), DataLoader(Digits(True), 500), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for epoch in range(10):
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, torch.tensor(WEIGHTS)).backward()
            optimizer.step()
        schedule.step()
        print(epoch, sum(int((model(x).argmax(1) == y).sum()) for x, y in test) / len(test.dataset))  # type: ignore[arg-type]

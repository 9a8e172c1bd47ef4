"""Handwritten digits across twenty devices: plain_training.py with a few lines changed (needs scikit-learn)."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedsieve
from fedsieve.methods import FLASH


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
    data = fedsieve.Dataset.from_torch(Digits(False), Digits(True))
    task = fedsieve.Task(network, data, clients=20, partition="lda:1.0", loss=fedsieve.CrossEntropy(WEIGHTS))
    adamw = {"optimizer": fedsieve.AdamW(), "lr": 2e-3, "lr_end": 1e-5, "lr_schedule": "cosine", "weight_decay": 0.01}
    run = fedsieve.Run(FLASH(density=0.2, c_d=5), task, rounds=40, per_round=5, epochs=5, **adamw)
    for r in fedsieve.rounds(run, fedsieve.local()):
        print(r.t, r.accuracy, r.bytes_up, r.bytes_dense_up)

"""Local training: what is done to a batch before it is learnt from."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedsieve import Data, Dataset, Task, local, open_run, run
from fedsieve.client.training import crop_flip
from fedsieve.methods import FedAvg
from fedsieve.types import InputError, rng
from tiny import blobs, tiny_run


def windows(image: torch.Tensor) -> list[torch.Tensor]:
    """Every crop of an image [c, h, w] out of a border of 4 zeros, and its mirror image."""
    c, h, w = image.shape
    padded = torch.zeros(c, h + 8, w + 8, dtype=image.dtype)
    padded[:, 4 : 4 + h, 4 : 4 + w] = image
    crops = [padded[:, i : i + h, j : j + w] for i in range(9) for j in range(9)]
    return [*crops, *(crop.flip(2) for crop in crops)]


def test_a_crop_is_one_of_the_162_that_there_are_and_all_come_up() -> None:
    image = torch.arange(1, 2 * 6 * 5 + 1, dtype=torch.uint8).view(2, 6, 5)
    found = crop_flip(image.expand(4000, 2, 6, 5), rng(0, "test"))
    assert found.dtype == torch.uint8
    possible = torch.stack(windows(image))
    which = (found[:, None] == possible[None]).all(dim=(2, 3, 4))
    assert (which.sum(1) == 1).all()
    assert which.any(0).all()
    assert 0.45 < float(which[:, 81:].any(1).double().mean()) < 0.55


def test_augmented_training_is_seeded_and_different() -> None:
    plain = tiny_run(FedAvg(), rounds=1)
    changed = replace(plain, task=replace(plain.task, augment="crop_flip"))
    one, two, other = ([*run(r, local())][-1].metrics["loss"] for r in (changed, changed, plain))
    assert one == two != other


def test_only_images_can_be_cropped() -> None:
    def flat() -> Dataset:
        data = blobs()
        train, test = (Data(part.x.flatten(1), part.y) for part in (data.train, data.test))
        return replace(data, train=train, test=test)

    task = Task(lambda: nn.Linear(72, 3), flat, 6, augment="crop_flip")
    with pytest.raises(InputError, match=r"task.augment=crop_flip needs images, but blobs has shape \[72\]"):
        open_run(replace(tiny_run(FedAvg()), task=task))

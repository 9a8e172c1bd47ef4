"""Local training: what is done to a batch before it is learnt from."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsieve import Data, Dataset, Device, Task, local, open_run, rounds
from fedsieve.client.training import Training, crop_flip
from fedsieve.methods import FedAvg
from fedsieve.sparse.policy import norm_parameters
from fedsieve.types import InputError, rng
from tiny import TinyNet, blobs, tiny_run


def windows(image: torch.Tensor) -> list[torch.Tensor]:
    """Every crop of an image [c, h, w] out of a border of 4 zeros, and its mirror image."""
    c, h, w = image.shape
    padded = torch.zeros(c, h + 8, w + 8, dtype=image.dtype)
    padded[:, 4 : 4 + h, 4 : 4 + w] = image
    crops = [padded[:, i : i + h, j : j + w] for i in range(9) for j in range(9)]
    return [*crops, *(crop.flip(2) for crop in crops)]


def test_a_crop_is_one_of_the_162_that_there_are_and_all_come_up() -> None:
    image = torch.arange(1, 2 * 6 * 5 + 1, dtype=torch.uint8).view(2, 6, 5)
    found = crop_flip(image.expand(4000, 2, 6, 5), crop_flip.draw(4000, rng(0, "test")))
    assert found.dtype == torch.uint8
    possible = torch.stack(windows(image))
    which = (found[:, None] == possible[None]).all(dim=(2, 3, 4))
    assert (which.sum(1) == 1).all()
    assert which.any(0).all()
    assert 0.45 < float(which[:, 81:].any(1).double().mean()) < 0.55


def test_augmented_training_is_seeded_and_different() -> None:
    plain = tiny_run(FedAvg(), rounds=1)
    changed = replace(plain, task=replace(plain.task, augment="crop_flip"))
    one, two, other = ([*rounds(r, local())][-1].metrics["loss"] for r in (changed, changed, plain))
    assert one == two != other


def test_only_images_can_be_cropped() -> None:
    def flat() -> Dataset:
        data = blobs()
        train, test = (Data(part.x.flatten(1), part.y) for part in (data.train, data.test))
        return replace(data, train=train, test=test)

    task = Task(lambda: nn.Linear(72, 3), flat, 6, augment="crop_flip")
    with pytest.raises(InputError, match=r"task.augment=crop_flip needs images, but blobs has shape \[72\]"):
        open_run(replace(tiny_run(FedAvg()), task=task))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_norms_are_not_decayed_where_that_is_said(momentum: float) -> None:
    """Two steps by hand: v = momentum v + g + decay w, w -= lr v, the decay of BatchNorm's weight and bias 0."""
    model, data = TinyNet(), blobs().train.subset(torch.arange(8))
    w = {name: value.detach().clone() for name, value in model.named_parameters()}
    v = {name: torch.zeros_like(value) for name, value in w.items()}
    device = Device(model, data, data, 0.1, 2, 8, momentum, weight_decay=0.5, rng=rng(0, "x"), norm_weight_decay=False)
    [*Training(device)]
    shadow = TinyNet().train()
    for _ in range(2):  # whatever the order of the only batch
        shadow.load_state_dict(w, strict=False)
        gradients = torch.autograd.grad(F.cross_entropy(shadow(data.x), data.y), list(shadow.parameters()))
        for (name, _), g in zip(shadow.named_parameters(), gradients, strict=True):
            decay = 0.0 if name in ("bn.weight", "bn.bias") else 0.5
            v[name] = momentum * v[name] + g + decay * w[name]
            w[name] = w[name] - 0.1 * v[name]
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), w[name], rtol=1e-5, atol=1e-6)


def test_which_parameters_are_of_norms() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.Flatten(),
        nn.LayerNorm(8), nn.Linear(8, 3), nn.BatchNorm1d(3, affine=False),
    )  # fmt: skip
    names = {name for name, w in model.named_parameters() if any(w is norm for norm in norm_parameters(model))}
    assert names == {f"{i}.{what}" for i in (1, 2, 3, 5) for what in ("weight", "bias")}


def test_the_runs_choice_reaches_the_clients() -> None:
    for choice in (True, False):
        federation = open_run(tiny_run(FedAvg(), norm_weight_decay=choice))
        assert federation.device(1, 0, TinyNet(), "cpu", {}).norm_weight_decay == choice

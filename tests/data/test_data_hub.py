"""The hub's datasets, from a fake of its library: read right, refused in one line."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fedsieve.data as data
from small_files import _cache, pixels, refuses  # noqa: F401 (the cache is every test's)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake ``datasets`` package with three small repositories."""

    def rows(count: int, image: str, label: str, mode: str, **more: str) -> list[dict]:
        shape = (28, 28) if mode == "L" else (32, 32, 3)
        made = [{image: Image.fromarray(pixels(*shape)), label: i % 10} for i in range(count)]
        return [row | {key: f"{value}{i % 3}" for key, value in more.items()} for i, row in enumerate(made)]

    repositories = {
        "ylecun/mnist": {part: rows(n, "image", "label", "L") for part, n in (("train", 6), ("test", 3))},
        "uoft-cs/cifar10": {part: rows(n, "img", "label", "RGB") for part, n in (("train", 6), ("test", 3))},
        "uoft-cs/cifar100": {part: rows(n, "img", "fine_label", "RGB") for part, n in (("train", 6), ("test", 3))},
        "flwrlabs/femnist": {"train": rows(60, "image", "character", "L", writer_id="f")},
    }

    def load_dataset(name: str) -> dict:
        return repositories[name]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return repositories


@pytest.mark.parametrize(
    ("name", "repository", "image"),
    [
        ("mnist", "ylecun/mnist", "image"),
        ("cifar10", "uoft-cs/cifar10", "img"),
        ("cifar100", "uoft-cs/cifar100", "img"),
    ],
)
def test_hub_images(hub: Any, name: str, repository: str, image: Any) -> None:
    for _ in range(2):  # the second from the cache
        found = data.load_dataset(name, Path("hub"))
        first = np.asarray(hub[repository]["train"][0][image])
        first = first[None] if first.ndim == 2 else first.transpose(2, 0, 1)
        assert np.array_equal(found.train.x[0].numpy(), first)
        assert (found.train.y.tolist(), found.test.y.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])
        hub[repository]["train"][1:] = []
    assert data.dataset_status(name, Path("hub")) == f"huggingface.co/datasets/{repository}"


def test_hub_femnist_holds_out_a_tenth_of_every_writer(hub: Any) -> None:
    found = data.load_dataset("femnist", Path("hub"))
    assert found.groups == ("f0", "f1", "f2")
    assert found.group.bincount().tolist() == [18, 18, 18]
    assert len(found.test) == 6
    everything = torch.cat([found.train.x, found.test.x]).reshape(60, -1)
    assert len(everything.unique(dim=0)) == 60


def test_hub_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses("mnist", Path("hub"), "pip install '.[hub]' in FedSieve's checkout")
    refuses("speech_commands", Path("hub"), "download the public archive")
    assert "download" in data.dataset_status("speech_commands", Path("hub"))

    def offline(_: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    refuses("mnist", Path("hub"), "ylecun/mnist", "no route", "connection")


def test_hub_has_digits_too(hub: Any) -> None:
    assert len(data.load_dataset("digits", Path("hub")).train) == 1442

"""Arrays and PyTorch's datasets become datasets of FedSieve, and are trained on."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

from fedsieve import Data, Dataset, Run, Task, local, rounds
from fedsieve.data.partition import partition
from fedsieve.methods import FedAvg
from refusals import refused

X = np.random.default_rng(0).normal(size=(50, 3))
Y = np.arange(50) % 4
WARD = np.array([f"ward {i % 5}" for i in range(50)])


def same(a: Data, b: Data) -> bool:
    return len(a.tensors) == len(b.tensors) and all(map(torch.equal, a.tensors, b.tensors))


# Arrays


def test_arrays_are_split_once_by_the_seed() -> None:
    data = Dataset.from_numpy(X, Y, 0.2, client=WARD)
    assert (len(data.train), len(data.test), data.classes) == (40, 10, ("0", "1", "2", "3"))
    assert (data.train.x.dtype, data.train.y.dtype) == (torch.float32, torch.int64)  # type: ignore[union-attr]
    both = torch.cat([data.train.x, data.test.x])  # type: ignore[arg-type]
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, X.astype(np.float32).tolist()))
    for x, y, owner in zip(*data.train.tensors, data.group, strict=True):  # type: ignore[arg-type]
        (row,) = np.flatnonzero((X.astype(np.float32) == x.numpy()).all(1))
        assert (y, data.groups[owner]) == (Y[row], WARD[row])
    assert same(data.train, Dataset.from_numpy(X, Y, 0.2).train)
    assert not same(data.train, Dataset.from_numpy(X, Y, 0.2, seed=1).train)
    assert len(partition("group", data, 5, 0)) == len(partition("group:client", data, 5, 0)) == 5


def test_arrays_of_a_test_set_of_their_own_stay_apart() -> None:
    data = Dataset.from_numpy(X[:30], Y[:30], (X[30:], Y[30:]), name="own", mean=(0.5,), std=2)
    assert torch.equal(data.test.x, torch.tensor(X[30:], dtype=torch.float32))  # type: ignore[arg-type]
    assert (data.name, data.train.mean, data.test.std, data.group) == ("own", (0.5,), (2.0,), None)


@pytest.mark.parametrize(
    ("y", "options", "classes", "kind"),
    [
        (Y.astype(np.uint8), {}, 4, torch.int64),
        (Y > 1, {}, 2, torch.int64),
        (Y, {"classes": 7}, 7, torch.int64),
        (Y, {"classes": ()}, 0, torch.int64),
        (X[:, 0], {}, 0, torch.float32),
        (X[:, :2], {"classes": ["a", "b"]}, 2, torch.float32),
        (np.stack([Y, Y]).T, {}, 4, torch.int64),
        (np.array(["cat", "dog"])[Y % 2], {}, 2, torch.int64),
    ],
)
def test_whole_numbers_and_names_are_classes(y: Any, options: Any, classes: int, kind: torch.dtype) -> None:
    data = Dataset.from_numpy(X, y, **options)
    assert (len(data.classes), data.train.y.dtype) == (classes, kind)  # type: ignore[union-attr]


def test_several_inputs_keep_their_names() -> None:
    data = Dataset.from_numpy({"ids": Y, "numbers": X}, {"low": X[:, 0], "high": Y}, 0.5)
    assert {name: one.dtype for name, one in data.train.x.items()} == {"ids": torch.int64, "numbers": torch.float32}  # type: ignore[union-attr]
    assert data.classes == ()
    assert len(Dataset.from_numpy((X, Y), Y).train.x) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Dataset.from_numpy(X, Y - 1), "targets begin at -1, where classes are numbered from 0"),
        (lambda: Dataset.from_numpy(X, Y * 100), r"targets reach 300 in 50 examples: say classes=N .* classes=\(\)"),
        (lambda: Dataset.from_numpy(X, Y, 1.5), "a share of all between 0 and 1, got 1.5"),
        (lambda: Dataset.from_numpy(X, Y, 0), "a share of all between 0 and 1, got 0"),
        (lambda: Dataset.from_numpy(X, Y, X), "test must be test examples, "),
        (lambda: Dataset.from_numpy(X, Y, 0.01), "a share of 0.01 of 50 examples is none: raise test"),
        (lambda: Dataset.from_numpy(X, Y, (X[:, :2], Y)), r"have the shapes \[3\] and \[2\]: give both the same"),
        (lambda: Dataset.from_numpy(X, Y[:7]), "there are 50 examples of one kind and 7 of another"),
        (lambda: Dataset.from_numpy(X, Y, client=[1, 2]), "client must name the owner of each of the 50 examples"),
        (lambda: Dataset.from_numpy(X.astype(object), Y), "x: numbers are needed, got an array of object"),
        (lambda: Dataset.from_numpy(X, WARD, classes=["ward 1"]), "the label 'ward 0' is none of the classes"),
        (lambda: Dataset.from_numpy(X, Y, classes="abcd"), "classes must be the classes' names, or their number"),
    ],
)
def test_arrays_that_do_not_fit_are_one_line(call: Any, message: str) -> None:
    refused(call, message)


# PyTorch's datasets


class Pictures:
    """As torchvision's: images of Pillow and class numbers, through a transform that counts its calls."""

    classes = ("cat", "dog")

    def __init__(self) -> None:
        self.read = list[int]()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if not 0 <= i < 12:
            raise IndexError(i)
        self.read.append(i)
        return Image.fromarray(np.full((4, 5, 3), i, np.uint8)), i % 2


def test_every_item_of_a_dataset_is_read_once() -> None:
    pictures = Pictures()
    data = Dataset.from_torch(Subset(pictures, range(10)), Subset(pictures, [10, 11]))  # type: ignore[arg-type]
    assert pictures.read == [10, 11, *range(10)] or sorted(pictures.read) == [*range(12)]
    assert data.classes == ("cat", "dog")
    assert (tuple(data.train.x.shape), data.train.x.dtype) == ((10, 3, 4, 5), torch.uint8)  # type: ignore[union-attr]
    assert data.train.x[:, 0, 0, 0].tolist() == [*range(10)]  # type: ignore[index, call-overload]
    assert data.test.y.tolist() == [0, 1]  # type: ignore[union-attr]


def test_items_have_the_parts_that_they_have() -> None:
    x, y = torch.tensor(X), torch.tensor(Y)
    plain = TensorDataset(x, y)
    whole = Dataset.from_torch(ConcatDataset([plain, plain]), 0.5)
    assert (len(whole.train), len(whole.classes)) == (50, 4)
    assert same(Dataset.from_torch(plain).train, Dataset.from_numpy(x, Y).train)
    several = Dataset.from_torch(TensorDataset(x, y, x[:, 0], y), y=2, client=3, test=TensorDataset(x, y, x[:, 0], y))
    assert isinstance(several.train.x, tuple)
    assert several.train.y.dtype == x.dtype  # type: ignore[union-attr]
    assert torch.equal(several.group, y)  # type: ignore[arg-type]
    by_name = Dataset.from_torch(StackDataset(ids=y, mask=y > 0, label=y, ward=[*WARD]), client="ward")  # type: ignore[arg-type]
    assert [*by_name.train.x] == ["ids", "mask"]
    assert by_name.groups == tuple(f"ward {i}" for i in range(5))
    by_path = Dataset.from_torch([({"a": i, "b": [0.5, i]}, {"t": float(i)}) for i in range(20)])
    assert {key: tuple(one.shape) for key, one in by_path.train.x.items()} == {"a": (16,), "b": (16, 2)}  # type: ignore[union-attr]
    assert [*by_path.train.y] == ["t"]
    by_owner = Dataset.from_torch(plain, client=WARD)
    assert len(partition("group", by_owner, 5, 0)) == 5


def bad(item: Any, at: int = 3) -> list[Any]:
    items: list[Any] = [(torch.zeros(2), 1)] * 5
    return [*items[:at], item, *items[at:]]


class Failing(list):
    def __getitem__(self, i: Any) -> Any:
        raise ValueError(f"no file {i}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Dataset.from_torch(bad((torch.zeros(3), 1))), r"item 3 of the dataset has the shape \[3\], the first"),
        (lambda: Dataset.from_torch(bad((torch.zeros(2), "a"))), "item 3 of the dataset has a text, the first"),
        (lambda: Dataset.from_torch(bad((torch.zeros(2),))), "item 3 of the dataset has other parts than the first"),
        (lambda: Dataset.from_torch(bad(torch.zeros(2), 0)), "it is Tensor, where .x, y. or a dictionary is needed"),
        (lambda: Dataset.from_torch(bad((object(), 1))), "object is no tensor, array, number or image"),
        (lambda: Dataset.from_torch([(1,)] * 4), "an item holds a target and no input"),
        (lambda: Dataset.from_torch([("a", 1)] * 9), "an input is a text: make numbers of it"),
        (
            lambda: Dataset.from_torch([({"a": {"b": 1}}, 1)] * 4),
            "may be tuples or dictionaries of tensors, but not of",
        ),
        (lambda: Dataset.from_torch([{"x": 1, "z": 2}] * 4), "y must be a part of an item, one of 'x', 'z': got None"),
        (lambda: Dataset.from_torch([(1, 2)] * 4, client=5), "client must be a part of an item, one of 0, 1: got 5"),
        (lambda: Dataset.from_torch(iter([(1, 2)])), "has no length or no items by number"),
        (lambda: Dataset.from_torch([]), "the dataset has no item"),
        (lambda: Dataset.from_torch(Failing([1])), r"item 0 of the dataset cannot be read \(no file 0\)"),
    ],
)
def test_items_that_do_not_fit_are_one_line(call: Any, message: str) -> None:
    refused(call, message)


def test_what_was_made_is_trained_on() -> None:
    data = Dataset.from_torch([({"x": X[i].astype(np.float32), "k": Y[i]}, Y[i]) for i in range(50)], classes=4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 8), nn.Linear(11, 4)

        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.cat([x, self.embedding(k)], 1))
            return logits

    task = Task(Net(), data, clients=4, partition="dirichlet:1:1")
    *_, last = rounds(Run(FedAvg(), task, rounds=4, per_round=4, epochs=10, lr=0.5, lr_end=0.5), local())
    assert last.accuracy is not None
    assert last.accuracy > 0.8

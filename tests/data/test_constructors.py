"""A user's own data become a dataset: arrays, PyTorch's datasets, tables, folders, the Hugging Face library's."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

from fedsieve import Data, Dataset, InputError, Run, Task, local, rounds
from fedsieve.data.partition import partition
from fedsieve.methods import FedAvg

X = np.random.default_rng(0).normal(size=(50, 3))
Y = np.arange(50) % 4
WARD = np.array([f"ward {i % 5}" for i in range(50)])


def same(a: Data, b: Data) -> bool:
    return len(a.tensors) == len(b.tensors) and all(map(torch.equal, a.tensors, b.tensors))


def refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


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


# Tables


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


PATIENTS = "age,sex,ward,ill\n" + "".join(
    f"{20 + i}.5,{'fm'[i % 2]},w{i % 3},{['no', 'yes'][i % 2]}\n" for i in range(30)
)


def test_a_table_has_numbers_categories_classes_and_owners(tmp_path: Path) -> None:
    path = table(tmp_path / "patients.csv", PATIENTS)
    data = Dataset.from_csv(path, path, y="ill", categorical=["sex"], client="ward", standardize=True)
    assert (data.name, data.classes, data.groups) == ("patients", ("no", "yes"), ("w0", "w1", "w2"))
    assert data.train.x[:2].tolist() == [[20.5, 1, 0], [21.5, 0, 1]]  # type: ignore[index]
    assert data.train.y.tolist() == [0, 1] * 15  # type: ignore[union-attr]
    x, _ = data.train.batch(slice(None))
    assert isinstance(x, Tensor)
    assert x.mean(0).abs().max() < 1e-5
    assert x.std(0, correction=0).tolist() == pytest.approx([1, 1, 1])
    assert [len(part) for part in partition("group:ward", data, 3, 0)] == [10, 10, 10]
    assert {name: len(column) for name, column in data.columns.items()} == {"sex": 30, "ward": 30, "ill": 30}


def test_a_target_is_what_its_column_holds(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "\ufeffa;b;c\n1;0.5;2\n\n2; 1e1 ;0\n3;2;1\n")
    assert Dataset.from_csv(path, path, y="b", delimiter=";").train.y.tolist() == [0.5, 10, 2]  # type: ignore[union-attr]
    assert len(Dataset.from_csv(path, path, y="c", delimiter=";").classes) == 3
    two = Dataset.from_csv(path, path, y=["b", "c"], x=["a"], delimiter=";")
    assert (two.train.y.tolist(), two.classes) == ([[0.5, 2], [10, 0], [2, 1]], ())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (PATIENTS, {"y": "dead"}, "has no column 'dead': it has age, sex, ward, ill"),
        (PATIENTS, {"y": "ill", "client": "hospital"}, "has no column 'hospital'"),
        ("a,y\n1,p\n2,\n", {"y": "y"}, r"column 'y', row 2: a value is missing: fill it, or take the row out"),
        ("a,y\n,p\nf,q\n", {"y": "y", "categorical": ["a"]}, "column 'a', row 1: a value is missing"),
        ("a,y,c\n1,p,\n2,q,b\n", {"y": "y", "client": "c"}, "column 'c', row 1: a value is missing"),
        (PATIENTS, {"y": "ill"}, "column 'sex', row 1: 'f' is no number: declare the column categorical"),
        (PATIENTS, {"y": "ill", "x": ["age"], "categorical": ["ward"]}, "'ward' is categorical, but no input"),
        (PATIENTS, {"y": ["age", "ill"], "x": ["age"]}, "column 'ill', row 1: 'no' is no number"),
        (PATIENTS, {"y": "ill", "x": []}, "no column left for the inputs"),
        ("a,b\n1,2\n3\n", {"y": "b"}, "line 3 has 1 columns, the first 2"),
        ("a,b\n1,2\n,3\n", {"y": "b"}, "column 'a', row 2: '' is no number: fill it"),
        ("a,b\n1,2\ninf,3\n", {"y": "b"}, "row 2: 'inf' is not finite"),
        ("a,a\n1,2\n", {"y": "a"}, "must name every column, each by another name"),
        ("a,b\n", {"y": "b"}, "holds no row"),
        ("", {"y": "b"}, "holds no row"),
        ('a,b\n"1,2\n', {"y": "b"}, "is no table of comma-separated values"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(tmp_path: Path, text: str, options: Any, message: str) -> None:
    refused(lambda: Dataset.from_csv(table(tmp_path / "a.csv", text), **options), message)


def test_a_table_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    refused(lambda: Dataset.from_csv(tmp_path / "a.csv", y="b"), r"cannot be read \(No such file or directory\)")
    (tmp_path / "b.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    refused(lambda: Dataset.from_csv(tmp_path / "b.csv", y="b"), "is no table of comma-separated values")


# Images


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (5, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 7).save(path)


def test_folders_are_classes(tmp_path: Path) -> None:
    for part, n in (("train", 6), ("test", 2)):
        for i in range(n):
            picture(tmp_path / part / ("cat", "dog")[i % 2] / f"u{i % 3}_{i}.png")
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    data = Dataset.from_folder(tmp_path, client=lambda path: path.stem.partition("_")[0])
    assert (data.name, data.classes, data.groups) == (tmp_path.name, ("cat", "dog"), ("u0", "u1", "u2"))
    assert (tuple(data.train.x.shape), len(data.test)) == ((6, 3, 4, 5), 2)  # type: ignore[union-attr]
    assert data.train.x[0, :, 0, 0].tolist() == [7, 0, 0]  # type: ignore[index, call-overload]
    assert data.train.y.tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
    grey = Dataset.from_folder(tmp_path / "train", 0.5, mode="L", size=(2, 2))
    assert tuple(grey.train.x.shape) == (3, 1, 2, 2)  # type: ignore[union-attr]


def test_images_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    refused(lambda: Dataset.from_folder(tmp_path / "none"), "none is no folder: name one that holds")
    refused(lambda: Dataset.from_folder(tmp_path), "holds no folder of images")
    picture(tmp_path / "a/0.png", "L")
    picture(tmp_path / "b/1.png", "L", (6, 4))
    refused(lambda: Dataset.from_folder(tmp_path), r"1.png has \(4, 6\) pixels, .*0.png \(4, 5\): say what to resize")
    refused(lambda: Dataset.from_folder(tmp_path, mode="HSV"), "mode must be L .* got 'HSV'")
    (tmp_path / "a/2.png").write_bytes(b"no image")
    refused(lambda: Dataset.from_folder(tmp_path, size=(4, 4)), "2.png is no image that can be read")
    (tmp_path / "a/2.png").write_bytes((tmp_path / "a/0.png").read_bytes()[:50])
    refused(lambda: Dataset.from_folder(tmp_path, size=(4, 4)), "2.png is no image that can be read")


# The Hugging Face library


@pytest.fixture
def hf() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("datasets")


@pytest.fixture
def split(hf: Any) -> Any:
    pictures = [Image.fromarray(np.full((4, 5, 3), i, np.uint8)) for i in range(20)]
    features = {
        "image": hf.Image(),
        "label": hf.ClassLabel(names=["cat", "dog"]),
        "ids": hf.Sequence(hf.Value("int32")),
        "ragged": hf.Sequence(hf.Value("int32")),
        "score": hf.Value("float64"),
        "who": hf.Value("string"),
    }
    rows = {
        "image": pictures,
        "label": [i % 2 for i in range(20)],
        "ids": [[i, i + 1] for i in range(20)],
        "ragged": [[0] * (i % 3) for i in range(20)],
        "score": [i / 2 for i in range(20)],
        "who": [f"w{i % 4}" for i in range(20)],
    }
    return hf.Dataset.from_dict(rows, features=hf.Features(features))


def test_columns_of_the_library_are_named(hf: Any, split: Any) -> None:
    data = Dataset.from_hf(hf.DatasetDict(train=split, test=split), x="image", y="label", client="who")
    assert (data.classes, data.groups, len(data.test)) == (("cat", "dog"), ("w0", "w1", "w2", "w3"), 20)
    assert tuple(data.train.x.shape) == (20, 3, 4, 5)  # type: ignore[union-attr]
    assert data.train.x[:, 2, 1, 1].tolist() == [*range(20)]  # type: ignore[index, call-overload]
    several = Dataset.from_hf(split, x=["ids", "score"], y="score")
    assert {name: one.dtype for name, one in several.train.x.items()} == {"ids": torch.int64, "score": torch.float32}  # type: ignore[union-attr]
    assert (several.classes, len(several.train)) == ((), 16)
    assert Dataset.from_hf(split, x="ids", y="who").classes == ("w0", "w1", "w2", "w3")
    assert [*Dataset.from_hf(split, x="image", y="who").columns] == ["label", "who"]
    splits = Dataset.from_hf(hf.DatasetDict(train=split, validation=split), "validation", x="ids", y="label")
    assert len(splits.test) == 20


def test_columns_that_do_not_fit_are_one_line(hf: Any, split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: Dataset.from_hf(split, x="img", y="label"), "no column 'img': it has image, label, ids")
    refused(lambda: Dataset.from_hf(split, x="ids", y="label", client="writer"), "no column 'writer'")
    refused(lambda: Dataset.from_hf(split, x="ragged", y="label"), "'ragged' holds values of several shapes: pad")
    refused(lambda: Dataset.from_hf(split, x="who", y="label"), "'who' holds texts: make numbers of them first")
    refused(
        lambda: Dataset.from_hf(hf.DatasetDict(test=split), x="ids", y="label"), "there is no split train, but test"
    )
    refused(lambda: Dataset.from_hf(hf.DatasetDict(train=split), "dev", x="ids", y="label"), "there is no split 'dev'")
    refused(lambda: Dataset.from_hf(split.to_iterable_dataset(), x="ids", y="label"), "cannot be read as a whole")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    refused(
        lambda: Dataset.from_hf("nobody/nothing-at-all", x="ids", y="label"),
        "nobody/nothing-at-all cannot be read from the hub .*: check the name and the connection",
    )


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

"""Tables, folders of images and the Hugging Face library's columns become datasets."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedsieve import Dataset
from fedsieve.data.partition import partition
from refusals import refused

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

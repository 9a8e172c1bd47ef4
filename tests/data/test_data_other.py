"""Data that are no classes of images: the shipped regression, and Shakespeare by role."""

import numpy as np
import pytest
import torch

import fedsieve.data as data
from fedsieve.data import diabetes, shakespeare
from fedsieve.data.partition import partition
from fedsieve.data.shakespeare import Shakespeare, spoken
from fedsieve.types import InputError
from small_files import _cache, refuses  # noqa: F401 (the cache is every test's)


def test_the_patients_that_are_shipped_are_scikit_learns() -> None:
    original = pytest.importorskip("sklearn.datasets").load_diabetes(scaled=False)
    with np.load(diabetes.TABLE) as file:
        np.testing.assert_allclose(file["x"], original.data, rtol=1e-6)
        np.testing.assert_array_equal(file["y"], original.target)
    assert (*original.feature_names,) == diabetes.FEATURES


def test_the_regression_is_standardised_by_what_trains() -> None:
    dataset = data.load_dataset("diabetes", None)
    assert (len(dataset.train), len(dataset.test), dataset.classes, dataset.labels) == (354, 88, (), None)
    x, y = dataset.train.batch(slice(None))
    assert (x.dtype, y.dtype) == (torch.float32, torch.float32)
    for z in (*x.T, y):
        assert z.mean().item() == pytest.approx(0, abs=1e-4)
        assert z.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert dataset.test.batch(slice(None))[0].mean().abs() > 1e-3
    both = torch.cat([dataset.train.x, dataset.test.x])
    with np.load(diabetes.TABLE) as file:
        assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, file["x"].tolist()))
    assert [len(part) for part in partition("group:sex", dataset, 2, 0)] == [186, 168]
    assert data.load_dataset("diabetes", None).digest == dataset.digest


def test_least_squares_explains_what_is_known_of_it() -> None:
    # R2 of ordinary least squares on these data is about .52 in the sample; 1 - MSE is the same number here.
    dataset = data.load_dataset("diabetes", None)
    x, y = dataset.train.batch(slice(None))
    weights = torch.linalg.lstsq(x.double(), y.double()[:, None]).solution
    assert 1 - ((x.double() @ weights)[:, 0] - y).square().mean().item() == pytest.approx(0.52, abs=0.03)


def test_blocks_are_spoken_by_roles() -> None:
    text = "A:\nOne,\ntwo.\n\nB C:\nNo.\n\nA:\n\n\n\nA:\nThree.\n\nD:\n"
    assert spoken(text) == {"A": "One,\ntwo.\n\nThree.", "B C": "No.", "D": ""}
    with pytest.raises(ValueError, match="a block begins 'Three"):
        spoken("A:\nOne.\n\nThree.")


def test_windows_follow_one_another_and_never_cross_from_training_to_test() -> None:
    long, longer = "abcdefghij" * 25, "ABCDE" * 60
    dataset = Shakespeare(20).windows({"z": longer, "y": "x" * 199, "a": long})
    assert dataset["groups"].tolist() == ["a", "z"]
    alphabet = np.array([*shakespeare.CHARACTERS])
    assert "".join(alphabet[dataset["train_x"][0]]) == long[:20]
    assert "".join(alphabet[dataset["train_y"][1]]) == long[21:41]
    np.testing.assert_array_equal(dataset["train_x"][1:9, 0], dataset["train_y"][:8, -1])
    assert dataset["group"].tolist() == [0] * 9 + [1] * 11  # (200 - 1) // 20, (240 - 1) // 20
    assert "".join(alphabet[dataset["test_x"][0]]) == long[200:220]
    assert dataset["test_x"].shape == (2 + 2, 20)  # (50 - 1) // 20, (60 - 1) // 20
    assert {dataset[name].dtype for name in ("train_x", "train_y", "test_x", "test_y")} == {np.dtype(np.int64)}


def test_what_is_not_the_text_is_refused_in_one_line(tmp_path: object) -> None:
    from pathlib import Path

    root = Path(str(tmp_path))
    refuses("shakespeare", None, "--data or FEDSIEVE_DATA", "fedsieve data shakespeare --from")
    refuses("shakespeare", root, "tinyshakespeare.txt is missing", "input.txt")
    (root / "shakespeare").mkdir()
    (root / "shakespeare/tinyshakespeare.txt").write_text("A:\nHo!\n")
    refuses("shakespeare", root, "is damaged (its md5 is not the published one)", "delete it")
    with pytest.raises(InputError, match="a window must have 1 to 159 characters, got 160"):
        Shakespeare(160)


@pytest.mark.data
def test_the_text_has_227_roles() -> None:
    root = data.root_from(None)
    dataset = data.load_dataset("shakespeare", root)
    assert (len(dataset.train), len(dataset.test), len(dataset.groups), len(dataset.classes)) == (10107, 2434, 227, 65)
    assert isinstance(dataset.train.x, torch.Tensor)
    assert dataset.train.x.shape == dataset.train.y.shape == (10107, 80)
    assert (int(dataset.train.x.min()), int(dataset.train.x.max())) == (0, 64)
    assert dataset.group is not None
    assert len(dataset.group.unique()) == 227
    sizes = {len(part) for part in partition("group", dataset, 227, 0)}
    assert min(sizes) == 2
    assert data.dataset_status("shakespeare", root).endswith("shakespeare: text (1,115,394 characters)")


def test_an_archive_of_char_rnn_has_it() -> None:
    source = Shakespeare()
    assert source.target("char-rnn-master/data/tinyshakespeare/input.txt") == "tinyshakespeare.txt"
    assert source.target("char-rnn-master/train.lua") is None
    with pytest.raises(ValueError, match="is not the published text"):
        source.examine("tinyshakespeare.txt", b"A:\nHo!\n")

"""Datasets, from small files in every public form: read right, checked, refused in one line."""

import gzip
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fedsieve.data as data
from fedsieve.data import cifar10, digits, femnist, mnist, source
from fedsieve.types import InputError
from small_files import _cache, md5, pickled, pixels, refuses  # noqa: F401 (the cache is every test's)

# Digits


def test_the_digits_that_are_shipped_are_whole() -> None:
    with np.load(digits.FILE) as file:
        x, y = file["x"], file["y"]
    assert (x.shape, y.shape) == ((1797, 64), (1797,))
    digest = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_digits_are_scikit_learns() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    ours, original = data.load_dataset("digits", None), load_digits()
    assert (len(ours.train), len(ours.test)) == (1442, 355)
    assert ours.train.x.shape[1:] == (1, 8, 8)
    assert ours.train.x.dtype == torch.float32
    assert (ours.train.x.min(), ours.train.x.max()) == (0, 1)
    with np.load(digits.FILE) as file:
        assert np.array_equal(file["x"], original.data)
        assert np.array_equal(file["y"], original.target)
    zeros = original.images[original.target == 0] / 16
    assert np.array_equal(ours.test.x[ours.test.y == 0].squeeze(1).numpy(), zeros[4::5].astype(np.float32))
    assert ours.test.y.bincount().tolist() == (np.bincount(original.target) // 5).tolist()


# MNIST


def mnist_files(root: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> dict[str, np.ndarray]:
    folder = root / "mnist"
    folder.mkdir()
    arrays = {"train": (pixels(60, 28, 28), pixels(60) % 10), "t10k": (pixels(20, 28, 28), pixels(20) % 10)}
    sums = {}
    for part, (x, y) in arrays.items():
        for name, array in ((f"{part}-images-idx3-ubyte", x), (f"{part}-labels-idx1-ubyte", y)):
            plain = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            zipped = gzip.compress(plain)
            sums[name] = (md5(zipped), md5(plain))
            (folder / (f"{name}.gz" if packed else name)).write_bytes(zipped if packed else plain)
    monkeypatch.setattr(mnist, "MD5", sums)
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Any) -> None:
    arrays = mnist_files(tmp_path, monkeypatch, packed)
    found = data.load_dataset("mnist", tmp_path)
    form = "idx.gz files" if packed else "idx files"
    assert data.dataset_status("mnist", tmp_path) == f"{tmp_path}/mnist: {form} (60,000 training, 10,000 test)"
    assert np.array_equal(found.train.x.numpy(), arrays["train"][0][:, None])
    assert found.test.y.tolist() == arrays["t10k"][1].tolist()
    assert (found.train.mean, found.train.std, found.train.x.dtype) == ((0.1307,), (0.3081,), torch.uint8)


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_damaged_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Any) -> None:
    mnist_files(tmp_path, monkeypatch, packed)
    labels = tmp_path / "mnist" / ("t10k-labels-idx1-ubyte" + ".gz" * packed)
    labels.write_bytes(labels.read_bytes()[:-1])
    refuses("mnist", tmp_path, str(labels), "damaged", "md5", "download")
    labels.unlink()
    refuses("mnist", tmp_path, "t10k-labels-idx1-ubyte", "missing", "download")


def test_sha256sums_in_the_data_folder_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist_files(tmp_path, monkeypatch, True)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  ./mnist/train-images-idx3-ubyte.gz\n")
    refuses("mnist", tmp_path, "train-images-idx3-ubyte.gz", "SHA256SUMS")


@pytest.mark.parametrize("line", ["oneword", "0123  mnist/x", "0" * 64, f"{'0' * 64}  ", "SHA256 (x) = 00", "\x00\xff"])
def test_a_malformed_line_of_sha256sums_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    mnist_files(tmp_path, monkeypatch, True)
    (tmp_path / "SHA256SUMS").write_bytes(f"{'0' * 64}  other\n\n{line}\n".encode("latin-1"))
    refuses("mnist", tmp_path, f"{tmp_path / 'SHA256SUMS'} line 3 is not a sha256")


@pytest.mark.parametrize("form", ["{sum}  {name}", "{sum} *{name}", "{sum}  ./{name}", "{upper}  {name}\r"])
@pytest.mark.parametrize(
    "name",
    ["cifar10/cifar-10-batches-bin/a.bin", "femnist/train/a.json", "other/a", "mnist/MNIST/raw/a", "MNIST/raw/a"],
)
def test_sha256sums_of_nested_files_are_checked(tmp_path: Path, form: str, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"contents")
    digest = hashlib.sha256(b"contents").hexdigest()
    (tmp_path / "SHA256SUMS").write_text(form.format(sum=digest, upper=digest.upper(), name=name))
    assert source.read_download(file, "get it") == b"contents"
    file.write_bytes(b"other")
    with pytest.raises(InputError, match="the one in SHA256SUMS"):
        source.read_download(file, "get it")


def test_the_folder_above_is_named_for_nested_files() -> None:
    for name in ("femnist/train/a.json", "cifar10/cifar-10-batches-bin/b.bin", "mnist/speech_commands/yes"):
        *_, place = (part for part in Path(name).parts if part in data.NAMES)
        assert f"the folder above {place}/)" in str(source.missing(Path("/mnist/root") / name, "get it"))


# CIFAR-10


def batches(rows: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    made = {name: np.concatenate([pixels(rows, 1) % 10, pixels(rows, 3072)], 1) for name in cifar10.MD5}
    monkeypatch.setattr(cifar10, "MD5", {name: md5(batch.tobytes()) for name, batch in made.items()})
    return made


def check_cifar10(root: Path, made: dict[str, np.ndarray]) -> None:
    found = data.load_dataset("cifar10", root)
    train = np.concatenate([made[f"data_batch_{i}"] for i in range(1, 6)])
    assert np.array_equal(found.train.x.numpy(), train[:, 1:].reshape(-1, 3, 32, 32))
    assert found.train.y.tolist() == train[:, 0].tolist()
    assert np.array_equal(found.test.x.numpy(), made["test_batch"][:, 1:].reshape(-1, 3, 32, 32))
    assert found.test.y.tolist() == made["test_batch"][:, 0].tolist()


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_binary_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    folder = tmp_path / "cifar10" / inside
    folder.mkdir(parents=True)
    made = batches(6, monkeypatch)
    for name, batch in made.items():
        (folder / f"{name}.bin").write_bytes(batch.tobytes())
    check_cifar10(tmp_path, made)
    assert data.dataset_status("cifar10", tmp_path).endswith("binary version (50,000 training, 10,000 test)")
    (folder / "test_batch.bin").write_bytes(b"\0" * 6 * 3073)
    refuses("cifar10", tmp_path, "test_batch.bin", "damaged", "cifar-10-binary.tar.gz")
    (folder / "data_batch_3.bin").unlink()
    refuses("cifar10", tmp_path, "data_batch_3.bin", "missing", "cifar-10-binary.tar.gz")


def test_cifar10_webp_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    made = batches(6, monkeypatch)
    for name, batch in made.items():
        rows = [
            np.concatenate([i.reshape(3, 32, 32).transpose(1, 2, 0) for i in batch[r : r + 3, 1:]], 1) for r in (0, 3)
        ]
        Image.fromarray(np.concatenate(rows)).save(folder / f"{name}.webp", lossless=True)
    train = np.concatenate([made[f"data_batch_{i}"][:, 0] for i in range(1, 6)])
    np.savez(folder / "labels.npz", train=train, test=made["test_batch"][:, 0])
    check_cifar10(tmp_path, made)
    check_cifar10(tmp_path, made)  # from the cache
    assert len(list((tmp_path / "cache").iterdir())) == 1
    (folder / "data_batch_2.webp").write_bytes((folder / "data_batch_1.webp").read_bytes())
    refuses("cifar10", tmp_path, "data_batch_2.webp", "damaged", "md5")
    (folder / "data_batch_2.webp").write_bytes(b"RIFF")
    refuses("cifar10", tmp_path, "data_batch_2.webp", "not a WebP image")
    (folder / "data_batch_2.webp").unlink()
    refuses("cifar10", tmp_path, "data_batch_2.webp", "missing")
    (folder / "labels.npz").write_bytes(b"PK")
    refuses("cifar10", tmp_path, "labels.npz", "damaged")
    (folder / "labels.npz").unlink()
    refuses("cifar10", tmp_path, "labels.npz", "missing")


# FEMNIST


def leaf_json(path: Path, samples: dict[str, tuple[np.ndarray, list[int]]]) -> None:
    users = {w: {"x": (x.reshape(len(x), 784) / 255).tolist(), "y": y} for w, (x, y) in samples.items()}
    sizes = [len(y) for _, y in samples.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"users": list(users), "num_samples": sizes, "user_data": users}))


@pytest.mark.parametrize("inside", [("", ""), ("train", "test")])
def test_femnist_leaf_json(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "femnist"
    a, b, c, t = pixels(2, 28, 28), pixels(1, 28, 28), pixels(3, 28, 28), pixels(2, 28, 28)
    train, test = (folder / place for place in inside)
    leaf_json(train / "all_data_0_niid_05_keep_0_train_9.json", {"f2": (a, [0, 61]), "f1": (b, [36])})
    leaf_json(train / "all_data_1_niid_05_keep_0_train_9.json", {"f0": (c, [1, 2, 3])})
    refuses("femnist", tmp_path, "test", "missing", "TalwalkarLab/leaf")
    leaf_json(test / "all_data_0_niid_05_keep_0_test_9.json", {"f2": (t, [10, 35])})
    found = data.load_dataset("femnist", tmp_path)
    assert np.array_equal(found.train.x.numpy(), np.concatenate([a, b, c])[:, None])
    assert torch.equal(found.train.batch(slice(0, 1))[0], torch.from_numpy(a[:1, None]).float() / 255)
    assert (found.train.y.tolist(), found.test.y.tolist()) == ([0, 61, 36, 1, 2, 3], [10, 35])
    assert (found.group.tolist(), found.groups) == ([2, 2, 1, 0, 0, 0], ("f0", "f1", "f2"))
    assert (len(found.classes), found.classes[36]) == (62, "a")
    assert data.dataset_status("femnist", tmp_path).endswith("LEAF json")
    (train / "all_data_1_niid_05_keep_0_train_9.json").write_text("{")
    refuses("femnist", tmp_path, "all_data_1_niid_05_keep_0_train_9.json", "damaged", "TalwalkarLab/leaf")


ROW = [0.5] * 784


@pytest.mark.parametrize(
    "users",
    [
        {},
        5,
        [],
        {"f": 5},
        {"f": {"x": [], "y": []}},
        {"f": {"x": [ROW]}},
        {"f": {"x": [ROW], "y": [700]}},
        {"f": {"x": [ROW], "y": [62]}},
        {"f": {"x": [ROW], "y": [-1]}},
        {"f": {"x": [ROW], "y": [0.5]}},
        {"f": {"x": [ROW], "y": ["a"]}},
        {"f": {"x": [ROW], "y": [10**400]}},
        {"f": {"x": [ROW], "y": [1, 2]}},
        {"f": {"x": [ROW], "y": 1}},
        {"f": {"x": [ROW[1:]], "y": [1]}},
        {"f": {"x": [ROW[:392], ROW[:392]], "y": [1]}},
        {"f": {"x": [ROW, ROW[1:]], "y": [1, 2]}},
        {"f": {"x": [[*ROW[1:], 1.5]], "y": [1]}},
        {"f": {"x": [[*ROW[1:], None]], "y": [1]}},
    ],
)
def test_femnist_json_of_another_shape_is_damaged(tmp_path: Path, users: Any) -> None:
    folder = tmp_path / "femnist"
    leaf_json(folder / "all_data_0_test_9.json", {"f": (pixels(1, 28, 28), [1])})
    (folder / "all_data_0_train_9.json").write_text(json.dumps({"user_data": users}))
    refuses("femnist", tmp_path, "all_data_0_train_9.json is damaged (not LEAF json", "TalwalkarLab/leaf")


@pytest.mark.parametrize("text", ["[]", "5", "{}", "[" * 100_000, '{"user_data": {"f": ' * 100_000])
def test_femnist_json_that_is_something_else_is_damaged(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "femnist"
    leaf_json(folder / "all_data_0_test_9.json", {"f": (pixels(1, 28, 28), [1])})
    (folder / "all_data_0_train_9.json").write_text(text)
    refuses("femnist", tmp_path, "all_data_0_train_9.json is damaged (not LEAF json")


def test_femnist_subset_keeps_unseen_writers_apart(tmp_path: Path) -> None:
    (tmp_path / "femnist").mkdir()
    table = {
        "X": pixels(6, 28, 28),
        "y": np.array([0, 1, 2, 3, 4, 5], np.uint8),
        "writer": np.array([0, 1, 3, 0, 2, 2], np.uint16),
        "writers": np.array([b"f0", b"f1", b"f2", b"f3"]),
        "split": np.array([0, 0, 0, 1, 2, 2], np.uint8),
    }
    file = tmp_path / "femnist" / femnist.SUBSET
    np.savez(file, **table)
    found, unseen = data.load_dataset("femnist", tmp_path), femnist.unseen_writers(tmp_path)
    assert (found.train.y.tolist(), found.test.y.tolist(), unseen.y.tolist()) == ([0, 1, 2], [3], [4, 5])
    assert (found.group.tolist(), found.groups) == ([0, 1, 2], ("f0", "f1", "f3"))
    assert np.array_equal(unseen.x.numpy(), table["X"][4:, None])
    file.write_bytes(file.read_bytes()[:-10])
    refuses("femnist", tmp_path, femnist.SUBSET, "damaged")
    with pytest.raises(InputError, match="writers kept out"):
        femnist.unseen_writers(None)


# As other tools unpack them


@pytest.mark.parametrize("above", ["", "mnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_as_torchvision_unpacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: Any, packed: Any
) -> None:
    arrays = mnist_files(tmp_path, monkeypatch, packed)
    raw = tmp_path / above / "MNIST" / "raw"
    (tmp_path / "mnist").rename(tmp_path / "moved")
    raw.parent.mkdir(parents=True)
    (tmp_path / "moved").rename(raw)
    found = data.load_dataset("mnist", tmp_path)
    assert np.array_equal(found.test.x.numpy(), arrays["t10k"][0][:, None])
    assert data.dataset_status("mnist", tmp_path).startswith(f"{raw}: idx")
    labels = raw / ("t10k-labels-idx1-ubyte" + ".gz" * packed)
    labels.unlink()
    refuses("mnist", tmp_path, "t10k-labels-idx1-ubyte", f"missing: {mnist.HOW}")


@pytest.mark.parametrize("above", ["", "cifar10"])
def test_cifar10_as_archives_unpack_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: Any) -> None:
    folder = tmp_path / above / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    made = batches(6, monkeypatch)
    for name, batch in made.items():
        (folder / f"{name}.bin").write_bytes(batch.tobytes())
    check_cifar10(tmp_path, made)
    assert data.dataset_status("cifar10", tmp_path).startswith(f"{folder}: binary version")


@pytest.mark.parametrize("inside", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar10"])
def test_cifar10_python_version_is_read_and_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    folder = tmp_path / inside
    folder.mkdir(parents=True)
    made = batches(6, monkeypatch)
    files_ = {name: pickled(batch) for name, batch in made.items()}
    again = pickle.loads(files_["test_batch"], encoding="latin1")  # what anybody else makes of it
    assert np.array_equal(again["data"], made["test_batch"][:, 1:])
    assert again["labels"] == made["test_batch"][:, 0].tolist()
    files_["data_batch_2"] = pickled(made["data_batch_2"], b"os\nmkdir")
    monkeypatch.setattr(cifar10, "PYTHON_MD5", {name: md5(content) for name, content in files_.items()})
    for name, content in files_.items():
        (folder / name).write_bytes(content)
    check_cifar10(tmp_path, made)
    assert data.dataset_status("cifar10", tmp_path) == f"{folder}: python version (50,000 training, 10,000 test)"
    test = made["test_batch"]
    for content in (b"", b"\x80\x02", pickled(test)[:200], b"cos\nsystem\n(S'id'\ntR.", pickled(test[:, :-1])):
        monkeypatch.setitem(cifar10.PYTHON_MD5, "test_batch", md5(content))
        (folder / "test_batch").write_bytes(content)
        refuses("cifar10", tmp_path, "test_batch is damaged (no batch of the python version", "cifar-10-binary.tar.gz")
    (folder / "test_batch").write_bytes(files_["test_batch"])
    refuses("cifar10", tmp_path, "test_batch is damaged", "md5")


@pytest.mark.parametrize("above", ["", "femnist"])
def test_femnist_in_a_clone_of_leaf(tmp_path: Path, above: Any) -> None:
    for part in ("train", "test"):
        file = tmp_path / above / "data" / part / f"all_data_0_niid_05_keep_0_{part}_9.json"
        leaf_json(file, {"f1": (pixels(1, 28, 28), [36])})
    assert data.load_dataset("femnist", tmp_path).train.y.tolist() == [36]
    assert data.dataset_status("femnist", tmp_path) == f"{tmp_path / above / 'data'}: LEAF json"

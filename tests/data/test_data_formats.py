"""Each dataset, from each kind of its public archive, made small: whole, or refused in one line."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsieve.data as data
from fedsieve.data import cifar10, mnist, speech_commands
from fedsieve.data.build import verify
from fedsieve.data.version import Version
from fedsieve.types import InputError
from public_archives import built, folder, publish, refuse, speech, tar, zipped
from small_files import _cache, leaf_text, md5, pickled, pixels, refuses  # noqa: F401 (the cache is every test's)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "w"])
def test_cifar10_from_a_tar(tmp_path: Path, root: Path, cifar: dict[str, bytes], mode: str) -> None:
    assert built("cifar10", tar(tmp_path / "a", cifar, mode), root) == 6
    dataset = data.load_dataset("cifar10", root)
    assert (len(dataset.train), len(dataset.test), dataset.version) == (20, 4, "")
    assert data.dataset_status("cifar10", root) == f"{root}/cifar10: binary version (20 training, 4 test)"
    assert sorted(p.name for p in root.iterdir()) == ["cifar10"]
    names = {p.name for p in (root / "cifar10").iterdir()}
    assert names == {"VERSION.json", "SHA256SUMS", *(f"{name}.bin" for name in cifar10.MD5)}


def test_what_is_built_is_checked_when_it_is_read(tmp_path: Path, root: Path, versions: None) -> None:
    built("speech_commands", tar(tmp_path / "a.tar.gz", speech(("yes", "no"))), root)
    assert verify(root / "speech_commands")["clips"] == 6
    clip = next((root / "speech_commands/yes").iterdir())
    clip.write_bytes(b"RIFF....WAVEother")
    with pytest.raises(InputError, match=f"{clip} is missing or damaged"):
        verify(root / "speech_commands")
    with pytest.raises(InputError, match="the one in SHA256SUMS"):
        speech_commands.read_download(clip, "get it")


def test_mnist_from_a_folder_of_its_files(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for name in mnist.MD5:
        shape = (6 if "train" in name else 2, *((28, 28) if "images" in name else ()))
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        files[f"{name}.gz"] = gzip.compress(header + (pixels(*shape) % 10).tobytes())
    sums = {name.removesuffix(".gz"): (md5(content), "") for name, content in files.items()}
    monkeypatch.setattr(mnist, "MD5", sums)
    publish(monkeypatch, "mnist", Version("", {"training": 6, "test": 2}))
    assert built("mnist", folder(tmp_path / "downloads", files), root) == 4
    assert len(data.load_dataset("mnist", root).train) == 6
    (tmp_path / "downloads/t10k-labels-idx1-ubyte.gz").unlink()
    refuse("mnist", tmp_path / "downloads", root, "has no t10k-labels-idx1-ubyte.gz", "https://")


def test_cifar100_of_100_fine_classes(tmp_path: Path, root: Path, cifar100: dict[str, bytes]) -> None:
    built("cifar100", tar(tmp_path / "a", cifar100), root)
    dataset = data.load_dataset("cifar100", root)
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (200, 100, 100)
    assert (dataset.classes[0], dataset.classes[99], sorted(dataset.classes)) == ("apple", "worm", [*dataset.classes])
    assert dataset.train.y[:3].tolist() == [0, 1, 2]
    rows = np.frombuffer(cifar100["cifar-100-binary/train.bin"], np.uint8).reshape(-1, 3074)
    assert np.array_equal(dataset.train.x.numpy(), rows[:, 2:].reshape(-1, 3, 32, 32))


def test_cifar100_as_other_tools_unpack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cifar100: dict[str, bytes]
) -> None:
    folder(tmp_path / "tar", cifar100)
    binary = data.load_dataset("cifar100", tmp_path / "tar")
    rows = {part: np.frombuffer(cifar100[f"cifar-100-binary/{part}.bin"], np.uint8) for part in ("train", "test")}
    batches = {part: row.reshape(-1, 3074)[:, 1:] for part, row in rows.items()}
    files = {part: pickled(batch, labels_=b"fine_labels") for part, batch in batches.items()}
    monkeypatch.setattr(data.cifar100, "PYTHON_MD5", {part: md5(content) for part, content in files.items()})
    folder(tmp_path / "torchvision/cifar-100-python", files)
    python = data.load_dataset("cifar100", tmp_path / "torchvision")
    assert data.dataset_status("cifar100", tmp_path / "torchvision").endswith("python version (200 training, 100 test)")
    assert python.digest == binary.digest
    (tmp_path / "tar/cifar-100-binary/test.bin").write_bytes(b"\1" * 100 * 3074)
    refuses("cifar100", tmp_path / "tar", "test.bin is damaged", "not equally many", "cifar-100-binary.tar.gz")
    (tmp_path / "torchvision/cifar-100-python/test").write_bytes(b"\x80\x02.")
    refuses("cifar100", tmp_path / "torchvision", "test is damaged", "md5")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rows: rows[:-3074], "bytes instead of 200 rows of 3,074"),
        (lambda rows: rows[:1] + b"\1" + rows[2:], "not equally many images of each"),
        (lambda rows: b"\7" + rows[1:], "belong to several coarse ones"),
    ],
)
def test_other_rows_are_not_cifar100(
    tmp_path: Path, root: Path, cifar100: dict[str, bytes], change: Any, why: str
) -> None:
    cifar100["cifar-100-binary/train.bin"] = change(cifar100["cifar-100-binary/train.bin"])
    refuse("cifar100", tar(tmp_path / "a", cifar100), root, "train.bin", why)


def test_the_archive_of_cifar100_is_known_by_its_md5(
    tmp_path: Path, root: Path, cifar100: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar(tmp_path / "cifar-100-binary.tar.gz", cifar100)
    refuse("cifar100", archive, root, "cifar-100-binary.tar.gz is not the published archive (its md5)", "again")
    monkeypatch.setattr(data.cifar100.Cifar100, "archive_md5", {archive.name: md5(archive.read_bytes())})
    assert built("cifar100", archive, root) == 2
    assert verify(root / "cifar100") == {"training": 200, "test": 100}


@pytest.mark.parametrize(("words", "version"), [(("yes", "no"), "v0.01"), (("yes", "no", "go"), "v0.02")])
def test_speech_commands_of_either_version(
    tmp_path: Path, root: Path, versions: None, words: tuple[str, ...], version: str
) -> None:
    assert built("speech_commands", tar(tmp_path / "a.tar.gz", speech(words)), root) == 3 * len(words) + 1
    status = data.dataset_status("speech_commands", root)
    assert f"public wav folders ({version}: {len(words)} words, {3 * len(words)} clips, " in status
    next((root / "speech_commands/yes").iterdir()).unlink()
    assert "a selection" in data.dataset_status("speech_commands", root)


def test_the_version_of_folders_that_were_unpacked_by_hand_is_known(root: Path, versions: None) -> None:
    folder(root / "SpeechCommands/speech_commands_v0.02", speech(("yes", "no")))
    assert "v0.01: " in data.dataset_status("speech_commands", root)


@pytest.mark.parametrize("kind", ["tar", "zip", "folder"])
def test_femnist_as_leaf_writes_it(tmp_path: Path, root: Path, leaf: dict[str, bytes], kind: str) -> None:
    make = {"tar": tar, "zip": zipped, "folder": folder}[kind]
    assert built("femnist", make(tmp_path / "a", leaf), root) == 3
    dataset = data.load_dataset("femnist", root)
    assert (len(dataset.train), len(dataset.test), dataset.groups, dataset.version) == (
        6,
        3,
        ("a", "b", "c"),
        "3 writers",
    )
    status = data.dataset_status("femnist", root)
    assert status.endswith("LEAF json (3 writers: 3 writers, 3 writers tested, 6 training, 3 test)")


def test_leaf_split_by_writer_is_another_version(tmp_path: Path, root: Path, leaf: dict[str, bytes]) -> None:
    leaf["data/test/all_data_0_niid_0_keep_0_test_8.json"] = leaf_text({"d": [1, 2, 3]})
    refuse("femnist", folder(tmp_path / "a", leaf), root, "it has 3 writers, 1 writers tested", "instead of 3 writers")
    del leaf["data/test/all_data_0_niid_0_keep_0_test_8.json"]
    refuse("femnist", folder(tmp_path / "b", leaf), root, "no published version", "TalwalkarLab/leaf")


def test_of_leafs_json_that_lies_there_the_version_is_known_when_it_is_read(root: Path, leaf: dict[str, bytes]) -> None:
    folder(root / "femnist", {name.removeprefix("data/"): content for name, content in leaf.items()})
    assert data.dataset_status("femnist", root) == f"{root}/femnist: LEAF json"
    assert data.load_dataset("femnist", root).version == "3 writers"

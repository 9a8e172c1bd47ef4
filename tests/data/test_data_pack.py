"""A dataset packed into one file, or several: the same dataset again, or one line that says what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

import fedsieve.data as data
from command_line import CommandLine
from fedsieve.data import pack, pixels
from fedsieve.types import InputError
from public_archives import built, speech, tar
from small_files import _cache  # noqa: F401 (the cache is every test's)

RNG = np.random.default_rng(0)
IMAGES = {
    "noise": RNG.integers(256, size=(7, 3, 5, 4), dtype=np.uint8),
    "one pixel": np.array([[[[200]]]], np.uint8),
    "one row": RNG.integers(256, size=(3, 2, 1, 9), dtype=np.uint8),
    "one column": RNG.integers(256, size=(3, 1, 9, 1), dtype=np.uint8),
    "black": np.zeros((4, 3, 6, 6), np.uint8),
    "black and white": 255 * RNG.integers(2, size=(9, 1, 8, 8), dtype=np.uint8),
    "four channels": RNG.integers(256, size=(2, 4, 3, 3), dtype=np.uint8),
}


def waves(n: int) -> np.ndarray:
    """Smooth colour images, the channels alike, as photographs are."""
    y, x = np.mgrid[:16, :16]
    phase = RNG.uniform(0, 6, (n, 1, 1, 1))
    grey = 127 + 60 * np.sin(x / 4 + phase) + 60 * np.cos(y / 5 + 2 * phase)
    return (grey + np.array([0, 4, -6])[:, None, None] + RNG.normal(0, 2, (n, 3, 16, 16))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_come_back(name: str) -> None:
    images = IMAGES[name]
    assert np.array_equal(pixels.unpack_images(pixels.pack_images(images), images.shape), images)


def test_images_take_little_more_than_their_noise() -> None:
    images = waves(200)
    coded = pixels.pack_images(images)
    bits = 8 * coded["codes"].nbytes / images.size
    noise = 0.5 * np.log2(2 * np.pi * np.e * 2**2)  # the entropy of a normal deviation of 2, in bits a value
    assert noise < bits < noise + 0.7  # from neighbours that deviate likewise
    assert np.array_equal(pixels.unpack_images(coded, images.shape), images)


def test_a_code_that_lacks_something_is_refused() -> None:
    coded = pixels.pack_images(IMAGES["noise"])
    lengths = coded["lengths"].copy()
    lengths[0, 1] += 1
    with pytest.raises(ValueError, match="a stream has not its length"):
        pixels.unpack_images(coded | {"lengths": lengths}, (7, 3, 5, 4))


@pytest.fixture
def cifar_root(tmp_path: Path, root: Path, cifar: dict[str, bytes]) -> Path:
    built("cifar10", tar(tmp_path / "a.tar.gz", cifar), root)
    return root


@pytest.mark.parametrize(("largest", "is_placed"), [(pack.LARGEST, False), (30_000, True)])
def test_the_command_packs_and_reads_back(
    fedsieve: CommandLine,
    tmp_path: Path,
    cifar_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    largest: int,
    is_placed: bool,
) -> None:
    monkeypatch.setattr(pack, "LARGEST", largest)
    before, elsewhere = data.load_dataset("cifar10", cifar_root), tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = tmp_path / "file" if is_placed else elsewhere / "cifar10.pack"
    said = fedsieve("data", "cifar10", "--data", cifar_root, "--pack", out).stdout
    files = sorted(out.parent.glob(f"{out.name}*"))
    assert all(f"wrote {file}, " in said for file in files)
    assert all(file.stat().st_size <= largest for file in files)
    assert (len(files) > 1) == (largest == 30_000)
    if is_placed:
        first = files[0] if len(files) > 1 else out
        line = f"{len(files)} files written"
        assert line in fedsieve("data", "cifar10", "--data", elsewhere, "--from", first).stdout
        assert "every file was there" in fedsieve("data", "cifar10", "--data", elsewhere, "--from", out).stdout
    assert "packed (20 training, 4 test)" in data.dataset_status("cifar10", elsewhere)
    assert "every file is as it was packed" in fedsieve("data", "cifar10", "--data", elsewhere).stdout
    after = data.load_dataset("cifar10", elsewhere)
    assert (after.digest, after.version) == (before.digest, before.version)
    assert after.train.x.equal(before.train.x)
    assert after.test.y.equal(before.test.y)


def test_owners_and_features_are_packed_too(tmp_path: Path, root: Path, leaf: dict[str, bytes]) -> None:
    built("femnist", tar(tmp_path / "a", leaf), root)
    source = data.SOURCES["femnist"]
    arrays, counts = source.arrays(root)
    arrays |= {"train_x": RNG.normal(size=(3, 1, 4, 4)).astype(np.float32), "scale": np.array([0.5, 2.0])}
    (file,) = pack.write_pack(tmp_path / "file", "femnist", counts, arrays)
    opened = pack.open_pack(file)
    assert opened
    assert opened.counts == counts
    restored = opened.arrays()
    assert restored.keys() == arrays.keys()
    for name, array in arrays.items():
        assert restored[name].dtype == array.dtype
        assert np.array_equal(restored[name], array)


def test_the_version_is_packed(tmp_path: Path, root: Path, versions: None) -> None:
    built("speech_commands", tar(tmp_path / "a.tar.gz", speech(("yes", "no"))), root)
    counts = data.SOURCES["speech_commands"].counts(root / "speech_commands")
    arrays = {
        f"{part}_{name}": np.zeros((2, 1, 32, 32)[: 4 if name == "x" else 1])
        for part in ("train", "test")
        for name in "xy"
    }
    (tmp_path / "there").mkdir()
    pack.write_pack(tmp_path / "there/speech_commands.pack", "speech_commands", counts, arrays)
    here, there = (data.dataset_status("speech_commands", place) for place in (root, tmp_path / "there"))
    assert here.partition("(")[2] == there.partition("(")[2]
    assert data.load_dataset("speech_commands", tmp_path / "there").version == "v0.01"


def test_what_is_not_as_packed_is_one_line(
    fedsieve: CommandLine, tmp_path: Path, cifar_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "LARGEST", 30_000)
    there = tmp_path / "there"
    there.mkdir()
    fedsieve("data", "cifar10", "--data", cifar_root, "--pack", there / "cifar10.pack")
    files = sorted(there.iterdir())
    whole = [file.read_bytes() for file in files]

    def line(*words: object) -> str:
        return fedsieve("data", *words, "--data", there, code=2).stderr

    files[-1].unlink()
    assert "cifar10.pack.3 is missing, or one before it is cut: " in line("cifar10")
    files[-1].write_bytes(whole[-1][:-5])
    assert "cifar10.pack.4 is missing, or one before it is cut: " in line("cifar10")
    files[-1].write_bytes(whole[-1][:-1] + bytes([whole[-1][-1] ^ 1]))
    assert "is not as it was packed (its sha256): copy it again" in line("cifar10")
    with pytest.raises(InputError, match="is not as it was packed"):
        data.load_dataset("cifar10", there)
    files[-1].write_bytes(whole[-1])
    assert "holds cifar10: fedsieve data cifar10 --from" in line("cifar100", "--from", files[0])
    assert (
        "is there already: name a new file"
        in fedsieve(*("data", "cifar10", "--data", cifar_root, "--pack", there / "cifar10.pack"), code=2).stderr
    )
    assert "build it first, with --from alone" in line("cifar10", "--from", files[0], "--pack", "other")
    files[0].write_bytes(pack.MAGIC + b"no json\n" + whole[0])
    assert "is not a JSON object: copy it again" in line("cifar10")
    assert "cifar10: packed (the first line of" in data.dataset_status("cifar10", there)
    files[0].write_bytes(pack.MAGIC + json.dumps({"dataset": "cifar10", "bytes": "3"}).encode() + b"\n")
    assert "does not say what it holds" in line("cifar10")
    files[0].write_bytes(b"something else")
    assert "cifar10.pack is no packed dataset: copy it again" in line("cifar10")


def test_a_whole_file_that_holds_no_arrays_is_one_line(tmp_path: Path) -> None:
    import hashlib

    content = b"no npz"
    head = {"dataset": "mnist", "counts": None, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "mnist.pack").write_bytes(pack.MAGIC + json.dumps(head).encode() + b"\n" + content)
    with pytest.raises(InputError, match="cannot be unpacked"):
        data.load_dataset("mnist", tmp_path)
    (tmp_path / "mnist.pack").rename(tmp_path / "cifar10.pack")
    with pytest.raises(InputError, match="holds mnist, not cifar10"):
        data.load_dataset("cifar10", tmp_path)


def test_a_pack_takes_no_place_of_another_dataset(fedsieve: CommandLine, tmp_path: Path, cifar_root: Path) -> None:
    fedsieve("data", "cifar10", "--data", cifar_root, "--pack", tmp_path / "file")
    line = fedsieve("data", "cifar10", "--data", cifar_root, "--from", tmp_path / "file", code=2).stderr
    assert "cifar10 is there already, in " in line
    assert "comes with FedSieve: there is nothing to pack" in fedsieve("data", "digits", "--pack", "f", code=2).stderr

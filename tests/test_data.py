"""Datasets, from small files in every public form: read right, checked, refused in one line."""

import gzip
import hashlib
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedsieve.data as data
from fedsieve.data import cache, cifar10, femnist, files, mnist, speech_commands
from fedsieve.types import InputError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def md5(contents: bytes) -> str:
    return hashlib.md5(contents).hexdigest()


def refuses(name: str, root: Path | None, *words: str) -> None:
    """The error is one line that has all of the words."""
    with pytest.raises(InputError) as caught:
        data.load(name, root)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def homeless(*_: object) -> None:
    """What Path.home() and expanduser() do without HOME and without an entry for the user."""
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "cache"))


# The package


def test_import_is_light():
    code = (
        "import sys, fedsieve.data; print([m for m in ('PIL', 'librosa', 'soundfile', 'sklearn') if m in sys.modules])"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert lines.strip() == "[]"


def test_root_from_option_then_environment(monkeypatch):
    monkeypatch.setenv("FEDSIEVE_DATA", "/there")
    assert data.root_from("here") == Path.cwd() / "here"
    assert data.root_from(None) == Path("/there")
    monkeypatch.delenv("FEDSIEVE_DATA")
    assert data.root_from(None) is None


@pytest.mark.parametrize(("said", "root"), [("./hub", "hub"), ("hub/", "hub"), ("../hub", "../hub"), ("HUB", "HUB")])
def test_only_exactly_hub_is_the_hub(monkeypatch, said, root):
    assert data.root_from("hub") == Path("hub")
    assert data.root_from(said) == Path.cwd() / root
    monkeypatch.setenv("HOME", "/home/ada")
    assert data.root_from("~/hub") == Path("/home/ada/hub")
    assert data.status("mnist", data.root_from("hub")).startswith("huggingface.co")
    assert data.status("mnist", data.root_from(said)).startswith("not found")


def test_root_in_an_unknown_home_is_refused(monkeypatch):
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(InputError, match="write the whole path"):
        data.root_from("~/data")


def test_unknown_name_lists_the_names():
    refuses("cifar", None, "'cifar'", *data.NAMES)
    with pytest.raises(InputError, match="speech_commands"):
        data.status("cifar", None)


@pytest.mark.parametrize("name", data.NAMES[1:])
def test_nothing_there_says_how_to_get_it(name, tmp_path):
    assert "https://" in data.status(name, None) or "http://" in data.status(name, None)
    assert data.status(name, tmp_path).startswith("not found: ")
    refuses(name, None, name, "--data", "FEDSIEVE_DATA", "http")
    refuses(name, tmp_path / "nowhere", str(tmp_path / "nowhere" / name), "missing", "--data", "http")


# The cache


def test_cache_keeps_and_remakes_what_is_damaged(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"a": np.arange(1000), "names": np.array(["x", "yz"])}

    for _ in range(2):
        found = cache.cached_arrays("toy/1", make)
        assert found["a"].tolist() == list(range(1000))
        assert found["names"].tolist() == ["x", "yz"]
    assert len(calls) == 1
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    for contents in (whole[:-100], b"", b"nonsense", whole[:500] + b"\xff" + whole[501:]):
        entry.write_bytes(contents)
        assert cache.cached_arrays("toy/1", make)["a"].tolist() == list(range(1000))
    assert len(calls) == 5
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_cache_that_cannot_be_written_warns_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="FEDSIEVE_CACHE"):
        assert cache.cached_arrays("toy/1", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def test_cache_without_a_home_warns_and_goes_on(monkeypatch):
    monkeypatch.delenv("FEDSIEVE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="FEDSIEVE_CACHE"):
        assert cache.cached_arrays("toy/1", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def test_cache_leaves_nothing_behind_when_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.cached_arrays("toy/1", lambda: {"a": np.arange(3)})
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder(monkeypatch, tmp_path):
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("FEDSIEVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.folder() == Path("/xdg/fedsieve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "fedsieve"


# Digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, original = data.load("digits", None), load_digits()
    assert (len(digits.train), len(digits.test)) == (1442, 355)
    assert digits.train.x.shape[1:] == (1, 8, 8)
    assert digits.train.x.dtype == torch.float32
    assert (digits.train.x.min(), digits.train.x.max()) == (0, 1)
    zeros = original.images[original.target == 0] / 16
    assert np.array_equal(digits.test.x[digits.test.y == 0].squeeze(1).numpy(), zeros[4::5].astype(np.float32))
    assert digits.test.y.bincount().tolist() == (np.bincount(original.target) // 5).tolist()


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
def test_mnist_idx(tmp_path, monkeypatch, packed):
    arrays = mnist_files(tmp_path, monkeypatch, packed)
    found = data.load("mnist", tmp_path)
    assert data.status("mnist", tmp_path) == f"{tmp_path}/mnist: {'idx.gz files' if packed else 'idx files'}"
    assert np.array_equal(found.train.x.numpy(), arrays["train"][0][:, None])
    assert found.test.y.tolist() == arrays["t10k"][1].tolist()
    assert (found.train.mean, found.train.std, found.train.x.dtype) == ((0.1307,), (0.3081,), torch.uint8)


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_damaged_or_missing(tmp_path, monkeypatch, packed):
    mnist_files(tmp_path, monkeypatch, packed)
    labels = tmp_path / "mnist" / ("t10k-labels-idx1-ubyte" + ".gz" * packed)
    labels.write_bytes(labels.read_bytes()[:-1])
    refuses("mnist", tmp_path, str(labels), "damaged", "md5", "download")
    labels.unlink()
    refuses("mnist", tmp_path, "t10k-labels-idx1-ubyte", "missing", "download")


def test_sha256sums_in_the_data_folder_are_checked(tmp_path, monkeypatch):
    mnist_files(tmp_path, monkeypatch, True)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  ./mnist/train-images-idx3-ubyte.gz\n")
    refuses("mnist", tmp_path, "train-images-idx3-ubyte.gz", "SHA256SUMS")


@pytest.mark.parametrize("line", ["oneword", "0123  mnist/x", "0" * 64, f"{'0' * 64}  ", "SHA256 (x) = 00", "\x00\xff"])
def test_a_malformed_line_of_sha256sums_is_named(tmp_path, monkeypatch, line):
    mnist_files(tmp_path, monkeypatch, True)
    (tmp_path / "SHA256SUMS").write_bytes(f"{'0' * 64}  other\n\n{line}\n".encode("latin-1"))
    refuses("mnist", tmp_path, f"{tmp_path / 'SHA256SUMS'} line 3 is not a sha256")


@pytest.mark.parametrize("form", ["{sum}  {name}", "{sum} *{name}", "{sum}  ./{name}", "{upper}  {name}\r"])
@pytest.mark.parametrize("name", ["cifar10/cifar-10-batches-bin/data_batch_1.bin", "femnist/train/a.json", "other/a"])
def test_sha256sums_of_nested_files_are_checked(tmp_path, form, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"contents")
    digest = hashlib.sha256(b"contents").hexdigest()
    (tmp_path / "SHA256SUMS").write_text(form.format(sum=digest, upper=digest.upper(), name=name))
    assert files.read(file, "get it") == b"contents"
    file.write_bytes(b"other")
    with pytest.raises(InputError, match="the one in SHA256SUMS"):
        files.read(file, "get it")


def test_the_folder_above_is_named_for_nested_files():
    for name in ("femnist/train/a.json", "cifar10/cifar-10-batches-bin/b.bin", "mnist/speech_commands/yes"):
        *_, place = (part for part in Path(name).parts if part in data.NAMES)
        assert f"the folder above {place}/)" in str(files.missing(Path("/mnist/root") / name, "get it"))


# CIFAR-10


def batches(rows: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    made = {name: np.concatenate([pixels(rows, 1) % 10, pixels(rows, 3072)], 1) for name in cifar10.MD5}
    monkeypatch.setattr(cifar10, "MD5", {name: md5(batch.tobytes()) for name, batch in made.items()})
    return made


def check_cifar10(root: Path, made: dict[str, np.ndarray]) -> None:
    found = data.load("cifar10", root)
    train = np.concatenate([made[f"data_batch_{i}"] for i in range(1, 6)])
    assert np.array_equal(found.train.x.numpy(), train[:, 1:].reshape(-1, 3, 32, 32))
    assert found.train.y.tolist() == train[:, 0].tolist()
    assert np.array_equal(found.test.x.numpy(), made["test_batch"][:, 1:].reshape(-1, 3, 32, 32))
    assert found.test.y.tolist() == made["test_batch"][:, 0].tolist()


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_binary_version(tmp_path, monkeypatch, inside):
    folder = tmp_path / "cifar10" / inside
    folder.mkdir(parents=True)
    made = batches(6, monkeypatch)
    for name, batch in made.items():
        (folder / f"{name}.bin").write_bytes(batch.tobytes())
    check_cifar10(tmp_path, made)
    assert data.status("cifar10", tmp_path).endswith("binary version")
    (folder / "test_batch.bin").write_bytes(b"\0" * 6 * 3073)
    refuses("cifar10", tmp_path, "test_batch.bin", "damaged", "cifar-10-binary.tar.gz")
    (folder / "data_batch_3.bin").unlink()
    refuses("cifar10", tmp_path, "data_batch_3.bin", "missing", "cifar-10-binary.tar.gz")


def test_cifar10_webp_sheets(tmp_path, monkeypatch):
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
def test_femnist_leaf_json(tmp_path, inside):
    folder = tmp_path / "femnist"
    a, b, c, t = pixels(2, 28, 28), pixels(1, 28, 28), pixels(3, 28, 28), pixels(2, 28, 28)
    train, test = (folder / place for place in inside)
    leaf_json(train / "all_data_0_niid_05_keep_0_train_9.json", {"f2": (a, [0, 61]), "f1": (b, [36])})
    leaf_json(train / "all_data_1_niid_05_keep_0_train_9.json", {"f0": (c, [1, 2, 3])})
    refuses("femnist", tmp_path, "test", "missing", "TalwalkarLab/leaf")
    leaf_json(test / "all_data_0_niid_05_keep_0_test_9.json", {"f2": (t, [10, 35])})
    found = data.load("femnist", tmp_path)
    assert np.array_equal(found.train.x.numpy(), np.concatenate([a, b, c])[:, None])
    assert torch.equal(found.train.batch(slice(0, 1))[0], torch.from_numpy(a[:1, None]).float() / 255)
    assert (found.train.y.tolist(), found.test.y.tolist()) == ([0, 61, 36, 1, 2, 3], [10, 35])
    assert (found.group.tolist(), found.groups) == ([2, 2, 1, 0, 0, 0], ("f0", "f1", "f2"))
    assert (len(found.classes), found.classes[36]) == (62, "a")
    assert data.status("femnist", tmp_path).endswith("LEAF json")
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
def test_femnist_json_of_another_shape_is_damaged(tmp_path, users):
    folder = tmp_path / "femnist"
    leaf_json(folder / "all_data_0_test_9.json", {"f": (pixels(1, 28, 28), [1])})
    (folder / "all_data_0_train_9.json").write_text(json.dumps({"user_data": users}))
    refuses("femnist", tmp_path, "all_data_0_train_9.json is damaged (not LEAF json", "TalwalkarLab/leaf")


@pytest.mark.parametrize("text", ["[]", "5", "{}", "[" * 100_000, '{"user_data": {"f": ' * 100_000])
def test_femnist_json_that_is_something_else_is_damaged(tmp_path, text):
    folder = tmp_path / "femnist"
    leaf_json(folder / "all_data_0_test_9.json", {"f": (pixels(1, 28, 28), [1])})
    (folder / "all_data_0_train_9.json").write_text(text)
    refuses("femnist", tmp_path, "all_data_0_train_9.json is damaged (not LEAF json")


def test_femnist_subset_keeps_unseen_writers_apart(tmp_path):
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
    found, unseen = data.load("femnist", tmp_path), femnist.unseen_writers(tmp_path)
    assert (found.train.y.tolist(), found.test.y.tolist(), unseen.y.tolist()) == ([0, 1, 2], [3], [4, 5])
    assert (found.group.tolist(), found.groups) == ([0, 1, 2], ("f0", "f1", "f3"))
    assert np.array_equal(unseen.x.numpy(), table["X"][4:, None])
    file.write_bytes(file.read_bytes()[:-10])
    refuses("femnist", tmp_path, femnist.SUBSET, "damaged")
    with pytest.raises(InputError, match="writers kept out"):
        femnist.unseen_writers(None)


# Speech Commands


def test_which_set_keeps_speakers_together_and_the_published_proportions():
    names = [f"{i:08x}" for i in range(4000)]
    sets = [speech_commands.which_set(f"{name}_nohash_0.wav") for name in names]
    assert sets == [speech_commands.which_set(f"{name}_nohash_7.wav") for name in names]
    for part, share in (("training", 0.8), ("validation", 0.1), ("testing", 0.1)):
        assert sets.count(part) / 4000 == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5)


def test_silence_is_dealt_evenly():
    speakers = [speech_commands.Clip(f"s{i}_nohash_0.wav", "yes", f"s{i}", False) for i in range(4)]
    silent = [speech_commands.Clip(f"{i}.wav", "_silence_", "", False) for i in range(10)]
    owners = speech_commands.owners(silent + speakers)
    assert owners[10:] == ["s0", "s1", "s2", "s3"]
    assert sorted(owners[:10].count(f"s{i}") for i in range(4)) == [2, 2, 3, 3]
    assert speech_commands.owners(silent[::-1] + speakers)[:10] == owners[:10][::-1]


def speakers(part: str, count: int) -> list[str]:
    names = (f"{i:08x}" for i in range(10_000))
    return [name for name in names if speech_commands.which_set(f"{name}_nohash_0.wav") == part][:count]


def tone(seconds: float) -> np.ndarray:
    return RNG.normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)


def test_speech_commands_public_folders(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("librosa")
    folder = tmp_path / "speech_commands"
    people = {part: speakers(part, count) for part, count in (("training", 10), ("testing", 5), ("validation", 1))}
    for word in ("yes", "go", "bed"):
        (folder / word).mkdir(parents=True)
        for name in (name for part in people.values() for name in part):
            soundfile.write(folder / word / f"{name}_nohash_0.wav", tone(0.9), 16_000)
    refuses("speech_commands", tmp_path, "_background_noise_", "missing", "speech_commands_v0.02.tar.gz")
    (folder / "_background_noise_").mkdir()
    soundfile.write(folder / "_background_noise_" / "hum.wav", tone(20), 16_000)
    found = data.load("speech_commands", tmp_path)
    assert data.status("speech_commands", tmp_path).endswith("public wav folders")
    # 10 and 5 speakers x 3 words, and a tenth as much silence; bed is unknown; the validation speaker is left out.
    assert found.train.y.bincount(minlength=12).tolist() == [10] + [0] * 8 + [10, 3, 10]
    assert found.test.y.bincount(minlength=12).tolist() == [5] + [0] * 8 + [5, 1, 5]
    assert found.groups == tuple(sorted(people["training"]))
    assert found.train.x.shape == (33, 1, 32, 32)
    x, _ = found.train.batch(slice(None))
    assert (x.mean().item(), x.std().item()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))
    (folder / "yes" / f"{people['training'][0]}_nohash_0.wav").write_bytes(b"RIFFnothing")
    refuses("speech_commands", tmp_path, "yes", "damaged", "speech_commands_v0.02.tar.gz")
    soundfile.write(folder / "yes" / f"{people['training'][0]}_nohash_0.wav", tone(1), 8_000)
    refuses("speech_commands", tmp_path, "8000 Hz", "16000 Hz")


def test_speech_commands_ogg_with_index(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("librosa")
    folder = tmp_path / "speech_commands"
    folder.mkdir()
    header = "file,start,samples,word,clip,speaker,fold"
    lines = [f"yes.ogg,{i * 16_000},16000,yes,s{i}_nohash_0.wav,s{i},{i % 5}" for i in range(5)]
    lines += [f"_unknown_.ogg,{i * 9_000},9000,tree,s{i}_nohash_0.wav,s{i},{i % 5}" for i in range(5)]
    lines += [f"_silence_.ogg,{i * 16_000},16000,_silence_,{i}.wav,," for i in range(20)]
    (folder / "index.csv").write_text("\n".join([header, *lines]))
    for name, seconds in (("yes", 5), ("_unknown_", 5), ("_silence_", 20)):
        soundfile.write(folder / f"{name}.ogg", tone(seconds), 16_000)
    found = data.load("speech_commands", tmp_path)
    silent = [int(hashlib.sha1(f"fold:{i}.wav".encode()).hexdigest(), 16) % 5 == 4 for i in range(20)]
    assert found.train.y.bincount(minlength=12).tolist() == [4] + [0] * 9 + [20 - sum(silent), 4]
    assert found.test.y.bincount(minlength=12).tolist() == [1] + [0] * 9 + [sum(silent), 1]
    assert found.groups == ("s0", "s1", "s2", "s3")
    assert found.group[:4].tolist() == [0, 1, 2, 3]
    (folder / "index.csv").write_text("\n".join([header, *lines[:4]]))
    refuses("speech_commands", tmp_path, "none for testing")
    (folder / "index.csv").write_text("\n".join([header, *lines]))
    soundfile.write(folder / "yes.ogg", tone(2), 16_000)
    refuses("speech_commands", tmp_path, "yes.ogg", "ends before clip s2_nohash_0.wav")
    (folder / "yes.ogg").unlink()
    refuses("speech_commands", tmp_path, "yes.ogg", "missing")


HEADER = "file,start,samples,word,clip,speaker,fold"


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (b"\xff\xfe\x00binary", "index.csv is damaged"),
        (b"\x00\x01\x02\n", "no column clip, file, fold"),
        (b"", "no column clip, file, fold"),
        (b"file,start,samples,word,clip,speaker\na.ogg,0,1,yes,c,s\n", "no column fold"),
        (f"{HEADER}\na.ogg,zero,1,yes,c,s,0\n".encode(), "line 2 is not a clip"),
        (f"{HEADER}\na.ogg,-1,1,yes,c,s,0\n".encode(), "line 2 is not a clip"),
        (f"{HEADER}\na.ogg\n".encode(), "line 2 is not a clip"),
        (f"{HEADER}\na\0.ogg,0,1,yes,c,s,0\n".encode(), "line 2 is not a clip"),
        (f"{HEADER}\n{'a' * 200_000},0,1,yes,c,s,0\n".encode(), "field larger than"),
    ],
)
def test_speech_commands_index_of_another_form_is_damaged(tmp_path, monkeypatch, contents, why):
    monkeypatch.setattr(speech_commands, "mfcc", lambda audio: audio)
    (tmp_path / "speech_commands").mkdir()
    (tmp_path / "speech_commands" / "index.csv").write_bytes(contents)
    refuses("speech_commands", tmp_path, "index.csv is damaged", why, "speech_commands_v0.02.tar.gz")


def test_speech_commands_without_a_speaker_is_refused(monkeypatch):
    monkeypatch.setattr(speech_commands, "mfcc", lambda audio: audio)
    rows = [(speech_commands.Clip(str(i), "_silence_", "", i == 1), tone(1)) for i in range(2)]
    with pytest.raises(InputError, match="no spoken clips"):
        speech_commands.features(rows)


def test_speech_commands_without_librosa(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(InputError, match=r'pip install "fedsieve\[speech\]"'):
        speech_commands.mfcc(np.zeros(16_000, np.float32))


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A fake ``datasets`` package with three small repositories."""

    def rows(count: int, image: str, label: str, mode: str, **more: str) -> list[dict]:
        shape = (28, 28) if mode == "L" else (32, 32, 3)
        made = [{image: Image.fromarray(pixels(*shape)), label: i % 10} for i in range(count)]
        return [row | {key: f"{value}{i % 3}" for key, value in more.items()} for i, row in enumerate(made)]

    repositories = {
        "ylecun/mnist": {part: rows(n, "image", "label", "L") for part, n in (("train", 6), ("test", 3))},
        "uoft-cs/cifar10": {part: rows(n, "img", "label", "RGB") for part, n in (("train", 6), ("test", 3))},
        "flwrlabs/femnist": {"train": rows(60, "image", "character", "L", writer_id="f")},
    }

    def load_dataset(name: str) -> dict:
        return repositories[name]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return repositories


@pytest.mark.parametrize(
    ("name", "repository", "image"), [("mnist", "ylecun/mnist", "image"), ("cifar10", "uoft-cs/cifar10", "img")]
)
def test_hub_images(hub, name, repository, image):
    for _ in range(2):  # the second from the cache
        found = data.load(name, Path("hub"))
        first = np.asarray(hub[repository]["train"][0][image])
        first = first[None] if first.ndim == 2 else first.transpose(2, 0, 1)
        assert np.array_equal(found.train.x[0].numpy(), first)
        assert (found.train.y.tolist(), found.test.y.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])
        hub[repository]["train"][1:] = []
    assert data.status(name, Path("hub")) == f"huggingface.co/datasets/{repository}"


def test_hub_femnist_holds_out_a_tenth_of_every_writer(hub):
    found = data.load("femnist", Path("hub"))
    assert found.groups == ("f0", "f1", "f2")
    assert found.group.bincount().tolist() == [18, 18, 18]
    assert len(found.test) == 6
    everything = torch.cat([found.train.x, found.test.x]).reshape(60, -1)
    assert len(everything.unique(dim=0)) == 60


def test_hub_refusals(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses("mnist", Path("hub"), 'pip install "fedsieve[hub]"')
    refuses("speech_commands", Path("hub"), "download the public archive")
    assert "download" in data.status("speech_commands", Path("hub"))

    def offline(_: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    refuses("mnist", Path("hub"), "ylecun/mnist", "no route", "connection")


def test_hub_has_digits_too(hub):
    assert len(data.load("digits", Path("hub")).train) == 1442

"""Archives that are cut, damaged, or not what they should be: refused in one line, nothing written."""

import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fedsieve.data as data
from fedsieve.data import build
from public_archives import built, folder, refuse, speech, tar, zipped
from small_files import _cache, leaf_text, md5, pickled, pixels, refuses  # noqa: F401 (the cache is every test's)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "w"])
def test_a_cut_tar_is_refused(tmp_path: Path, root: Path, cifar: dict[str, bytes], mode: str) -> None:
    whole = tar(tmp_path / "a", cifar, mode).read_bytes()
    for cut in (0, 100, len(whole) // 2, len(whole) - 1 if mode != "w" else len(whole) - 30_000):
        (tmp_path / "b").write_bytes(whole[:cut])
        refuse("cifar10", tmp_path / "b", root, str(tmp_path / "b"))


def test_a_cut_or_damaged_zip_is_refused(tmp_path: Path, root: Path, leaf: dict[str, bytes]) -> None:
    whole = zipped(tmp_path / "a", leaf).read_bytes()
    for content in (whole[:100], whole[:-1], whole[:200] + b"damage" + whole[206:]):
        (tmp_path / "b").write_bytes(content)
        refuse("femnist", tmp_path / "b", root, "is cut, damaged, or no tar or zip")


def test_a_damaged_stream_is_refused_by_its_checksum(tmp_path: Path, root: Path, cifar: dict[str, bytes]) -> None:
    whole = bytearray(tar(tmp_path / "a", cifar).read_bytes())
    whole[-6] ^= 1  # of the checksum, which stands behind the tar's end
    (tmp_path / "b").write_bytes(whole)
    refuse("cifar10", tmp_path / "b", root, "is cut, damaged", "download it again")


@pytest.mark.parametrize("name", ["../evil.bin", "/etc/evil.bin", "a/../../evil.bin"])
def test_a_path_that_leads_outside_is_refused(
    tmp_path: Path, root: Path, cifar: dict[str, bytes], leaf: dict[str, bytes], name: str
) -> None:
    refuse("cifar10", tar(tmp_path / "a", cifar | {name: b"x"}), root, repr(name), "leads outside")
    refuse("femnist", zipped(tmp_path / "b", leaf | {name: b"x"}), root, repr(name), "leads outside")


def test_links_and_devices_are_refused(
    tmp_path: Path, root: Path, cifar: dict[str, bytes], leaf: dict[str, bytes]
) -> None:
    batch = cifar.popitem()[0]
    refuse("cifar10", tar(tmp_path / "a", cifar, **{batch: "data_batch_1.bin"}), root, repr(batch), "a link")
    with tarfile.open(tmp_path / "b", "w") as archive:
        member = tarfile.TarInfo(batch)
        member.type = tarfile.FIFOTYPE
        archive.addfile(member)
    refuse("cifar10", tmp_path / "b", root, repr(batch), "a device")
    link = zipfile.ZipInfo("data/train/all_data_2_train_8.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "c", "w") as zip_:
        zip_.writestr(link, "/etc/passwd")
    refuse("femnist", tmp_path / "c", root, repr(link.filename), "a link")
    place = folder(tmp_path / "d", leaf)
    (place / link.filename).symlink_to("/etc/passwd")
    refuse("femnist", place, root, repr(link.filename), "a link")
    os.mkfifo(tmp_path / "pipe")
    refuse("cifar10", tmp_path / "pipe", root, "neither a file nor a folder")
    refuse("cifar10", tmp_path / "nothing", root, "No such file")


def test_the_python_version_is_not_taken(tmp_path: Path, root: Path, cifar: dict[str, bytes]) -> None:
    archive = tar(tmp_path / "a", {"cifar-10-batches-py/data_batch_1": b"\x80\x02}q\x01."})
    refuse("cifar10", archive, root, "but pickles (cifar-10-batches-py/data_batch_1)", "cifar-10-binary.tar.gz")


def test_another_batch_or_one_that_lacks_is_refused(tmp_path: Path, root: Path, cifar: dict[str, bytes]) -> None:
    name = "cifar-10-batches-bin/data_batch_3.bin"
    refuse("cifar10", tar(tmp_path / "a", cifar | {name: b"x" * 3073}), root, "data_batch_3.bin is not the published")
    refuse("cifar10", tar(tmp_path / "b", cifar | {f"copy/{name}": cifar[name]}), root, "data_batch_3.bin twice")
    del cifar[name]
    refuse("cifar10", tar(tmp_path / "c", cifar), root, "has no data_batch_3.bin", "https://")


def test_counts_of_no_version_are_named(tmp_path: Path, root: Path, versions: None) -> None:
    files = speech(("yes", "no"))
    files.pop(next(name for name in files if name.startswith("./yes")))
    refuse(
        "speech_commands", tar(tmp_path / "a", files), root, "2 words, 5 clips", "v0.01: 2 words, 6 clips", "v0.02: "
    )
    refuse("speech_commands", tar(tmp_path / "b", {"README.md": b"x"}), root, "has no WORD/*_nohash_*.wav")
    files = speech(("yes", "no")) | {"./yes/00000001_nohash_5.wav": b"mp3"}
    refuse("speech_commands", tar(tmp_path / "c", files), root, "yes/00000001_nohash_5.wav is no wav file")
    del files["./yes/00000001_nohash_5.wav"], files["./_background_noise_/hum.wav"]
    refuse("speech_commands", tar(tmp_path / "d", files), root, "no published version")


def test_an_archive_that_changes_meanwhile_is_noticed(
    tmp_path: Path, root: Path, cifar: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    examine = build.examine_archive

    def changed(*arguments: Any) -> Any:
        contents = examine(*arguments)
        tar(tmp_path / "a", {name: content[::-1] for name, content in cifar.items()})
        return contents

    monkeypatch.setattr(build, "examine_archive", changed)
    refuse("cifar10", tar(tmp_path / "a", cifar), root, "has changed")


def test_a_record_that_says_nothing_is_named(tmp_path: Path, root: Path, leaf: dict[str, bytes]) -> None:
    built("femnist", folder(tmp_path / "a", leaf), root)
    (root / "femnist/VERSION.json").write_text('{"counts": [1]}')
    assert "VERSION.json has no counts" in data.dataset_status("femnist", root)
    refuse("femnist", tmp_path / "a", root, "VERSION.json has no counts")


def test_the_published_versions_add_up() -> None:
    for version in data.SOURCES["speech_commands"].versions:
        counts = version.counts
        assert counts["clips"] == sum(counts[part] for part in ("training", "validation", "testing"))
    first = data.SOURCES["speech_commands"].versions[0].counts
    assert first["training"] + first["training"] // 10 == 56_196  # ZeroFL, A.5: with a tenth as much silence

"""Speech Commands: one-second words, 12 classes: ten keywords, silence, and unknown = every other word (Warden 2018).

Read from ``speech_commands/``, in either form:

- the public archive, unpacked there or by torchaudio (``SpeechCommands/speech_commands_v0.02/``): a folder of wav files
  a word, and ``_background_noise_``. The split is the official one, by a hash of the speaker: the training partition
  trains, the testing partition tests, the validation partition is left out. Silence is a tenth as many clips as there
  are words in a partition, evenly spaced over the noise recordings: their first 80 % for training, their last 10 % for
  testing.
- ``index.csv`` beside one Ogg file of clips end to end a class: mostly the official *test* set, so with few training
  clips. The split is by the column ``fold``, a hash of the speaker: folds 0 to 3 train, fold 4 tests. **Its accuracy is
  not the official test accuracy.**

Silence has no speaker. In the second form its fold is the same hash, of the clip's name. In both, the silent training
clips, in the order of their names' sha1, are dealt in turn to the speakers, in the order of theirs.

Features (as in Zhang et al. 2018, 32x32): clips cut or zero-padded to 16,000 samples; librosa's MFCCs with 32
coefficients of 64 mel bands, windows of 1,024 samples (64 ms, Hann) every 512: centred, 1 + 16000 // 512 = 32 frames.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.source import Source, damaged, digest_of_files, missing, read_download
from fedsieve.data.storage import Arrays, cached_arrays
from fedsieve.data.version import Counts, Version, merged
from fedsieve.types import InputError
from fedsieve.types.errors import package

CLASSES = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "silence", "unknown")
HOW = (
    "download http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz (ZeroFL: v0.01, likewise) and run: "
    "fedsieve data speech_commands --from speech_commands_v0.02.tar.gz"
)
NOISE = "_background_noise_"
RATE = 16_000
COLUMNS = {"file", "start", "samples", "word", "clip", "speaker", "fold"}
"""Of ``index.csv``."""

Audio: TypeAlias = NDArray[np.float32]
"""Samples in -1..1 at 16 kHz."""


class Clip(NamedTuple):
    """What is known of a recording; ``speaker`` is "" where nobody speaks."""

    name: str
    word: str
    speaker: str
    test: bool


class SpeechCommands(Source):
    """The words, float32 [n, 1, 32, 32], owned by speakers, normalised by the training set's mean and std."""

    name, classes, instructions = "speech_commands", CLASSES, HOW
    folders = tuple(  # as torchaudio unpacks it
        f"{above}speech_commands_v0.0{n}" for above in ("SpeechCommands/", "") for n in (2, 1)
    )

    versions = (  # ZeroFL's 56,196 training clips are those of v0.01, and a tenth as much silence
        Version(
            "v0.01",
            {
                "words": 30,
                "clips": 64_721,
                "training": 51_088,
                "validation": 6_798,
                "testing": 6_835,
                "recordings of noise": 6,
            },
        ),
        Version(
            "v0.02",
            {
                "words": 35,
                "clips": 105_829,
                "training": 84_843,
                "validation": 9_981,
                "testing": 11_005,
                "recordings of noise": 6,
            },
        ),
    )
    archives = ("speech_commands_v0.02.tar.gz", "speech_commands_v0.01.tar.gz")
    pattern = "WORD/*_nohash_*.wav"

    def target(self, name: str) -> str | None:
        """Return the word, or the folder of noise, and the name of a recording, None for other files."""
        noise, clip = f"{NOISE}/[0-9A-Za-z_]+", "[a-z]+/[0-9A-Za-z]+_nohash_[0-9]+"
        file = re.fullmatch(rf"(?:.*/)?((?:{noise}|{clip})\.wav)", name)
        return file and file[1]

    def examine(self, target: str, content: bytes) -> dict[str, int | set[str]]:
        """Return the word and the partition of a recording; ValueError if it is no wav file."""
        if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
            raise ValueError("is no wav file")
        return _tally(target)

    def counts(self, folder: Path, arrays: Arrays | None = None) -> Counts | None:
        """Return how many words, clips of each partition, and noise recordings there are; lists the folder."""
        if self.form(folder) != "public wav folders":
            return {"clips": len(_index(folder / "index.csv"))}
        names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*.wav")]
        tallies = (_tally(target) for name in names if (target := self.target(name)) is not None)
        return merged(tallies, self.versions[0].counts)

    def form(self, folder: Path) -> str | None:
        """Return "index.csv and Ogg files", "public wav folders" or None."""
        if (folder / "index.csv").is_file():
            return "index.csv and Ogg files"
        return "public wav folders" if (folder / CLASSES[0]).is_dir() else None

    def read(self, folder: Path) -> Arrays:
        """Return the features of all clips, worked out once and then kept in the cache."""
        match self.form(folder):
            case "index.csv and Ogg files":
                files, clips = [folder / "index.csv", *folder.glob("*.ogg")], _subset(folder)
            case "public wav folders":
                files, clips = list(folder.glob("*/*.wav")), _public(folder)
            case _:
                raise missing(folder / CLASSES[0], HOW)
        key = f"speech_commands/mfcc 32 64 1024 512/{digest_of_files(files)}"
        return cached_arrays(key, lambda: features(clips))


def which_set(name: str) -> str:
    """Return "training", "validation" (10 %) or "testing" (10 %): the rule in the archive's README.md."""
    most = 2**27 - 1
    percentage = _sha1(name.partition("_nohash_")[0]) % (most + 1) * (100 / most)
    return "validation" if percentage < 10 else "testing" if percentage < 20 else "training"


def _tally(target: str) -> dict[str, int | set[str]]:
    word, _, name = target.partition("/")
    return {"recordings of noise": 1} if word == NOISE else {"words": {word}, "clips": 1, which_set(name): 1}


def mfcc(audio: Audio) -> NDArray[np.float32]:
    """Return [32 coefficients, 32 frames] of the first second."""
    padded = np.zeros(RATE, np.float32)
    padded[: len(audio)] = audio[:RATE]
    librosa = package("librosa", "speech")
    coefficients: NDArray[np.float32] = librosa.feature.mfcc(
        y=padded, sr=RATE, n_mfcc=32, n_mels=64, n_fft=1024, hop_length=512
    )
    return coefficients


def features(recordings: Iterable[tuple[Clip, Audio]]) -> Arrays:
    """Return what the cache keeps; ``scale`` is the mean and the standard deviation of the training features."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

    mfcc(np.zeros(RATE, np.float32))  # librosa loads on first use, and the limit reaches only what is loaded
    with threadpool_limits(1):  # librosa's small products take ten times as long on two threads of a busy machine
        rows = [(clip, mfcc(audio)) for clip, audio in recordings]
    if {clip.test for clip, _ in rows if clip.speaker} != {False, True}:
        raise InputError(f"speech_commands/ has no spoken clips for training or none for testing: {HOW}")
    arrays: Arrays = {}
    labels = {word: label for label, word in enumerate((*CLASSES[:10], "_silence_"))}
    for part, test in (("train", False), ("test", True)):
        arrays[f"{part}_x"] = np.array([x for clip, x in rows if clip.test == test])[:, None]
        arrays[f"{part}_y"] = np.array([labels.get(clip.word, 11) for clip, _ in rows if clip.test == test], np.uint8)
    groups, group = np.unique(owners([clip for clip, _ in rows if not clip.test]), return_inverse=True)
    mean = arrays["train_x"].mean(dtype=np.float64)
    std = np.sqrt(np.square(arrays["train_x"] - np.float32(mean)).mean(dtype=np.float64))
    return arrays | {"group": group, "groups": groups, "scale": np.array([mean, std])}


def owners(clips: list[Clip]) -> list[str]:
    """Return every clip's speaker, silence dealt in turn."""
    speakers = sorted({clip.speaker for clip in clips if clip.speaker})
    silent = sorted((clip.name for clip in clips if not clip.speaker), key=_sha1)
    dealt = {name: speakers[i % len(speakers)] for i, name in enumerate(silent)}
    return [clip.speaker or dealt[clip.name] for clip in clips]


def _sha1(text: str) -> int:
    return int(hashlib.sha1(text.encode()).hexdigest(), 16)


def _subset(folder: Path) -> Iterator[tuple[Clip, Audio]]:
    for name, rows in groupby(_index(folder / "index.csv"), key=itemgetter(0)):
        audio = _audio(folder / name)
        for _, samples, clip in rows:
            if samples.stop > len(audio):
                raise damaged(folder / name, f"it ends before clip {clip.name}", HOW)
            yield clip, audio[samples]


def _index(path: Path) -> list[tuple[str, slice, Clip]]:
    """Return every row of ``index.csv``: a file, which samples of it, and the clip that they are."""
    contents = read_download(path, HOW)
    try:
        table = csv.DictReader(contents.decode().splitlines(), strict=True)
        if lacking := COLUMNS - set(table.fieldnames or ()):
            raise ValueError(f"no column {', '.join(sorted(lacking))}")
        return [_row(row, f"line {table.line_num}") for row in table]
    except (ValueError, csv.Error) as error:
        raise damaged(path, str(error), HOW) from None


def _row(row: dict[str, str | None], where: str) -> tuple[str, slice, Clip]:
    """Return what a row says; ValueError names the line that says something else."""
    cells = {column: row[column] or "" for column in COLUMNS}
    numbers = [cells["start"], cells["samples"], cells["fold"] or "0"]
    if not all(re.fullmatch("[0-9]{1,18}", number) for number in numbers) or not cells["file"].isprintable():
        raise ValueError(f"{where} is not a clip")
    start, samples = int(cells["start"]), int(cells["samples"])
    fold = int(cells["fold"]) if cells["fold"] else _sha1(f"fold:{cells['clip']}") % 5
    clip = Clip(cells["clip"], cells["word"], cells["speaker"], fold == 4)
    return cells["file"], slice(start, start + samples), clip


def _public(folder: Path) -> Iterator[tuple[Clip, Audio]]:
    noise = {wav.name: _audio(wav) for wav in sorted((folder / NOISE).glob("*.wav"))}
    if not noise:
        raise missing(folder / NOISE, HOW)
    wavs = [(wav, which_set(wav.name)) for wav in sorted(folder.glob("*/*_nohash_*.wav"))]
    for wav, part in wavs:
        if part != "validation":
            speaker = wav.name.partition("_nohash_")[0]
            yield Clip(wav.name, wav.parent.name, speaker, part == "testing"), _audio(wav)
    words = Counter(part for _, part in wavs)
    yield from _silence(noise, words["training"] // 10, 0.0, 0.8)
    yield from _silence(noise, words["testing"] // 10, 0.9, 1.0, test=True)


def _silence(
    noise: dict[str, Audio], clips: int, begin: float, end: float, test: bool = False
) -> Iterator[tuple[Clip, Audio]]:
    """Cut ``clips`` seconds, evenly spaced, out of every recording between two fractions of its length."""
    shares = np.array_split(np.arange(clips), len(noise))
    for share, (name, audio) in zip(shares, noise.items(), strict=True):
        first, last = int(begin * len(audio)), int(end * len(audio)) - RATE
        for start in np.linspace(first, max(first, last), len(share), dtype=int):
            yield Clip(f"{name}:{start}", "_silence_", "", test), audio[start : start + RATE]


def _audio(path: Path) -> Audio:
    soundfile = package("soundfile", "speech")
    try:
        audio, rate = soundfile.read(BytesIO(read_download(path, HOW)), dtype="float32")
    except soundfile.LibsndfileError as error:
        raise damaged(path, str(error), HOW) from None
    if rate != RATE or audio.ndim != 1:
        raise damaged(path, f"{rate} Hz, {audio.ndim} channels instead of mono at {RATE} Hz", HOW)
    samples: Audio = audio
    return samples

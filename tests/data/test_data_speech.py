"""Speech Commands, from small recordings: speakers kept together, silence dealt, damage refused."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsieve.data as data
from fedsieve.data import speech_commands
from fedsieve.types import InputError
from small_files import RNG, _cache, refuses  # noqa: F401 (the cache is every test's)


def test_which_set_keeps_speakers_together_and_the_published_proportions() -> None:
    names = [f"{i:08x}" for i in range(4000)]
    sets = [speech_commands.which_set(f"{name}_nohash_0.wav") for name in names]
    assert sets == [speech_commands.which_set(f"{name}_nohash_7.wav") for name in names]
    for part, share in (("training", 0.8), ("validation", 0.1), ("testing", 0.1)):
        assert sets.count(part) / 4000 == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5)


def test_silence_is_dealt_evenly() -> None:
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


@pytest.mark.parametrize(
    "inside",
    ["speech_commands", "SpeechCommands/speech_commands_v0.02", "speech_commands/SpeechCommands/speech_commands_v0.01"],
)
@pytest.mark.slow
def test_speech_commands_public_folders(tmp_path: Path, inside: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("librosa")
    folder = tmp_path / inside
    people = {part: speakers(part, count) for part, count in (("training", 10), ("testing", 5), ("validation", 1))}
    for word in ("yes", "go", "bed"):
        (folder / word).mkdir(parents=True)
        for name in (name for part in people.values() for name in part):
            soundfile.write(folder / word / f"{name}_nohash_0.wav", tone(0.9), 16_000)
    refuses("speech_commands", tmp_path, "_background_noise_", "missing", "speech_commands_v0.02.tar.gz")
    (folder / "_background_noise_").mkdir()
    quiet, loud = tone(18) / 10, tone(2)
    soundfile.write(folder / "_background_noise_" / "hum.wav", np.concatenate([quiet, loud]), 16_000)
    found = data.load_dataset("speech_commands", tmp_path)
    status = data.dataset_status("speech_commands", tmp_path)
    assert status.startswith(f"{folder}: public wav folders (a selection: 3 words, 48 clips, ")
    assert found.version == "a selection"
    # 10 and 5 speakers x 3 words, and a tenth as much silence; bed is unknown; the validation speaker is left out.
    assert found.train.y.bincount(minlength=12).tolist() == [10] + [0] * 8 + [10, 3, 10]
    assert found.test.y.bincount(minlength=12).tolist() == [5] + [0] * 8 + [5, 1, 5]
    assert found.groups == tuple(sorted(people["training"]))
    assert found.train.x.shape == (33, 1, 32, 32)
    silent = [part.x[part.y == speech_commands.CLASSES.index("silence")][:, 0, 0] for part in (found.train, found.test)]
    assert silent[0].max() < silent[1].min()  # energy: silence to test with is the recording's end
    x, _ = found.train.batch(slice(None))
    assert (x.mean().item(), x.std().item()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))
    (folder / "yes" / f"{people['training'][0]}_nohash_0.wav").write_bytes(b"RIFFnothing")
    refuses("speech_commands", tmp_path, "yes", "damaged", "speech_commands_v0.02.tar.gz")
    soundfile.write(folder / "yes" / f"{people['training'][0]}_nohash_0.wav", tone(1), 8_000)
    refuses("speech_commands", tmp_path, "8000 Hz", "16000 Hz")


@pytest.mark.slow
def test_speech_commands_ogg_with_index(tmp_path: Path) -> None:
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
    found = data.load_dataset("speech_commands", tmp_path)
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
def test_speech_commands_index_of_another_form_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any, why: str
) -> None:
    monkeypatch.setattr(speech_commands, "mfcc", lambda audio: audio)
    (tmp_path / "speech_commands").mkdir()
    (tmp_path / "speech_commands" / "index.csv").write_bytes(contents)
    refuses("speech_commands", tmp_path, "index.csv is damaged", why, "speech_commands_v0.02.tar.gz")


def test_speech_commands_without_a_speaker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_commands, "mfcc", lambda audio: audio)
    rows = [(speech_commands.Clip(str(i), "_silence_", "", i == 1), tone(1)) for i in range(2)]
    with pytest.raises(InputError, match="no spoken clips"):
        speech_commands.features(rows)


def test_speech_commands_without_librosa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(InputError, match=r"pip install '\.\[speech\]'"):
        speech_commands.mfcc(np.zeros(16_000, np.float32))

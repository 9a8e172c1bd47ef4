"""The deployed model in use: what it says, of which inputs, and what every mistake says."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deployed_models import command, make
from fedsieve import InputError
from fedsieve.data import digits
from fedsieve.runs import prediction
from fedsieve.runs.model import TrainedModel, open_model
from fedsieve.runs.prediction import ExampleSource, choose_forward, open_examples, predict, print_predictions

OWN = {"task": {"model": "tiny:TinyNet", "dataset": "tiny:blobs"}}


def read(source: Path | str, model: TrainedModel) -> Tensor:
    inputs = open_examples(str(source), model.metadata)
    return inputs.read(0, len(inputs.names))


@pytest.mark.slow
def test_it_is_as_accurate_as_the_run_said(run: Path) -> None:
    model = open_model(run)
    inputs = open_examples("test", model.metadata)
    found = list(predict(model, inputs, model.network, batch=32))
    assert len(found) == 100
    told = json.loads((run / "summary.json").read_text())
    assert sum(one.right for one in found) / 100 == told["accuracy"] > 0.7
    assert model.density() == told["density"]
    alone = list(predict(model, inputs, model.network, batch=1))
    assert [one.top[0][0] for one in alone] == [one.top[0][0] for one in found]


def test_a_range_of_the_test_set_is_what_it_says(run: Path) -> None:
    metadata = open_model(run).metadata
    whole, part, one = (open_examples(source, metadata) for source in ("test", "test:3-7", "test:3"))
    assert part.names == ["3", "4", "5", "6", "7"]
    assert whole.truth is not None
    assert part.truth is not None
    assert torch.equal(part.read(1, 3), whole.read(4, 6))
    assert torch.equal(part.truth, whole.truth[3:8])
    assert one.names == ["3"]


def test_arrays_are_taken_in_the_datasets_units_or_as_bytes(tmp_path: Path) -> None:
    model = make(mean=(0.2,), std=(0.5,))
    grey = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
    for name, array in (("bytes", grey), ("float", grey / np.float32(255)), ("big", (grey / 255).astype(">f8"))):
        np.save(tmp_path / f"{name}.npy", array)
        found = model.normalize(read(tmp_path / f"{name}.npy", model))
        expected = (torch.from_numpy(grey).float() / 255 - 0.2) / 0.5
        assert torch.allclose(found, expected, atol=1e-6)
    np.save(tmp_path / "one.npy", grey[2])
    np.savez(tmp_path / "only.npz", grey[2])
    np.savez(tmp_path / "x.npz", x=grey[2:3], y=np.zeros(1))
    for name in ("one.npy", "only.npz", "x.npz"):
        assert np.array_equal(read(tmp_path / name, model).numpy(), grey[2:3]), name
    vectors = replace(model, metadata=replace(model.metadata, shape=(30,)))
    np.save(tmp_path / "vectors.npy", np.ones((4, 30), np.float16))
    assert read(tmp_path / "vectors.npy", vectors).shape == (4, 30)


def test_images_are_turned_to_the_models_channels_and_size(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(colour[..., 0]).save(tmp_path / "grey.png")
    one, three = make(), make(shape=(3, 8, 8))
    expected = torch.from_numpy(colour).float() / 255
    assert torch.equal(read(tmp_path / "colour.png", three)[0], expected.movedim(2, 0))
    assert torch.equal(read(tmp_path / "grey.png", one)[0, 0], expected[..., 0])
    assert torch.equal(read(tmp_path / "grey.png", three), expected[..., :1].movedim(2, 0).expand(1, 3, 8, 8))
    luma = expected @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert torch.allclose(read(tmp_path / "colour.png", one)[0, 0], luma, atol=1 / 255)
    half = Image.new("L", (64, 32))
    half.paste(255, (32, 0, 64, 32))
    for suffix in ("png", "jpg", "webp", "JPEG"):
        half.save(tmp_path / f"half.{suffix}", quality=100)
        found = read(tmp_path / f"half.{suffix}", one)[0, 0]
        assert found.shape == (8, 8)
        assert found[:, :3].max() < 0.05
        assert found[:, 5:].min() > 0.95


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    left = Image.new("L", (8, 8))
    left.paste(255, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    left.save(tmp_path / "a.png", exif=exif)
    assert read(tmp_path / "a.png", make())[0, 0].mean(0).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    model = make()
    for i, name in enumerate(("b.png", "a.png", "c.PNG", ".hidden.png")):
        Image.new("L", (8, 8), 50 * i).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    inputs = open_examples(str(tmp_path), model.metadata)
    assert [Path(name).name for name in inputs.names] == ["a.png", "b.png", "c.PNG"]
    grey = [round(float(x.mean()) * 255) for x in inputs.read(0, 3)]
    assert grey == [50, 0, 100]


@pytest.mark.slow
def test_recordings_give_the_features_of_speech_commands(tmp_path: Path) -> None:
    pytest.importorskip("librosa")
    soundfile = pytest.importorskip("soundfile")
    from fedsieve.data.speech_commands import mfcc

    audio = (0.1 * np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)
    model = make("resnet18", (1, 32, 32), "speech_commands")
    soundfile.write(tmp_path / "a.wav", audio, 16_000, "FLOAT")
    assert np.array_equal(read(tmp_path / "a.wav", model)[0, 0].numpy(), mfcc(audio))
    low, high = (np.sin(2 * np.pi * 440 * np.arange(rate) / rate) / 2 for rate in (16_000, 44_100))
    soundfile.write(tmp_path / "mono.wav", low, 16_000)
    soundfile.write(tmp_path / "stereo.wav", np.column_stack([1.5 * high, 0.5 * high]), 44_100)
    mono, stereo = read(tmp_path / "mono.wav", model), read(tmp_path / "stereo.wav", model)
    assert mono.shape == (1, 1, 32, 32)
    assert (mono - stereo)[:, :, :, 2:-2].abs().mean() < 0.02 * mono.abs().mean()
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"broken\.wav cannot be read as a recording"):
        read(tmp_path / "broken.wav", model)
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"this model takes \.wav"):
        read(tmp_path / "a.png", model)


def test_the_likeliest_classes_come_first_with_softmax_probabilities() -> None:
    model = make()
    x = digits.load_digits().test.x[:5]
    inputs = ExampleSource(list("abcde"), lambda i, j: x[i:j])
    for top in (1, 3, 50):
        found = list(predict(model, inputs, model.network, batch=2, top=top))
        assert [one.name for one in found] == list("abcde")
        for one, logits in zip(found, model.network(x), strict=True):
            share = torch.exp(logits) / torch.exp(logits).sum()
            order = share.argsort(descending=True)[:top].tolist()
            assert [name for name, _ in one.top] == [str(k) for k in order]
            assert [p for _, p in one.top] == pytest.approx(share[order].tolist(), rel=1e-5)


def test_an_answer_that_is_no_number_is_refused() -> None:
    model = make()
    inputs = ExampleSource(["a", "b"], lambda i, j: torch.full((2, 1, 8, 8), 1.0))
    with pytest.raises(InputError, match="a: the model answers a number that is not finite"):
        list(predict(model, inputs, lambda x: torch.full((2, 10), torch.nan), 2))
    infinite = torch.tensor([1.0, torch.inf])[:, None, None, None].expand(2, 1, 8, 8)
    inputs = ExampleSource(["a", "b"], lambda i, j: infinite)
    with pytest.raises(InputError, match="b: the input holds a number that is not finite"):
        list(predict(model, inputs, model.network, 2))


def test_the_kernels_are_used_where_they_are_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, why = make(), [None, "they do not know its layers"]

    class Predictor:
        def __init__(self, net: nn.Module, batch: int):
            self.made_of, self.reason = (net, batch), "not asked yet"

        def __call__(self, x: Tensor) -> Tensor:
            self.reason = why[0]  # type: ignore[assignment]
            return x

    monkeypatch.setattr(prediction, "Predictor", Predictor)
    monkeypatch.setattr(prediction, "loaded_isa", lambda: "avx512")
    for asked in ("auto", "sparse"):
        logits, way = choose_forward(model, 3, asked)
        assert (logits.made_of, way) == ((model.network, 3), "sparse (avx512)")  # type: ignore[attr-defined]
    assert choose_forward(model, 3, "dense") == (model.network, "dense")
    why.reverse()
    assert choose_forward(model, 3, "auto") == (model.network, "dense, because they do not know its layers")
    with pytest.raises(InputError, match=r"no sparse kernels .*, because they do not know its layers: use --kernels"):
        choose_forward(model, 3, "sparse")


def test_a_network_of_ones_own_needs_the_recipe_that_the_user_names(own: Path, mine: Path) -> None:
    with pytest.raises(InputError, match=r"tiny:TinyNet is code of your own: .* --recipe mine.py:recipe"):
        open_model(own)
    assert "mine" not in sys.modules
    model = open_model(own, "mine.py:recipe")
    found = list(predict(model, open_examples("test", model.metadata, "mine.py:recipe"), model.network, 50))
    assert sum(one.right for one in found) / 120 == json.loads((own / "summary.json").read_text())["accuracy"]
    with pytest.raises(InputError, match=r"--recipe mine.py:other has another model than tiny:TinyNet"):
        open_model(own, "mine.py:other")


def test_a_table_or_lines_of_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "predict", run, "test:0-9", "--json", "--top", 2, "--kernels", "dense")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["input"] for row in rows] == [str(i) for i in range(10)]
    assert all(row.keys() == {"input", "label", "probability", "top", "truth"} for row in rows)
    assert all([row["label"], row["probability"]] == row["top"][0] and len(row["top"]) == 2 for row in rows)
    right = sum(row["label"] == row["truth"] for row in rows)
    assert err.splitlines() == ["kernels: dense", f"accuracy {right / 10:.2%} of 10 examples"]

    code, out, err = command(capsys, "predict", run, "test:0-9", "--kernels", "dense", "--batch", 4)
    lines = out.splitlines()
    assert (code, err) == (0, "kernels: dense\n")
    assert lines[0].split() == ["input", "label", "probability"]
    assert [line.split()[:2] for line in lines[1:11]] == [[row["input"], row["label"]] for row in rows]
    assert lines[11] == f"accuracy {right / 10:.2%} of 10 examples"
    assert sum("(is " in line for line in lines) == 10 - right


def test_long_names_stay_whole_where_no_terminal_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{'long/' * 40}[b]a.png"
    model = make()
    print_predictions(predict(model, ExampleSource([name], lambda i, j: torch.zeros(1, 1, 8, 8)), model.network, 1))
    assert name in capsys.readouterr().out


def spoilt(run: Path, own: Path, at: Path) -> None:
    """Write what the mistakes below are made with."""
    shutil.copytree(run, at / "good")
    for name in ("unfinished", "damaged", "other", "bare", "lacking", "strange"):
        shutil.copytree(run, at / name)
    shutil.copytree(own, at / "own")
    (at / "unfinished/model.safetensors").unlink()
    (at / "damaged/model.safetensors").write_bytes(b"x" * 100)
    shutil.copy(own / "model.safetensors", at / "other")
    (at / "bare/inputs.json").write_text('{"shape": [1, 8, 8], "mean": [0], "std": [0], "classes": ["a"]}')
    (at / "lacking/inputs.json").unlink()
    (at / "strange/inputs.json").write_text("[]")
    (at / "empty").mkdir()
    (at / "notes.txt").write_text("text")
    (at / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (at / "pickle.npy").write_bytes(b"\x80\x04K\x01.")
    Image.new("RGBA", (8, 8)).save(at / "clear.png")
    Image.new("I;16", (8, 8)).save(at / "deep.png")
    np.save(at / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(at / "flat.npy", np.zeros((8, 8)))
    np.save(at / "none.npy", np.zeros((0, 1, 8, 8)))
    np.save(at / "whole.npy", np.zeros((1, 8, 8), int))
    np.save(at / "nan.npy", np.full((2, 1, 8, 8), np.nan))
    np.savez(at / "two.npz", a=np.zeros(1), b=np.zeros(1))


MISTAKES = {
    "no run": (("notes.txt", "test"), "notes.txt is no .fsv file: name a run directory"),
    "nothing there": (("nowhere", "test"), "nowhere cannot be read (No such file or directory)"),
    "another folder": (("empty", "test"), "empty is not a run directory (no run.json)"),
    "an unfinished run": (("unfinished", "test"), "unfinished has no model.safetensors: finish the run first"),
    "a damaged model": (("damaged", "test"), "damaged/model.safetensors is damaged"),
    "another model": (("other", "test"), "other: the weights do not fit digits_net at bn.bias"),
    "damaged inputs": (("bare", "test"), "bare (run.json, inputs.json) does not say what the model is"),
    "no inputs": (("lacking", "test"), "lacking (run.json, inputs.json) does not say what the model is"),
    "strange inputs": (("strange", "test"), "strange/inputs.json is not a JSON object"),
    "one's own network": (("own", "test"), "--recipe mine.py:recipe"),
    "no such recipe": (("own", "test", "--recipe", "x.py:f"), "there is no file x.py"),
    "no input": (("good", "nowhere.png"), "there is no nowhere.png: this model takes .png, .jpg"),
    "another input": (("good", "notes.txt"), "notes.txt is nothing that can be read: this model takes .png"),
    "a recording": (("good", "a.wav"), "there is no a.wav"),
    "an empty folder": (("good", "empty"), "empty holds nothing that can be read"),
    "a broken image": (("good", "cut.png"), "cut.png cannot be read as an image"),
    "a transparent image": (("good", "clear.png"), "clear.png is transparent in places: put a background"),
    "a deep image": (("good", "deep.png"), "deep.png has more than 8 bits a channel"),
    "a pickle": (("good", "pickle.npy"), "pickle.npy cannot be read as an array of numbers"),
    "Python objects": (("good", "objects.npy"), "objects.npy cannot be read as an array of numbers"),
    "another shape": (("good", "flat.npy"), "flat.npy is of shape [8, 8]: this model takes [n, 1, 8, 8] or [1, 8, 8]"),
    "no example": (("good", "none.npy"), "none.npy is of shape [0, 1, 8, 8]"),
    "whole numbers": (("good", "whole.npy"), "whole.npy holds int64: give float numbers"),
    "no number": (("good", "nan.npy"), "0: the input holds a number that is not finite"),
    "two arrays": (("good", "two.npz"), "two.npz holds a, b: name the array x"),
    "beyond the test set": (("good", "test:90-100"), "test:90-100: write test, test:N or test:FIRST-LAST, of 0 to 99"),
    "backwards": (("good", "test:5-2"), "of 0 to 99"),
    "no range": (("good", "test:x"), "of 0 to 99"),
    "no kernels of that name": (("good", "test", "--kernels", "fast"), "--kernels must be one of auto, sparse, dense"),
    "no class": (("good", "test", "--top", "0"), "--top"),
    "no batch": (("good", "test", "--batch", "0"), "--batch"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(
    name: str, run: Path, own: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt(run, own, mine)
    words, line = MISTAKES[name]
    code, out, err = command(capsys, "predict", *words)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert last.startswith("fedsieve: ")
    assert line in last
    assert len(err.splitlines()) <= 2  # which kernels, where it got that far

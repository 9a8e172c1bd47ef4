"""``fedsieve predict``: the classes that a model finds most likely, for images, recordings, arrays, or the test set.

What a model is asked about are raw examples, in the dataset's own units. Images give 0..1, resized to the model's size
(stretched, if their shape is another) and turned to grey for a model of one channel; neither inverted nor centred.
Recordings give the features that ``data/speech_commands.py`` describes, of their first second, resampled to 16 kHz.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from fedsieve.data.speech_commands import RATE, mfcc
from fedsieve.data.storage import UNREADABLE
from fedsieve.kernels import Predictor, loaded_isa
from fedsieve.runs.model import ModelMetadata, TrainedModel, load_test_set
from fedsieve.types import InputError
from fedsieve.types.errors import package

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
ARRAYS = (".npy", ".npz")
NO_ARRAY = (*UNREADABLE, RuntimeError, MemoryError, TokenError)
"""What NumPy raises on a file that is no array."""
NO_IMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on a damaged picture."""
WIDE = 10_000
"""Columns of an output that is not a terminal: nothing is cut or folded."""
KERNELS = ("auto", "sparse", "dense")


class ExampleSource(NamedTuple):
    """Examples by name; ``read(i, j)`` returns those from i up to j, raw, and ``truth`` their classes if known."""

    names: Sequence[str]
    read: Callable[[int, int], Tensor]
    truth: Tensor | None = None


def open_examples(source: str, metadata: ModelMetadata, recipe: str = "", data: str | None = None) -> ExampleSource:
    """Return the examples that ``source`` names: a file, a folder of files, ``test`` or ``test:FIRST-LAST``.

    Raises InputError, at once for what is not there, and from ``read`` for a file that cannot be used.
    """
    if source.partition(":")[0] == "test":
        return _test_examples(source, metadata, recipe, data)
    path, readers = Path(source), _readers(metadata)
    takes = f"this model takes {', '.join((*readers, *ARRAYS))}, {'a folder of them, ' if readers else ''}or test"
    if path.suffix.lower() in ARRAYS and path.is_file():
        return _array_examples(path, metadata)
    if not path.exists():
        raise InputError(f"there is no {path}: {takes}")
    files = sorted(p for p in path.iterdir() if p.name[0] != ".") if path.is_dir() else [path]
    paths = [p for p in files if p.suffix.lower() in readers]
    if not paths:
        raise InputError(f"{path} {'holds' if path.is_dir() else 'is'} nothing that can be read: {takes}")
    return ExampleSource(
        [*map(str, paths)], lambda i, j: torch.stack([readers[p.suffix.lower()](p) for p in paths[i:j]])
    )


def _readers(metadata: ModelMetadata) -> dict[str, Callable[[Path], Tensor]]:
    """Return which files become examples of a model, and how."""
    if metadata.dataset == "speech_commands":
        return {".wav": _load_recording}
    if len(metadata.shape) == 3 and metadata.shape[0] in (1, 3):
        return dict.fromkeys(IMAGES, partial(load_image, shape=metadata.shape))
    return {}


def _test_examples(source: str, metadata: ModelMetadata, recipe: str, data: str | None) -> ExampleSource:
    test = load_test_set(metadata, recipe, data)
    match = re.fullmatch(r"test(?::(\d+)(?:-(\d+))?)?", source)
    first = int(match[1] or 0) if match else 0
    last = int(match[2] or match[1] or len(test) - 1) if match else -1
    if not 0 <= first <= last < len(test):
        raise InputError(f"{source}: write test, test:N or test:FIRST-LAST, of 0 to {len(test) - 1}")
    x, y = test.x, test.y
    if not isinstance(x, Tensor):
        raise InputError("predict takes inputs of one tensor, and this model's are several: use it from Python")
    if not metadata.classes or not isinstance(y, Tensor) or y.dim() != 1:
        other = "continue a text by generate" if metadata.next_token else "use it from Python"
        raise InputError(f"predict tells the classes of examples, and this model's targets are none: {other}")
    x, y = x[first : last + 1], y[first : last + 1]
    return ExampleSource([str(i) for i in range(first, last + 1)], lambda i, j: x[i:j], y)


def _array_examples(path: Path, metadata: ModelMetadata) -> ExampleSource:
    shape = ", ".join(map(str, metadata.shape))
    x = _load_array(path)
    if x.shape == metadata.shape:
        x = x[np.newaxis]
    if x.shape[1:] != metadata.shape or not len(x):
        raise InputError(f"{path} is of shape {list(x.shape)}: this model takes [n, {shape}] or [{shape}]")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise InputError(f"{path} holds {x.dtype}: give float numbers in the dataset's units, or uint8 for x / 255")
    kind = np.uint8 if x.dtype == np.uint8 else np.float32
    return ExampleSource([str(i) for i in range(len(x))], lambda i, j: torch.from_numpy(np.array(x[i:j], kind)))


def _load_array(path: Path) -> NDArray[Any]:
    """Return the array of a .npy (left on the disk), or the only one, or the one called x, of a .npz."""
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            names = content.files
            name = names[0] if len(names) == 1 else "x"
            if name in names:
                array: NDArray[Any] = content[name]
                return array
    except NO_ARRAY:
        raise InputError(f"{path} cannot be read as an array of numbers: save it again, with numpy.save") from None
    raise InputError(f"{path} holds {', '.join(names) or 'nothing'}: name the array x, or save it alone")


def load_image(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return a picture as [channels, height, width] in 0..1."""
    channels, height, width = shape
    image = _open_image(path)
    if image.mode[0] in "IF":
        raise InputError(f"{path} has more than 8 bits a channel: save it with 8")
    if image.has_transparency_data and min(image.convert("RGBA").getchannel("A").tobytes()) < 255:
        raise InputError(f"{path} is transparent in places: put a background behind it")
    image = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255)
    return pixels.view(height, width, channels).movedim(2, 0)


def _open_image(path: Path) -> Image.Image:
    """Return a picture, read to its end, the way up that its camera was held."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except NO_IMAGE as error:
        raise InputError(f"{path} cannot be read as an image ({error}): save it again, as .png") from None


def _load_recording(path: Path) -> Tensor:
    """Return the features of the first second, [1, 32, 32]."""
    librosa, soundfile = package("librosa", "speech"), package("soundfile", "speech")
    try:
        with soundfile.SoundFile(path) as sound:
            rate = sound.samplerate
            audio = sound.read(rate, dtype="float32", always_2d=True).mean(1)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"{path} cannot be read as a recording ({error}): save it again, as .wav") from None
    if rate != RATE:
        audio = librosa.resample(audio, orig_sr=rate, target_sr=RATE)
    return torch.from_numpy(mfcc(audio))[None]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one example, the likeliest first, with their probabilities."""

    name: str
    top: tuple[tuple[str, float], ...]
    truth: str | None = None

    @property
    def right(self) -> bool:
        """Whether the likeliest class is the true one."""
        return self.top[0][0] == self.truth

    def json(self) -> str:
        """Return it as a line."""
        line = {"input": self.name, "label": self.top[0][0], "probability": self.top[0][1], "top": self.top}
        return json.dumps(line if self.truth is None else line | {"truth": self.truth}, ensure_ascii=False)


def choose_forward(model: TrainedModel, batch: int, kernels: str = "auto") -> tuple[Callable[[Tensor], Tensor], str]:
    """Return what computes the logits of up to ``batch`` examples, and in words which way that is.

    ``kernels``: ``sparse`` skips the zeros and raises InputError where that cannot be; ``dense`` is the plain model;
    ``auto`` is sparse where it can be.
    """
    if kernels not in KERNELS:
        raise InputError(f"--kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    if kernels == "dense":
        return model.network, "dense"
    predictor = Predictor(model.network, batch)
    predictor(torch.zeros(1, *model.metadata.shape))  # which makes its plan, or finds out why it cannot
    if predictor.reason is None:
        return predictor, f"sparse ({loaded_isa()})"
    if kernels == "sparse":
        raise InputError(f"there are no sparse kernels for this model, because {predictor.reason}: use --kernels dense")
    return model.network, f"dense, because {predictor.reason}"


@torch.inference_mode()
def predict(
    model: TrainedModel, inputs: ExampleSource, logits_of: Callable[[Tensor], Tensor], batch: int, top: int = 1
) -> Iterator[Prediction]:
    """Yield the ``top`` likeliest classes of every example, ``batch`` examples at once. Raises InputError."""
    classes = model.metadata.classes
    for i in range(0, len(inputs.names), batch):
        names = inputs.names[i : i + batch]
        x = model.normalize(inputs.read(i, i + len(names)))
        logits = logits_of(x)
        for what, numbers in (("the input holds", x), ("the model answers", logits)):
            finite = numbers.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                raise InputError(f"{names[finite.index(False)]}: {what} a number that is not finite: leave it out")
        share, index = logits.softmax(1).topk(min(top, len(classes)))
        for j, name in enumerate(names):
            best = zip(index[j].tolist(), share[j].tolist(), strict=True)
            truth = None if inputs.truth is None else classes[int(inputs.truth[i + j])]
            yield Prediction(name, tuple((classes[k], p) for k, p in best), truth)


def print_predictions(predictions: Iterable[Prediction], as_json: bool = False, console: Console | None = None) -> None:
    """Print predictions as a table, or as lines of JSON, each when it is there; and the accuracy, where it is known.

    With JSON, the accuracy goes to stderr.
    """
    console = console or Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE)
    table, right = Table("input", "label", Column("probability", justify="right"), "", box=None, pad_edge=False), []
    for one in predictions:
        if one.truth is not None:
            right.append(one.right)
        if as_json:
            typer.echo(one.json())
        else:
            (label, share), *rest = one.top
            wrong = f"{label} (is {one.truth})" if one.truth is not None and not one.right else label
            table.add_row(one.name, wrong, f"{share:.1%}", "  ".join(f"{name} {p:.1%}" for name, p in rest))
    if not as_json:
        console.print(table)
    if right:
        typer.echo(f"accuracy {sum(right) / len(right):.2%} of {len(right)} examples", err=as_json)

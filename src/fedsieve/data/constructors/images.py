"""Images in folders named after their classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fedsieve.data.constructors.rows import Rows, with_owner
from fedsieve.types import InputError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Of files that are images."""
GREY = ("1", "L", "I;16", "I", "F")


def rows_of_folders(
    folders: list[Path],
    size: tuple[int, int] | None = None,
    mode: str | None = None,
    client: Callable[[Path], object] | None = None,
) -> list[Rows]:
    """Return the examples of each folder: images uint8 [n, channels, height, width], and the names of their classes.

    ``size`` (height, width) is what they are resized to; None: they have one size. ``mode`` is L or RGB; None: RGB
    where any is coloured. ``client`` says of a file's path whose it is. Raises InputError.
    """
    files = [_files(folder) for folder in folders]
    shapes = {path: _shape(path) for several in files for path in several}
    mode = mode or ("L" if all(kind in GREY for kind, _ in shapes.values()) else "RGB")
    if mode not in ("L", "RGB"):
        raise InputError(f"mode must be L (grey) or RGB (colour), got {mode!r}")
    first = next(iter(shapes))
    if size is None:
        size = shapes[first][1]
        if odd := [path for path, (_, shape) in shapes.items() if shape != size]:
            differ = f"{odd[0]} has {shapes[odd[0]][1]} pixels, {first} {size}"
            raise InputError(f"{differ}: say what to resize all to, size=(height, width)")
    return [_rows(several, size, mode, client) for several in files]


def _rows(files: list[Path], size: tuple[int, int], mode: str, client: Callable[[Path], object] | None) -> Rows:
    x = np.empty((len(files), len(mode), *size), np.uint8)
    for i, path in enumerate(files):
        try:
            with Image.open(path) as image:
                pixels = image.convert(mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from None
        if (pixels.height, pixels.width) != size:
            pixels = pixels.resize(size[::-1], Image.Resampling.BILINEAR)
        shaped = np.asarray(pixels)
        x[i] = shaped[None] if mode == "L" else shaped.transpose(2, 0, 1)
    rows = Rows(torch.from_numpy(x), np.array([path.parent.name for path in files]))
    return rows if client is None else with_owner(rows, "client", [str(client(path)) for path in files])


def _files(folder: Path) -> list[Path]:
    """Return the images of a folder of classes, class by class. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name one that holds a folder of images for each class")
    classes = sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    files = [path for place in classes for path in sorted(place.iterdir()) if path.suffix.lower() in ENDINGS]
    if not files:
        raise InputError(f"{folder} holds no folder of images: put those of each class into a folder of its name")
    return files


def _shape(path: Path) -> tuple[str, tuple[int, int]]:
    """Return an image's mode, height and width; reads no pixel. Raises InputError."""
    try:
        with Image.open(path) as image:
            return image.mode, (image.height, image.width)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Any) -> InputError:
    return InputError(f"{path} is no image that can be read ({' '.join(str(error).split())}): replace or remove it")
